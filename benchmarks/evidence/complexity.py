"""Rank against what there is to learn: what ten subjects of 1 to 100 parts make of the same model.

`python -m benchmarks.evidence.complexity` computes it from docs/evidence/records.jsonl.gz; gpu.py makes those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import reduced
from benchmarks.evidence.comparison import (
    ALLOCATED,
    COUNTS,
    CUT_RANKS,
    LARGE,
    SEEDS,
    TARGETS,
    UNIT,
    Config,
    Tuned,
    job,
    usable,
)
from benchmarks.evidence.effects import ranks_of
from benchmarks.evidence.equal_bytes import points
from benchmarks.evidence.experiment import Claim, Results, main, mean
from benchmarks.evidence.keeping import MOST, keep_runs
from benchmarks.evidence.measuring import rounded
from benchmarks.evidence.personal import FIXED, PAPER, SETTLING
from benchmarks.evidence.pool import Record
from benchmarks.evidence.recovery import spearman

KEY, FILE = "complexity", "complexity.json"

PAPER_TARGET = 8
KEPT = 0.95
"""Of what training takes off the loss: the size that keeps so much of it is the size that a subject needs."""
SIGNIFICANT = 0.648
"""Spearman's correlation that ten subjects without any order reach in one case of twenty, in either direction."""

KEPT_RANK, KEPT_MORE = "kept_0.9", "kept_0.95"
SHARES = {KEPT_RANK: 0.9, KEPT_MORE: 0.95}
"""`settle_keep` with target MOST."""
LEARNED, NEEDED, CUT, IN_USE, IN_USE_FIXED = "learned", "needed", "cut", "in_use", "in_use_fixed"
MEASURES = {
    **{name: f"mean rank that ours comes to with target {MOST}, `settle_keep` {share:g}" for name, share in SHARES.items()},
    LEARNED: f"ranks of all layers where the paper's form comes to rest (target {PAPER_TARGET})",
    NEEDED: f"mean rank of ours that keeps {100 * KEPT:.0f} % of what its best target takes off the loss",
    CUT: f"mean rank that a rank {LARGE}, cut by energy, needs to keep {100 * KEPT:.0f} % of what it takes off the loss",
    IN_USE: f"positions that hold 90 % of the energy of ours with target {LARGE}",
    IN_USE_FIXED: f"positions that hold 90 % of the energy of a fixed rank {LARGE}",
}


def run(full: bool) -> Results:
    """From the records of the full run; or a short run of a fixed rank on a plain and on a fine subject."""
    if not full:
        return _reduced()
    from benchmarks.evidence import records
    from dev.painter.subjects import SUBJECTS

    about, kept, tuned = records.full()
    rows = [
        {"subject": subject.name, "parts": subject.parts, "outline": subject.shape, "pictures": count,
         **measures(kept, tuned, subject.name, count)}
        for count in COUNTS
        for subject in SUBJECTS
    ]
    return {"about": about, "seeds": list(SEEDS), "rows": rounded(rows)}


def _reduced() -> Results:
    config = (FIXED, reduced.LARGE, reduced.PICTURES)
    jobs = {parts: reduced.job(config, f"grid {parts}x{parts}") for parts in (1, 8)}
    done = reduced.records(list(jobs.values()))
    rows = []
    for cells, one in jobs.items():
        record = done[one.key]
        curve = {size: mark["loss"] for size, mark in _cuts(record["marks"][-1], "resized", reduced.LARGE)}
        rank = needed(curve, record["before"]["loss"])
        rows.append({"subject": one.subject, "parts": cells**2, "pictures": reduced.PICTURES, CUT: [rank]})
    return {"seeds": [0], "rows": rounded(rows)}


def _cuts(mark: Mapping[str, Any], kind: str, largest: int) -> list[tuple[float, Mapping[str, Any]]]:
    """A run's cuts by mean rank, and itself."""
    cut = [(float(size), mark[kind][str(size)]) for size in CUT_RANKS if size < largest]
    return [*cut, (float(largest), mark)]


def measures(kept: Mapping[str, Record], tuned: Tuned, name: str, count: int) -> dict[str, list[float]]:
    """Every measure of a subject, seed by seed."""
    paper = (PAPER, PAPER_TARGET, count)
    found: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for measure, share in SHARES.items():
        step = tuned[SETTLING, MOST, count].step
        for run in keep_runs(kept, tuned, name, count, share):
            found[measure].append(next(m["parameters"] for m in usable(run) if m["step"] == step) / UNIT)
    for run in _runs(kept, tuned, name, paper):
        found[LEARNED].append(sum(ranks_of(run)))
    for measure, method in ((IN_USE, SETTLING), (IN_USE_FIXED, FIXED)):
        for run in _runs(kept, tuned, name, (method, LARGE, count)):
            found[measure].append(run["use"]["together"][0])
    large: Config = (ALLOCATED, CUT_RANKS[-1], count)
    for run in _runs(kept, tuned, name, large):
        step = tuned[large].step
        mark = next(mark for mark in usable(run) if mark["step"] == step)
        curve = {size: cut["loss"] for size, cut in _cuts(mark, ALLOCATED, LARGE)}
        found[CUT].append(needed(curve, run["before"]["loss"]))
    for seed in SEEDS:
        at = points(kept, tuned, [name], [seed])
        own = [at[name, (SETTLING, target, count)] for target in TARGETS if (name, (SETTLING, target, count)) in at]
        if len(own) == len(TARGETS):
            found[NEEDED].append(needed({p.parameters / UNIT: p.loss for p in own}, own[0].before))
    return found


def _runs(kept: Mapping[str, Record], tuned: Tuned, name: str, config: Config) -> list[Record]:
    keys = [job(config, name, tuned[config].rate, seed).key for seed in SEEDS]
    return [kept[key] for key in keys if key in kept and kept[key]["marks"]]


def needed(curve: Mapping[float, float], before: float, share: float = KEPT) -> float:
    """The smallest size whose loss keeps a share of what the best size takes off it.

    curve: losses by size, in rising order of size. Between two sizes the loss is taken as a line over the size's logarithm.
    """
    goal = before - share * (before - min(curve.values()))
    last: tuple[float, float] | None = None
    for size, loss in curve.items():
        if loss <= goal:
            if last is None:
                return size
            part = (last[1] - goal) / (last[1] - loss)
            return last[0] * (size / last[0]) ** part
        last = (size, loss)
    return math.inf


def correlation(results: Results, measure: str, count: int) -> float:
    """Spearman's, of the mean over seeds against the number of parts."""
    rows = _told_of(results, measure, count)
    return spearman([row["parts"] for row in rows], [mean(row[measure]) for row in rows])


def _told_of(results: Results, measure: str, count: int) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if row["pictures"] == count and row.get(measure)]


def in_order(results: Results, measure: str, count: int) -> tuple[int, int]:
    """The outlines of which there are two subjects: on how many the one of more parts has more of a measure, and their number."""
    rows = sorted(_told_of(results, measure, count), key=lambda row: int(row["parts"]))
    each: dict[str, list[float]] = {}
    for row in rows:
        each.setdefault(row["outline"], []).append(mean(row[measure]))
    both = [values for values in each.values() if len(values) == 2]
    return sum(values[1] > values[0] for values in both), len(both)


def shifts(results: Results, measure: str, count: int) -> dict[str, int]:
    """By subject: its place in the order of a measure less its place in the order of parts."""
    rows = _told_of(results, measure, count)
    values = [mean(row[measure]) for row in rows]
    return {
        row["subject"]: sum(v < value for v in values) - sum(other["parts"] < row["parts"] for other in rows)
        for row, value in zip(rows, values, strict=True)
    }


def claims(results: Results) -> list[Claim]:
    """More parts need more rank."""
    if results["about"]["size"] == "reduced":
        plain, fine = (mean(row[CUT]) for row in results["rows"])
        return [Claim("rank that 64 parts need over what one part needs", fine / plain, 1.2, above=True)]
    count = COUNTS[0]
    learned = correlation(results, KEPT_RANK, count)
    words = f"{count} pictures: Spearman of the positions in use of a fixed rank {LARGE} and the subject's parts"
    return [
        Claim(
            f"{count} pictures: Spearman of the {MEASURES[KEPT_RANK]} and the parts (1: monotone)", learned, 1.0,
            above=True, open=True,
        ),
        Claim(words, correlation(results, IN_USE_FIXED, count), SIGNIFICANT, above=True, open=True),
    ]  # fmt: skip


def summary(results: Results) -> Results:
    """The headline is the total rank that ours comes to under one setting; every other measure stands beside it."""
    told: Results = {"spearman": round(correlation(results, KEPT_RANK, COUNTS[0]), 4), "measure": KEPT_RANK}
    told["seeds"] = len(results["seeds"])
    for count in COUNTS:
        told[f"pictures_{count}"] = {measure: round(correlation(results, measure, count), 4) for measure in MEASURES}
        told[f"pictures_{count}_outlines_in_order"] = {measure: in_order(results, measure, count)[0] for measure in MEASURES}
    return told


def of(rows: Sequence[Mapping[str, Any]], measure: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Parts, and mean, lowest and highest over the seeds."""
    own = [row for row in rows if row.get(measure)]
    values = [row[measure] for row in own]
    return [row["parts"] for row in own], [mean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def page(results: Results, folder: Path) -> str:
    """Tables and plots."""
    from benchmarks.evidence.complexity_page import build

    return build(results, folder)


if __name__ == "__main__":
    from benchmarks.evidence import complexity

    raise SystemExit(main(complexity))

"""Rank against what there is to learn: what subjects of 1 to 100 parts make of the same model.

Graded subjects differ in the number of parts alone: for every number there is each outline with two sets of colours. What a plain
LoRA of rank 64, cut afterwards, needs of its size stands beside our ranks. The ten subjects of the comparison, which differ in
outline too, are told of with other measures.

`python -m benchmarks.evidence.complexity` computes it from docs/evidence/records.jsonl.gz; gpu.py makes those.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
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
    mark_at,
)
from benchmarks.evidence.effects import ranks_of, standard_error
from benchmarks.evidence.equal_bytes import points
from benchmarks.evidence.experiment import Claim, Results, main, mean
from benchmarks.evidence.keeping import MOST, keep_job, keep_runs
from benchmarks.evidence.measuring import rounded
from benchmarks.evidence.personal import FIXED, PAPER, SETTLING, Job
from benchmarks.evidence.pool import Record
from benchmarks.evidence.recovery import spearman
from dev.painter.subjects import GRADED, SUBJECTS

KEY, FILE = "complexity", "complexity.json"

GRADED_SEEDS = tuple(range(8))
ORDERED = 0.95
"""Spearman's correlation from which ranks are said to follow the parts."""
SURE = 2.0
"""Standard errors by which a mean may fall from one number of parts to the next one."""

PAPER_TARGET = 8
KEPT = 0.95
"""Of what training takes off the loss: the size that keeps so much of it is the size that a subject needs."""
SIGNIFICANT = 0.648
"""Spearman's correlation that ten subjects without any order reach in one case of twenty, in either direction."""

FEW_PARTS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 20, 25)
"""Numbers of parts that rank follows: how far was seen on subjects of other colours, before those here were trained."""
SQUARES = tuple(k * k for k in range(1, 11))
"""Square numbers of parts, far beyond that."""

KEPT_RANK, KEPT_MORE = "kept_0.95", "kept_0.98"
SHARES = {KEPT_RANK: 0.95, KEPT_MORE: 0.98}
"""`settle_keep` with target MOST."""
LEARNED, NEEDED, CUT, IN_USE, IN_USE_FIXED = "learned", "needed", "cut", "in_use", "in_use_fixed"
MEASURES = {
    **{
        name: f"mean rank that ours comes to with target {MOST}, `settle_keep` {share:g}"
        for name, share in SHARES.items()
    },
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

    about, kept, tuned = records.full()
    beside = [
        {
            "subject": subject.name,
            "parts": subject.parts,
            "pictures": count,
            **measures(kept, tuned, subject.name, count),
        }
        for count in COUNTS
        for subject in SUBJECTS
    ]
    return {
        "about": about, "seeds": list(SEEDS), "graded_seeds": list(GRADED_SEEDS),
        "graded": rounded(graded(kept, tuned)), "rows": rounded(beside),
    }  # fmt: skip


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


def graded_job(name: str, tuned: Tuned, seed: int) -> Job | None:
    """The adaptation to a graded subject, at the learning rate of the whole target; None where that is not known."""
    return keep_job(name, COUNTS[0], SHARES[KEPT_RANK], tuned, seed)


def large_job(name: str, tuned: Tuned) -> Job | None:
    """A plain LoRA of the large rank of a graded subject, judged at every size that it is cut to; None as above."""
    config = (FIXED, LARGE, COUNTS[0])
    return job(config, name, tuned[config].rate, GRADED_SEEDS[0]) if config in tuned else None


def jobs(tuned: Tuned) -> Iterator[Job]:
    """Everything on graded subjects."""
    for seed in GRADED_SEEDS:
        for subject in GRADED:
            if found := graded_job(subject.name, tuned, seed):
                yield found
    for subject in GRADED:
        if found := large_job(subject.name, tuned):
            yield found


def graded(kept: Mapping[str, Record], tuned: Tuned) -> list[dict[str, Any]]:
    """Every graded subject with the mean ranks that ours comes to, seed by seed, and what training takes off the loss."""
    rows = []
    for subject in GRADED:
        runs = [kept.get(one.key) for seed in GRADED_SEEDS if (one := graded_job(subject.name, tuned, seed))]
        done = [run for run in runs if run and run["marks"]]
        ranks = [run["marks"][-1]["parameters"] / UNIT for run in done]
        learned = mean(1 - run["marks"][-1]["loss"] / run["before"]["loss"] for run in done)
        large = kept.get(one.key) if (one := large_job(subject.name, tuned)) else None
        needs = [] if large is None else [needed_of(large, large["marks"][-1])]
        rows.append({
            "subject": subject.name, "parts": subject.parts, "outline": subject.shape, "ranks": ranks, "learned": learned,
            "needs": needs,
        })  # fmt: skip
    return rows


def needed_of(run: Record, mark: Mapping[str, Any]) -> float:
    """The mean rank that a plain LoRA of the large rank needs of its size when it is cut by energy."""
    return needed({size: cut["loss"] for size, cut in _cuts(mark, ALLOCATED, LARGE)}, run["before"]["loss"])


def by_parts(kept: Mapping[str, Record], tuned: Tuned) -> dict[int, float]:
    """Mean ranks by the number of parts."""
    return {parts: round(mean(ranks), 2) for parts, ranks in _levels(graded(kept, tuned), "ranks").items() if ranks}


def _levels(rows: Sequence[Mapping[str, Any]], what: str) -> dict[int, list[float]]:
    """The mean over seeds of every subject, by the number of parts."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row[what]:
            found.setdefault(int(row["parts"]), []).append(mean(row[what]))
    return found


def levels(results: Results, of: Sequence[int] | None = None, what: str = "ranks") -> dict[int, tuple[float, float]]:
    """Mean rank over the graded subjects of a number of parts, and its standard error, by that number.

    of: which numbers, all if not given. what: "ranks", or "needs" for those of a plain LoRA that is cut.
    """
    found = sorted(_levels(results["graded"], what).items())
    return {parts: (mean(ranks), standard_error(ranks)) for parts, ranks in found if of is None or parts in of}


def ordered(results: Results, of: Sequence[int], what: str = "ranks") -> float:
    """Spearman's, of the mean ranks of graded subjects against their number of parts."""
    found = levels(results, of, what)
    return spearman(list(found), [rank for rank, _ in found.values()])


def largest_fall(results: Results, of: Sequence[int], what: str = "ranks") -> float:
    """By how many standard errors of the difference the mean falls at most from one number of parts to the next one."""
    found = list(levels(results, of, what).values())
    return max((a - b) / math.hypot(error, other) for (a, error), (b, other) in itertools.pairwise(found))


def measures(kept: Mapping[str, Record], tuned: Tuned, name: str, count: int) -> dict[str, list[float]]:
    """Every measure of a subject, seed by seed."""
    paper = (PAPER, PAPER_TARGET, count)
    found: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for measure, share in SHARES.items():
        step = tuned[SETTLING, MOST, count].step
        for run in keep_runs(kept, tuned, name, count, share):
            found[measure].append(mark_at(run, step)["parameters"] / UNIT)
    for run in _runs(kept, tuned, name, paper):
        found[LEARNED].append(sum(ranks_of(run)))
    for measure, method in ((IN_USE, SETTLING), (IN_USE_FIXED, FIXED)):
        for run in _runs(kept, tuned, name, (method, LARGE, count)):
            found[measure].append(run["use"]["together"][0])
    large: Config = (ALLOCATED, CUT_RANKS[-1], count)
    for run in _runs(kept, tuned, name, large):
        found[CUT].append(needed_of(run, mark_at(run, tuned[large].step)))
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


def claims(results: Results) -> list[Claim]:
    """More parts need more rank."""
    if results["about"]["size"] == "reduced":
        plain, fine = (mean(row[CUT]) for row in results["rows"])
        return [Claim("rank that 64 parts need over what one part needs", fine / plain, 1.2, above=True)]
    words = f"Spearman of the {MEASURES[KEPT_RANK]} and the parts"
    made = []
    for of, missed in ((FEW_PARTS, False), (SQUARES, True)):
        graded = f"graded subjects of 1 to {of[-1]} parts" + (", square numbers" if of is SQUARES else "")
        fall = "the largest fall of that rank with more parts, in standard errors"
        made += [
            Claim(f"{graded}, ten for every number: {words}", ordered(results, of), ORDERED, above=True, open=missed),
            Claim(f"{graded}: {fall}", largest_fall(results, of), SURE),
        ]
    return [
        *made,
        Claim(
            f"ten subjects of which each has its own number of parts, {COUNTS[0]} pictures: {words}",
            correlation(results, KEPT_RANK, COUNTS[0]), ORDERED, above=True, open=True,
        ),
    ]  # fmt: skip


def summary(results: Results) -> Results:
    """The headline is the total rank that ours comes to on graded subjects under one setting; other measures stand beside it."""
    told: Results = {
        "spearman": round(ordered(results, FEW_PARTS), 4),
        "parts": list(FEW_PARTS),
        "spearman_to_100": round(ordered(results, SQUARES), 4),
        "measure": KEPT_RANK,
        "subjects": len(results["graded"]),
        "seeds": len(results["graded_seeds"]),
        "largest_fall": round(largest_fall(results, FEW_PARTS), 2),
        "largest_fall_to_100": round(largest_fall(results, SQUARES), 2),
        "mean_rank": {f"{parts}": round(rank, 2) for parts, (rank, _) in levels(results).items()},
        "needs": {f"{parts}": round(rank, 2) for parts, (rank, _) in levels(results, what="needs").items()},
    }
    for count in COUNTS:
        told[f"ten_subjects_{count}"] = {
            measure: round(correlation(results, measure, count), 4) for measure in MEASURES
        }
    return told


if __name__ == "__main__":
    from benchmarks.evidence import complexity

    raise SystemExit(main(complexity))

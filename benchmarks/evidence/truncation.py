"""One trained file cut at load to 75, 50 and 25 % of its bytes, beside files trained for that size, and beside a fixed rank.

`python -m benchmarks.evidence.truncation` computes it from docs/evidence/records.jsonl.gz; gpu.py makes those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.evidence import reduced
from benchmarks.evidence.comparison import (
    COUNTS,
    SEEDS,
    TRUNCATED,
    TRUNCATED_SIZES,
    UNIT,
    Choice,
    Config,
    job,
    usable,
)
from benchmarks.evidence.cuts import SHARES
from benchmarks.evidence.equal_bytes import point
from benchmarks.evidence.experiment import Claim, Results, chosen, main, mean
from benchmarks.evidence.measuring import rounded
from benchmarks.evidence.personal import FIXED, SETTLING
from benchmarks.evidence.pool import Record

KEY, FILE = "truncation", "truncation.json"

SHORTENED, SHARED_OUT, TRAINED, WHOLE = "shortened", "shared_out", "trained", "whole"
"""Every layer without its last positions; all layers together to a size, as the loader does; trained for that size; uncut."""
PICTURES = COUNTS[:1]
"""Cuts of the fixed rank with fewer pictures were made in singular order, which is not what a trainer of plain LoRAs writes;
there are none of them in the records."""
FEWER = 0.01
"""Reduced run: by so much of the loss, at least, the fixed rank's cut to a quarter must be worse than ours."""


def run(full: bool) -> Results:
    """From the records of the full run; or from a few short adaptations at a smaller rank."""
    if not full:
        pairs = [(method, name) for method in (SETTLING, FIXED) for name in reduced.SUBJECTS]
        wanted = {(m, n): reduced.job((m, reduced.RANK, reduced.PICTURES), n) for m, n in pairs}
        done = reduced.records(list(wanted.values()))
        rows = [
            row
            for (method, name), one in wanted.items()
            for row in _rows(name, (method, reduced.RANK, reduced.PICTURES), reduced.STEPS, [done[one.key]])
        ]
        return {"rank": reduced.RANK, "seeds": [0], "rows": rows}
    from benchmarks.evidence import records
    from dev.painter.subjects import SUBJECTS

    about, kept, tuned = records.full()
    rows = []
    for count in PICTURES:
        for subject in SUBJECTS:
            for method in (SETTLING, FIXED):
                config = (method, TRUNCATED, count)
                rows += _rows(
                    subject.name, config, tuned[config].step, _runs(kept, config, subject.name, tuned[config])
                )
            for share, size in zip(SHARES, TRUNCATED_SIZES, strict=True):
                config = (SETTLING, size, count)
                if at := point(config, tuned[config].step, _runs(kept, config, subject.name, tuned[config])):
                    rows.append(_row(subject.name, config, TRAINED, share, at.loss, at.parameters))
    return {"about": about, "rank": TRUNCATED, "seeds": list(SEEDS), "rows": rows}


def _runs(kept: Mapping[str, Record], config: Config, name: str, choice: Choice) -> list[Record]:
    keys = [job(config, name, choice.rate, seed).key for seed in SEEDS]
    return [kept[key] for key in keys if key in kept]


def _rows(name: str, config: Config, step: int, runs: list[Record]) -> list[dict[str, Any]]:
    """A file and its cuts at a step: means over the seeds."""
    marks = [mark for run in runs for mark in usable(run) if mark["step"] == step]
    found = [_row(name, config, WHOLE, 1.0, mean(m["loss"] for m in marks), mean(m["parameters"] for m in marks))]
    for kind in (SHORTENED, SHARED_OUT):
        for share in SHARES:
            cut = [mark[kind][str(share)] for mark in marks if kind in mark]
            if cut:
                found.append(
                    _row(name, config, kind, share, mean(c["loss"] for c in cut), mean(c["parameters"] for c in cut))
                )
    return found


def _row(name: str, config: Config, kind: str, share: float, loss: float, parameters: float) -> dict[str, Any]:
    return rounded(
        {
            "subject": name, "method": config[0], "pictures": config[2], "kind": kind, "share": share, "loss": loss,
            "parameters": parameters,
        }
    )  # fmt: skip


def losses(results: Results, method: str, kind: str, count: int, share: float) -> dict[str, float]:
    """By subject."""
    found = chosen(results["rows"], method=method, kind=kind, pictures=count, share=share)
    return {row["subject"]: row["loss"] for row in found}


def ordered_wins(results: Results, count: int, kind: str = SHORTENED, of_fixed: str = SHORTENED) -> list[str]:
    """Subjects on which ours, cut in its order, is better than the fixed rank at every share.

    kind, of_fixed: how ours and the fixed rank are cut: each layer without its last positions, or all layers together to the
    same bytes, as the loader does it, which brings a fixed rank into singular order first.
    """
    good: list[set[str]] = []
    for share in SHARES:
        ours, other = losses(results, SETTLING, kind, count, share), losses(results, FIXED, of_fixed, count, share)
        good.append({name for name in ours if name in other and ours[name] < other[name]})
    return sorted(set.intersection(*good))


def both_ways(results: Results, count: int) -> list[str]:
    """Subjects on which that holds whichever way ours is cut."""
    return sorted(set(ordered_wins(results, count, SHORTENED)) & set(ordered_wins(results, count, SHARED_OUT)))


def claims(results: Results) -> list[Claim]:
    """A file in order can be cut; one without cannot."""
    if results["about"]["size"] == "reduced":
        quarter = SHARES[-1]
        ours, other = (losses(results, m, SHORTENED, reduced.PICTURES, quarter) for m in (SETTLING, FIXED))
        words = "cut to a quarter of each layer: loss of ours over a fixed rank's, the worse of two subjects"
        return [Claim(words, max(ours[name] / other[name] for name in other), 1 - FEWER)]
    subjects = len(losses(results, FIXED, WHOLE, COUNTS[0], 1.0))
    words = "subjects on which ours, cut in its order, is better at every share than a fixed rank"
    made = []
    for count in PICTURES:
        brought = len(ordered_wins(results, count, SHARED_OUT, SHARED_OUT))
        made += [
            Claim(
                f"{count} pictures: {words} without its last positions",
                len(both_ways(results, count)),
                subjects,
                above=True,
            ),
            Claim(
                f"{count} pictures: {words} that the loader brings into order first",
                brought,
                subjects,
                above=True,
                open=True,
            ),
        ]
    return made


def summary(results: Results) -> Results:
    """With 24 pictures. How much loss a cut to each share costs, over the file as a whole."""
    told: Results = {"ordered_beats_unordered": len(both_ways(results, COUNTS[0]))}
    told["subjects"] = len(losses(results, FIXED, WHOLE, COUNTS[0], 1.0))
    for count in PICTURES:
        told[f"pictures_{count}"] = {
            "ordered_beats_unordered": len(both_ways(results, count)),
            "ours_cut": {f"{share:g}": round(cost(results, SETTLING, SHARED_OUT, count, share), 4) for share in SHARES},
            "fixed_cut": {f"{share:g}": round(cost(results, FIXED, SHORTENED, count, share), 4) for share in SHARES},
            "fixed_ordered_and_cut": {
                f"{share:g}": round(cost(results, FIXED, SHARED_OUT, count, share), 4) for share in SHARES
            },
        }
    return told


def cost(results: Results, method: str, kind: str, count: int, share: float) -> float:
    """The loss after a cut over that of ours as a whole, less 1: the mean over subjects."""
    whole = losses(results, SETTLING, WHOLE, count, 1.0)
    cut = losses(results, method, kind, count, share)
    return mean(cut[name] / whole[name] - 1 for name in cut)


def size(results: Results, method: str, kind: str, count: int, share: float) -> float:
    """Mean parameters after a cut, as a share of those of a uniform rank."""
    rows = chosen(results["rows"], method=method, kind=kind, pictures=count, share=share)
    return mean(row["parameters"] for row in rows) / (UNIT * results["rank"])


if __name__ == "__main__":
    from benchmarks.evidence import truncation

    raise SystemExit(main(truncation))

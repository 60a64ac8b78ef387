"""A target that is only the most: the last cut keeps as little as holds a share of what was learned (settle_keep).

`python -m benchmarks.evidence.keeping` computes it from docs/evidence/records.jsonl.gz; gpu.py makes those.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.evidence import reduced
from benchmarks.evidence.comparison import COUNTS, SEEDS, UNIT, Config, Tuned, job, mark_at, tuning_names
from benchmarks.evidence.equal_bytes import point
from benchmarks.evidence.experiment import Claim, Results, chosen, main, mean
from benchmarks.evidence.measuring import rounded
from benchmarks.evidence.personal import FIXED, SETTLING, Job
from benchmarks.evidence.pool import Record
from dev.painter.subjects import SUBJECTS

KEY, FILE = "keeping", "keeping.json"

MOST = 32
"""The target."""
KEEPS = (0.9, 0.95, 0.98, 0.99)
"""Shares, on the subjects that settings are tuned on."""
REPORTED = (0.95, 0.98)
"""Shares, on those that are reported."""
BESIDE = (8, 16, 32, 64)
"""Fixed ranks at their own learning rates."""
SIZE = 0.5
"""Of the target: what a share comes to at most, in the mean over the reported subjects."""
BELOW = {
    (COUNTS[0], REPORTED[0]): (8,), (COUNTS[0], REPORTED[1]): (8, 16),
    (COUNTS[1], REPORTED[0]): BESIDE, (COUNTS[1], REPORTED[1]): BESIDE,
}  # fmt: skip
"""Fixed ranks whose loss each share is below in the mean, by number of pictures and share."""


def keep_job(subject: str, count: int, keep: float, tuned: Tuned, seed: int) -> Job | None:
    """An adaptation at the learning rate of the whole target; None where that is not known."""
    choice = tuned.get((SETTLING, MOST, count))
    if choice is None:
        return None
    return job((SETTLING, MOST, count), subject, choice.rate, seed, changes=(("settle_keep", keep),))


def jobs(tuned: Tuned, counts: Sequence[int] = COUNTS) -> Iterator[Job]:
    """Everything."""
    wanted = [(name, keep, 0) for keep in KEEPS for name in tuning_names()]
    wanted += [(subject.name, keep, seed) for keep in REPORTED for seed in SEEDS for subject in SUBJECTS]
    for count in counts:
        for name, keep, seed in wanted:
            if found := keep_job(name, count, keep, tuned, seed):
                yield found


def run(full: bool) -> Results:
    """From the records of the full run; or one short run that keeps a share, beside the whole target."""
    if not full:
        return _reduced()
    from benchmarks.evidence import records

    about, kept, tuned = records.full()
    rows = []
    for count in COUNTS:
        config = (SETTLING, MOST, count)
        step = tuned[config].step
        for name in (*tuning_names(), *(subject.name for subject in SUBJECTS)):
            seeds = SEEDS if name not in tuning_names() else SEEDS[:1]
            for keep in KEEPS:
                rows += _rows(name, config, keep, step, keep_runs(kept, tuned, name, count, keep))
            for method, rank in ((SETTLING, MOST), *((FIXED, rank) for rank in BESIDE)):
                at = (method, rank, count)
                keys = [job(at, name, tuned[at].rate, seed).key for seed in seeds]
                rows += _rows(name, at, 0.0, tuned[at].step, [kept[key] for key in keys if key in kept])
    return {"about": about, "most": MOST, "seeds": list(SEEDS), "rows": rounded(rows)}


def keep_runs(kept: Mapping[str, Record], tuned: Tuned, name: str, count: int, keep: float) -> list[Record]:
    """The runs with a share on a subject, of all seeds that there are."""
    wanted = [keep_job(name, count, keep, tuned, seed) for seed in SEEDS]
    return [kept[one.key] for one in wanted if one and one.key in kept]


def _rows(name: str, config: Config, keep: float, step: int, runs: Sequence[Record]) -> list[dict[str, Any]]:
    """Loss and mean rank in the mean over the seeds; keep: 0 where a target or a fixed rank is filled."""
    at = point(config, step, runs)
    if at is None:
        return []
    sizes = [mark_at(run, step)["parameters"] for run in runs]
    return [{
        "subject": name, "method": config[0], "rank": config[1], "pictures": config[2], "keep": keep, "loss": at.loss,
        "before": at.before, "mean_rank": at.parameters / UNIT, "seeds": len(runs), "spread": _spread(sizes),
    }]  # fmt: skip


def _spread(sizes: Sequence[float]) -> float:
    """The standard deviation of sizes over their mean; 0 of a single one."""
    return statistics.stdev(sizes) / mean(sizes) if len(sizes) > 1 else 0.0


def _reduced() -> Results:
    config = (SETTLING, reduced.LARGE, reduced.PICTURES)
    name = reduced.SUBJECTS[1]
    whole = reduced.job(config, name, cuts=False)
    less = reduced.job(config, name, cuts=False, changes=(("settle_keep", 0.9),))
    done = reduced.records([whole, less])
    rows = [
        row
        for keep, one in ((0.0, whole), (0.9, less))
        for row in _rows(name, config, keep, reduced.STEPS, [done[one.key]])
    ]
    return {"most": reduced.LARGE, "seeds": [0], "rows": rounded(rows)}


def of(results: Results, count: int, what: str, names: Sequence[str] | None = None, **wanted: Any) -> dict[str, float]:
    """A figure by subject; of the reported ones if none are named."""
    rows = chosen(results["rows"], pictures=count, **wanted)
    subjects = [subject.name for subject in SUBJECTS] if names is None else names
    return {row["subject"]: row[what] for row in rows if row["subject"] in subjects}


def differences(results: Results, count: int, keep: float, method: str, rank: int) -> dict[str, float]:
    """Loss with a share over that of a target or fixed rank that is filled, less 1, by reported subject."""
    own = of(results, count, "loss", method=SETTLING, keep=keep)
    other = of(results, count, "loss", method=method, rank=rank, keep=0.0)
    return {name: own[name] / other[name] - 1 for name in own if name in other}


def claims(results: Results) -> list[Claim]:
    """A share gives far smaller files, below fixed ranks of about their size; with few pictures below all of them."""
    if results["about"]["size"] == "reduced":
        whole, less = (chosen(results["rows"], keep=keep)[0] for keep in (0.0, 0.9))
        return [
            Claim(
                "a share of 0.9: mean rank, over that of the whole target", less["mean_rank"] / whole["mean_rank"], 0.6
            ),
            Claim("a share of 0.9: loss over that with the whole target", less["loss"] / whole["loss"], 1.05),
        ]
    made = []
    for (count, keep), ranks in BELOW.items():
        words = f"{count} pictures, target {MOST}, a share of {keep:g}"
        size = mean(of(results, count, "mean_rank", method=SETTLING, keep=keep).values())
        made.append(Claim(f"{words}: mean rank over the target", size / MOST, SIZE))
        for rank in ranks:
            found = 1 + mean(differences(results, count, keep, FIXED, rank).values())
            made.append(Claim(f"{words}: loss over that of fixed {rank}, mean", found, 1.0))
    return made


def summary(results: Results) -> Results:
    """For every share: mean ranks, and the mean difference of the loss to each fixed rank, over the reported subjects."""
    told: Results = {"target": results["most"], "seeds": len(results["seeds"])}
    for count in COUNTS:
        for keep in REPORTED:
            ranks = of(results, count, "mean_rank", method=SETTLING, keep=keep).values()
            against = {
                f"fixed_{r}": round(mean(differences(results, count, keep, FIXED, r).values()), 4) for r in BESIDE
            }
            told[f"pictures_{count}_keep_{keep:g}"] = {
                "mean_rank": [round(min(ranks), 2), round(mean(ranks), 2), round(max(ranks), 2)], "difference": against,
            }  # fmt: skip
    return told


if __name__ == "__main__":
    from benchmarks.evidence import keeping

    raise SystemExit(main(keeping))

"""Records as the runs on subjects leave them, made up by a formula: what the pages' arithmetic is tested on."""

from __future__ import annotations

import json
import math
from typing import Any

from benchmarks.evidence import comparison, complexity, decay, keeping, longer, variants
from benchmarks.evidence.comparison import UNIT
from benchmarks.evidence.personal import FIXED, PAPER, SETTLING, Job

LAYERS = 15
BETTER = {SETTLING: 0.97, FIXED: 1.0, PAPER: 1.02}
BEST_RATE = 10**-2.5


def parts(subject: str) -> int:
    """The parts of "grid 3x3"."""
    rows, cells = subject.split()[1].split("x")
    return int(rows) * int(cells)


def loss(method: str, rank: float, job: Job, step: int) -> float:
    """Lower for larger ranks, later steps, ours, and at one learning rate; the seed adds a little."""
    off = (math.log10(job.rate) - math.log10(BEST_RATE)) ** 2
    short = 0.01 * parts(job.subject) ** 0.5 / rank
    plain = 1.01 if "not mixed" in job.twist else 1.0
    plain *= 1.02 if pulled(job) else 1.0
    return plain * BETTER[method] * (0.1 + short + 0.05 * off + 0.02 * (1 - step / job.steps)) * (1 + 1e-3 * job.seed)


def pulled(job: Job) -> float:
    """By how much a weight decay is above the one that is chosen."""
    usual = decay.decay_of(job.pictures, 1.0)
    return float(dict(job.changes).get("weight_decay", usual)) - usual


def record(job: Job) -> dict[str, Any]:
    """What `Workbench.adapt` gives for a job."""
    marks = []
    target = job.rank * UNIT
    held = "budget_mb" in dict(job.changes)
    for step in (*job.marks, job.steps):
        size = target
        if "settle_keep" in dict(job.changes):
            variant = job.subject.split()[
                -1
            ]  # of a graded subject, "0" or "1": those of one number of parts differ a little
            size = round((8 + parts(job.subject) / 50 + (0.1 * int(variant) if variant.isdigit() else 0.0)) * UNIT)
        if job.method == SETTLING and step < 0.45 * job.steps:
            size = 2 * target
        if job.method == PAPER and not held:
            size = (4 + job.rank) * UNIT
        judged = {
            "loss": loss(job.method, size / UNIT, job, step),
            "drift": 0.05 + 1e-4 * step - 1e-3 * min(pulled(job), 1),
        }
        mark: dict[str, Any] = {**judged, "step": step, "parameters": size}
        for kind in job.more if size <= target else ():
            mark[kind] = dict(_cut(kind, job, step, mark["loss"]))
        marks.append(mark)
    rank = {SETTLING: job.rank, FIXED: job.rank, PAPER: job.rank + 4}[job.method]
    found = {
        "subject": job.subject, "pictures": job.pictures, "method": job.method, "rank": job.rank, "rate": job.rate,
        "seed": job.seed, "steps": job.steps, "changes": dict(job.changes), "twist": job.twist,
        "before": {"loss": 0.3, "drift": 0.05}, "marks": marks, "file": {"loss": 0.1, "drift": 0.05, "parameters": target},
        "budget": target, "ranks": {f"layer {i}": rank + (i == 0) + parts(job.subject) for i in range(LAYERS)},
        "use": {"layers": {f"layer {i}": 1 for i in range(LAYERS)}, "together": [parts(job.subject) + 5, 10], "weighed": [7, 10]},
        "seconds": 1.0, "key": job.key, "device": "a GPU", "torch": "1", "date": "2020-01-01",
    }  # fmt: skip
    return dict(json.loads(json.dumps(found)))


def _cut(kind: str, job: Job, step: int, whole: float) -> list[tuple[str, dict[str, float]]]:
    if kind in (comparison.RESIZED, comparison.ALLOCATED):
        sizes = comparison.CUT_RANKS
        losses = [loss(FIXED, 0.8 * size, job, step) for size in sizes]
        return [
            (f"{s}", {"loss": one, "drift": 0.05, "parameters": s * UNIT - 10})
            for s, one in zip(sizes, losses, strict=True)
        ]
    slope = 0.4 if job.method == FIXED and kind == "shortened" else 0.1
    shares = (0.75, 0.5, 0.25)
    return [
        (f"{s}", {"loss": whole * (1 + slope * (1 - s)), "drift": 0.05, "parameters": s * job.rank * UNIT})
        for s in shares
    ]


class Made:
    """A source of records for every job that is asked for."""

    out_of_time = False

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def run(self, jobs: Any) -> list[dict[str, Any]]:
        """Make them."""
        jobs = list(jobs)
        for job in jobs:
            if job.key not in self.records:
                self.records[job.key] = record(job)
        return [self.records[job.key] for job in jobs]


def everything() -> tuple[dict[str, dict[str, Any]], comparison.Tuned]:
    """All records of a full run, and what tuning chose."""
    made = Made()
    tuned = comparison.tune(made, comparison.configs(), comparison.tuning_names())
    made.run(variants.jobs(tuned))
    made.run(comparison.reported(tuned, comparison.SEEDS))
    made.run(keeping.jobs(tuned))
    made.run(complexity.jobs(tuned))
    made.run(decay.jobs())
    made.run(longer.jobs(tuned))
    return made.records, tuned

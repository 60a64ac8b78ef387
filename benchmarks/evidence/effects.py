"""What a change of the method does to the held-out loss, pair by pair: the same subject, the same seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.evidence.comparison import COUNTS, TARGETS, UNIT, Choice, Config, Tuned, best, mark_at
from benchmarks.evidence.experiment import mean
from benchmarks.evidence.personal import FIXED, PAPER, SETTLING, Job
from benchmarks.evidence.pool import Record
from benchmarks.evidence.variants import (
    AS_IT_IS,
    FIXED_AS_IT_IS,
    PAPER_AS_IT_IS,
    Variant,
    jobs_of,
    rates,
    rates_unmixed,
    unmixed,
    variants,
)


@dataclass(frozen=True)
class Effect:
    """A variant at the best of its learning rates and steps.

    difference: of its loss to that of the method that it changes, as a share, in the mean; error: that mean's standard error over
    pairs. rank: mean, weighted by what a rank costs; low, high: the lowest and highest of a layer. growth: mean rank at every
    mark. at_side: whether the best rate is one of the two at the sides.
    """

    variant: Variant
    rate: float
    step: int
    difference: float
    error: float
    pairs: int
    rank: float
    low: int
    high: int
    growth: tuple[tuple[int, float], ...]
    at_side: bool


def effects(records: Mapping[str, Record], tuned: Tuned, count: int) -> list[Effect]:
    """Of every variant whose runs are all there."""
    found = []
    for variant in variants(count):
        own = _chosen(records, tuned, variant, count)
        base = _chosen(records, tuned, _compared_with(variant), count)
        if own and base:
            found.append(_effect(variant, own, base, rates(variant, count, tuned)))
    return found


def _compared_with(variant: Variant) -> Variant:
    """The method that a variant changes; ours where the paper's form has our size."""
    if variant.budgeted:
        return AS_IT_IS
    return {PAPER: PAPER_AS_IT_IS, FIXED: FIXED_AS_IT_IS, SETTLING: AS_IT_IS}[variant.method]


Runs = tuple[Choice, dict[tuple[str, int], Record]]
"""The best learning rate and step of what was tried, and the runs at that rate by subject and seed."""


def best_runs(records: Mapping[str, Record], config: Config, tried: Sequence[tuple[float, Job]]) -> Runs | None:
    """The best of jobs at their rates; None where there are none, any run is missing, or all have diverged."""
    if not tried or any(job.key not in records for _, job in tried):
        return None
    choice = best(config, [(rate, records[job.key]) for rate, job in tried])
    if choice is None:
        return None
    return choice, {(job.subject, job.seed): records[job.key] for rate, job in tried if rate == choice.rate}


def compared(own: Runs, base: Runs) -> list[float]:
    """The losses of these runs over those, less 1, pair by pair: the same subject, the same seed."""
    (choice, runs), (base_choice, base_runs) = own, base
    return [mark_at(runs[k], choice.step)["loss"] / mark_at(base_runs[k], base_choice.step)["loss"] - 1 for k in runs]


def _chosen(records: Mapping[str, Record], tuned: Tuned, variant: Variant, count: int) -> Runs | None:
    """Those of a variant."""
    tried = [(rate, job) for rate in rates(variant, count, tuned) for job in jobs_of(variant, count, rate)]
    return best_runs(records, variant.config(count), tried)


def _effect(variant: Variant, own: Runs, base: Runs, tried: tuple[float, ...]) -> Effect:
    (choice, runs), changes = own, compared(own, base)
    ranks = [rank for run in runs.values() for rank in ranks_of(run)]
    steps = [mark["step"] for mark in next(iter(runs.values()))["marks"]]
    growth = tuple((step, mean(_size(run, step) for run in runs.values()) / UNIT) for step in steps)
    return Effect(
        variant, choice.rate, choice.step, mean(changes), standard_error(changes), len(changes),
        dict(growth)[choice.step], min(ranks), max(ranks), growth, len(tried) > 1 and choice.rate in (tried[0], tried[-1]),
    )  # fmt: skip


def mixtures(records: Mapping[str, Record], tuned: Tuned) -> list[dict[str, float]]:
    """What settled layers gain by training mixtures, target by target: both at the best of the same rates and of all steps."""
    found = []
    for target in TARGETS:
        config = (SETTLING, target, COUNTS[0])
        tried = [(rate, one) for rate in rates_unmixed(target, tuned) for one in unmixed(target, rate)]
        without = best_runs(records, config, tried)
        mixed = best_runs(records, config, [(rate, replace(one, twist="")) for rate, one in tried])
        if without is None or mixed is None:
            continue
        changes = compared(mixed, without)
        found.append({
            "target": target, "without": without[0].loss, "with": mixed[0].loss, "difference": mean(changes),
            "error": standard_error(changes), "rate_without": without[0].rate, "rate_with": mixed[0].rate,
        })  # fmt: skip
    return found


def _size(run: Record, step: int) -> float:
    return float(next(mark["parameters"] for mark in run["marks"] if mark["step"] == step))


def ranks_of(run: Record) -> list[int]:
    """The ranks of all layers at a run's end; a stored record has them without names."""
    ranks = run["ranks"]
    return list(ranks.values()) if isinstance(ranks, dict) else list(ranks)


def standard_error(values: list[float]) -> float:
    """Of the mean; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))

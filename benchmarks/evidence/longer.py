"""Twice the steps: whether what was compared at `STEPS` steps holds for longer runs, on the subjects that settings are tuned on.

Part of the comparison at equal bytes (pareto.py), whose methods were all at their best at the last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.evidence.comparison import COUNTS, RATES, STEPS, TUNING_SEEDS, Config, Tuned, job, tuning_names
from benchmarks.evidence.effects import Runs, best_runs, compared, standard_error
from benchmarks.evidence.experiment import mean
from benchmarks.evidence.personal import FIXED, SETTLING, Job
from benchmarks.evidence.pool import Record
from benchmarks.evidence.variants import lengthened

LONGER = 2 * STEPS
SIZES = (8, 32)
"""The fixed ranks that are trained longer, and the targets of ours."""
LOWER = 2
"""A longer run may want a lower rate: the tuned one, and so many quarter powers of ten below it."""


def _tried(config: Config, tuned: Tuned) -> list[tuple[float, Job]]:
    """The longer runs of a config at each of their rates; none where its own is not known."""
    if config not in tuned:
        return []
    rates = [rate for rate in RATES if rate <= tuned[config].rate][-LOWER - 1 :]
    return [(rate, lengthened(one, LONGER)) for rate in rates for one in _runs(config, rate)]


def _runs(config: Config, rate: float) -> list[Job]:
    return [job(config, name, rate, seed) for name in tuning_names() for seed in TUNING_SEEDS]


def configs() -> list[Config]:
    """What is trained longer."""
    return [(method, size, count) for count in COUNTS for size in SIZES for method in (FIXED, SETTLING)]


def jobs(tuned: Tuned) -> Iterator[Job]:
    """Everything."""
    for config in configs():
        yield from (one for _, one in _tried(config, tuned))


def rows(kept: Mapping[str, Record], tuned: Tuned) -> list[dict[str, Any]]:
    """By number of pictures and size: what each method gains by the steps, and ours over the fixed rank before and after.

    Each a mean over pairs of subject and seed, with its standard error; rate: the best of the longer runs', over the tuned one.
    """
    found = []
    for count in COUNTS:
        for size in SIZES:
            row: dict[str, Any] = {"pictures": count, "rank": size}
            runs = {}
            for method in (FIXED, SETTLING):
                if both := _both(kept, tuned, (method, size, count)):
                    runs[method] = both
            if len(runs) < 2:
                continue
            for method, (usual, longer) in runs.items():
                changes = compared(longer, usual)
                row[method] = [mean(changes), standard_error(changes)]
                row[f"rate_{method}"] = longer[0].rate / usual[0].rate
                row[f"step_{method}"] = longer[0].step
            for index, steps in enumerate((STEPS, LONGER)):
                changes = compared(runs[SETTLING][index], runs[FIXED][index])
                row[f"ours_{steps}"] = [mean(changes), standard_error(changes)]
            found.append(row)
    return found


def _both(kept: Mapping[str, Record], tuned: Tuned, config: Config) -> tuple[Runs, Runs] | None:
    """The runs of the usual length, and the longer ones at their best rate."""
    if config not in tuned:
        return None
    rate = tuned[config].rate
    usual = best_runs(kept, config, [(rate, one) for one in _runs(config, rate)])
    longer = best_runs(kept, config, _tried(config, tuned))
    return (usual, longer) if usual and longer else None

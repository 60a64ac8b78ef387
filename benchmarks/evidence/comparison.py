"""Held-out loss against bytes: adaptive ranks beside fixed ranks, the paper's form, and large ranks cut afterwards.

Learning rates and stopping points are tuned on subjects of their own, for every method, size and number of pictures, until
the best lies inside the grid; ten other subjects are reported, with three seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.evidence.personal import FIXED, PAPER, SETTLING, Job
from benchmarks.evidence.pool import Pool, Record
from dev.painter.subjects import SUBJECTS, TUNING

STEPS = 200
MARKS = (80, 120, 160)
RATES = tuple(10 ** (-k / 2) for k in range(8, 1, -1))
"""1e-4 to 0.1 by half powers of ten; tuning starts in the middle and walks until the best lies inside."""
FIRST_RATES = (2, 3)

FIXED_RANKS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = (1, 2, 4, 8, 16, 32, 64)
PAPER_TARGETS = (2, 8)
CUT_RANKS = (1, 2, 4, 8, 16, 32)
LARGE = 64
TRUNCATED = 16
"""The rank whose files are cut at load."""
RESIZED, ALLOCATED = "resized", "allocated"
"""Trained at LARGE, then cut: every layer to the same share of its norm, or all together by energy per parameter."""

COUNTS = (24, 5)
SEEDS = (0, 1, 2)

Config = tuple[str, int, int]
"""Method, rank whose size it has, number of pictures."""


def configs(counts: Sequence[int] = COUNTS) -> list[Config]:
    """Everything that is compared."""
    ranks = {FIXED: FIXED_RANKS, SETTLING: TARGETS, PAPER: PAPER_TARGETS, RESIZED: CUT_RANKS, ALLOCATED: CUT_RANKS}
    return [(method, rank, count) for count in counts for method in ranks for rank in ranks[method]]


def job(config: Config, subject: str, rate: float, seed: int, **more: Any) -> Job:
    """The adaptation that shows a config."""
    method, rank, count = config
    if method in (RESIZED, ALLOCATED):
        method, rank = FIXED, LARGE
    if (method, rank) == (FIXED, LARGE):
        more["more"] = (RESIZED, ALLOCATED)
    if rank == TRUNCATED and method in (FIXED, SETTLING):
        more["more"] = ("shortened", "shared_out")
    return Job(subject, count, method, rank, rate, seed, STEPS, marks=MARKS, **more)


def score(mark: dict[str, Any], config: Config) -> dict[str, Any]:
    """Loss, drift and parameters of a config at a mark of its adaptation."""
    return dict(mark[config[0]][str(config[1])]) if config[0] in (RESIZED, ALLOCATED) else mark


def best(config: Config, runs: Iterable[tuple[float, Record]]) -> tuple[float, int]:
    """The learning rate and the step with the lowest mean loss; runs: with their rates."""
    groups: dict[tuple[float, int], list[float]] = {}
    for rate, record in runs:
        for mark in record["marks"]:
            groups.setdefault((rate, mark["step"]), []).append(score(mark, config)["loss"])
    return min(groups, key=lambda key: sum(groups[key]) / len(groups[key]))


def tune(pool: Pool, wanted: Sequence[Config], names: Sequence[str]) -> dict[Config, tuple[float, int]]:
    """For every config the learning rate and the step that are best on these subjects; those that time allowed."""
    tried = {config: set(FIRST_RATES) for config in wanted}
    while True:
        pool.run(job(c, name, RATES[i], 0) for c in wanted for i in sorted(tried[c]) for name in names)
        found, grown = {}, False
        for config in wanted:
            runs = [(RATES[i], pool.records.get(job(config, n, RATES[i], 0).key)) for i in tried[config] for n in names]
            if any(record is None for _, record in runs):
                return {}
            found[config] = best(config, [(rate, record) for rate, record in runs if record])
            index = RATES.index(found[config][0])
            missing = {i for i in (index - 1, index + 1) if 0 <= i < len(RATES)} - tried[config]
            tried[config] |= missing
            grown = grown or bool(missing)
        if not grown:
            return found


def reported(tuned: dict[Config, tuple[float, int]], seeds: Sequence[int]) -> Iterator[Job]:
    """The adaptations that are reported, seed by seed."""
    for seed in seeds:
        for subject in SUBJECTS:
            for config, (rate, _) in tuned.items():
                yield job(config, subject.name, rate, seed)


def tuning_names() -> list[str]:
    """The subjects that settings are tuned on."""
    return [subject.name for subject in TUNING]

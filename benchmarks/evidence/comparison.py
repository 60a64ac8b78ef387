"""Held-out loss against bytes: adaptive ranks beside fixed ranks, the paper's form, and large ranks cut afterwards.

Learning rates and stopping points are tuned on subjects of their own, for every method, size and number of pictures, until
the best lies inside the grid; ten other subjects are reported, with eight seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from benchmarks.evidence.personal import FIXED, PAPER, SETTLING, Job
from benchmarks.evidence.pool import Record
from dev.painter.subjects import SUBJECTS, TUNING

STEPS = 200
MARKS = (60, 100, 150)
"""Steps after which a run is measured, beside its end: where it may be stopped."""

RATES = tuple(10 ** (-k / 4) for k in range(20, 3, -1))
"""1e-5 to 0.1 by quarter powers of ten."""
HALF = 2
"""Tuning starts at FIRST_RATES and walks by half powers of ten until the best lies inside."""
FIRST_RATES = (8, 10, 12)
"""Then it looks a quarter to both sides of the best: methods differ by less than half powers of ten do."""

FIXED_RANKS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = (1, 2, 4, 8, 16, 32, 64)
PAPER_TARGETS = (2, 8)
CUT_RANKS = (1, 2, 4, 8, 16, 32)
LARGE = 64
TRUNCATED = 16
"""The rank whose files are cut at load, of ours and of the fixed ones."""
TRUNCATED_SIZES = (12, 8, 4)
"""What is left of them, to train ours for: 75, 50 and 25 %."""
RESIZED, ALLOCATED = "resized", "allocated"
"""Trained at LARGE, then cut: every layer to the same share of its norm, or all together by energy per parameter."""

UNIT = 11_776
"""Parameters per unit of rank in the drawing model's attention layers; the tests count them."""

COUNTS = (24, 5)
SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
"""Of what is reported."""
TUNING_SEEDS = (0, 1, 2)

Config = tuple[str, int, int]
"""Method, rank whose size it has, number of pictures."""


@dataclass(frozen=True)
class Choice:
    """A learning rate and the step to stop at, with the mean loss there.

    tried: all rates that were tried, rising. inside: whether a lower and a higher rate were tried too. coarse: the best of those
    by half powers of ten.
    """

    rate: float
    step: int
    loss: float = math.nan
    tried: tuple[float, ...] = ()
    coarse: float = math.nan

    @property
    def inside(self) -> bool:
        return bool(self.tried) and self.tried[0] < self.rate < self.tried[-1]


Tuned = Mapping[Config, Choice]


def configs(counts: Sequence[int] = COUNTS) -> list[Config]:
    """Everything that is compared."""
    ours = (*TARGETS, *(size for size in TRUNCATED_SIZES if size not in TARGETS))
    ranks = {FIXED: FIXED_RANKS, SETTLING: ours, PAPER: PAPER_TARGETS, RESIZED: CUT_RANKS, ALLOCATED: CUT_RANKS}
    return [(method, rank, count) for count in counts for method in ranks for rank in ranks[method]]


def job(
    config: Config, subject: str, rate: float, seed: int, changes: tuple[tuple[str, Any], ...] = (), **more: Any
) -> Job:
    """The adaptation that shows a config."""
    method, rank, count = config
    if method in (RESIZED, ALLOCATED):
        method, rank = FIXED, LARGE
    if (method, rank) == (FIXED, LARGE):
        more["more"] = (RESIZED, ALLOCATED)
    if rank == TRUNCATED and method in (FIXED, SETTLING):
        more["more"] = ("shortened", "shared_out")
    return Job(subject, count, method, rank, rate, seed, STEPS, changes, MARKS, **more)


def score(mark: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Loss, drift and parameters of a config at a mark of its adaptation."""
    return dict(mark[config[0]][str(config[1])]) if config[0] in (RESIZED, ALLOCATED) else dict(mark)


def usable(record: Record) -> list[dict[str, Any]]:
    """The marks of a record at which a file of the size that was asked for can be written; none of a run that diverged.

    Before its last cut a run of ours is larger than its target, and cutting it there is not what the method does. The
    paper's form is judged at the size that it has.
    """
    own_size = record["method"] == PAPER and "budget_mb" not in record["changes"]
    limit = math.inf if own_size else record.get("budget", math.inf)
    return [mark for mark in record["marks"] if mark["parameters"] <= limit and math.isfinite(mark["loss"])]


def mark_at(record: Record, step: int) -> dict[str, Any]:
    """The usable mark of a record after a step. Raises StopIteration where there is none."""
    return next(mark for mark in usable(record) if mark["step"] == step)


def best(config: Config, runs: Iterable[tuple[float, Record]]) -> Choice | None:
    """The learning rate and the step with the lowest mean loss; runs: with their rates. None where all have diverged.

    A step counts for a rate only where every run of that rate has it.
    """
    groups: dict[tuple[float, int], list[float]] = {}
    counts: dict[float, int] = {}
    for rate, record in runs:
        counts[rate] = counts.get(rate, 0) + 1
        for mark in usable(record):
            groups.setdefault((rate, mark["step"]), []).append(score(mark, config)["loss"])
    means = {key: sum(losses) / len(losses) for key, losses in groups.items() if len(losses) == counts[key[0]]}
    if not means:
        return None
    rate, step = min(means, key=lambda key: means[key])
    return Choice(rate, step, means[rate, step], tuple(sorted(counts)))


class Source(Protocol):
    """Where records come from: a `Pool`, or a file."""

    records: dict[str, Record]
    failed: dict[str, str]

    def run(self, jobs: Iterable[Job]) -> list[Record]:
        """Make those that are missing, as far as that can be."""

    @property
    def out_of_time(self) -> bool:
        """Whether nothing more is made."""


def tune(pool: Source, wanted: Sequence[Config], names: Sequence[str]) -> dict[Config, Choice]:
    """For every config the learning rate and the step that are best on these subjects.

    Those are missing that time did not allow, or of which no run went well.
    """
    tried = {config: set(FIRST_RATES) for config in wanted}
    while True:
        pool.run(one for c in wanted for i in sorted(tried[c]) for one in _tries(c, RATES[i], names))
        found, grown = {}, False
        for config in wanted:
            keyed = [(RATES[i], one.key) for i in sorted(tried[config]) for one in _tries(config, RATES[i], names)]
            if any(key not in pool.records and key not in pool.failed for _, key in keyed):
                continue
            gone = {rate for rate, key in keyed if key in pool.failed}
            runs = [(rate, pool.records[key]) for rate, key in keyed if rate not in gone]
            choice, coarse = best(config, runs), best(config, [run for run in runs if run[0] in RATES[::HALF]])
            if choice is None or coarse is None:
                continue
            rates = tuple(RATES[i] for i in sorted(tried[config]))
            found[config] = choice = replace(choice, tried=rates, coarse=coarse.rate)
            index = RATES.index(coarse.rate)
            missing = _around(index, HALF) - tried[config]
            if not missing:
                missing = _around(index, 1) - tried[config]
            tried[config] |= missing
            grown = grown or bool(missing)
        if not grown or pool.out_of_time:
            inside = {c: choice for c, choice in found.items() if choice.inside or choice.rate in (RATES[0], RATES[-1])}
            return _shared(inside, pool.records, names)


def _shared(
    found: Mapping[Config, Choice], records: Mapping[str, Record], names: Sequence[str]
) -> dict[Config, Choice]:
    """The same, but that all that is judged on runs of the large fixed rank may use any rate that one of them has come to.

    A walk ends at the nearest optimum, and they do not all walk to the same one.
    """
    result = dict(found)
    for count in COUNTS:
        same = [c for c in found if c[2] == count and (c[0] in (RESIZED, ALLOCATED) or c[:2] == (FIXED, LARGE))]
        rates = sorted({found[c].rate for c in same})
        tried = tuple(sorted({rate for c in same for rate in found[c].tried}))
        jobs = {rate: _tries((FIXED, LARGE, count), rate, names) for rate in rates}
        runs = [
            (r, records[one.key]) for r, each in jobs.items() if all(j.key in records for j in each) for one in each
        ]
        for config in same:
            choice = best(config, runs)
            if choice is not None and choice.loss < found[config].loss:
                result[config] = replace(
                    found[config], rate=choice.rate, step=choice.step, loss=choice.loss, tried=tried
                )
    return result


def beyond(config: Config, tuned: Tuned, records: Mapping[str, Record], names: Sequence[str]) -> float:
    """By what share of its tuning loss a config would be better at the best of the rates that it counts as tried."""
    runs = [
        (rate, records[one.key])
        for rate in tuned[config].tried
        for one in _tries(config, rate, names)
        if one.key in records
    ]
    found = best(config, runs)
    return 0.0 if found is None else 1 - found.loss / tuned[config].loss


def _tries(config: Config, rate: float, names: Sequence[str]) -> list[Job]:
    """The runs by which a learning rate of a config is judged."""
    return [job(config, name, rate, seed) for seed in TUNING_SEEDS for name in names]


def _around(index: int, far: int) -> set[int]:
    return {i for i in (index - far, index + far) if 0 <= i < len(RATES)}


def reported(tuned: Tuned, seeds: Sequence[int] = SEEDS) -> Iterator[Job]:
    """The adaptations that are reported, seed by seed."""
    for seed in seeds:
        for subject in SUBJECTS:
            for config, choice in tuned.items():
                yield job(config, subject.name, choice.rate, seed)


def tuning_names() -> list[str]:
    """The subjects that settings are tuned on."""
    return [subject.name for subject in TUNING]

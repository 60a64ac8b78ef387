"""What each setting and each part of the method does: one change at a time, on the subjects that settings are tuned on.

Every variant is trained at the learning rate that is best without it; where a change may shift that, half a decade to both
sides too, and so is the method without a change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.evidence.comparison import (
    COUNTS,
    HALF,
    RATES,
    TARGETS,
    TUNING_SEEDS,
    UNIT,
    Choice,
    Config,
    Tuned,
    job,
    tuning_names,
)
from benchmarks.evidence.personal import FIXED, PAPER, SETTLING, Job

RANK, PAPER_RANK = 4, 8
"""The target of ours, and what the paper's form is pulled toward."""
LONG = 600
"""Steps of the paper's longer runs, in which ranks have time to run away."""
SEEDS = (0, 1)
NEVER = "1 (ranks never adapt)"


@dataclass(frozen=True)
class Variant:
    """One change. setting: the row of the table it belongs to. name: of the change in it.

    sides: whether half a decade to both sides of the learning rate is tried too. steps: 0 for the usual ones.
    """

    setting: str
    name: str
    changes: tuple[tuple[str, Any], ...] = ()
    twist: str = ""
    method: str = SETTLING
    sides: bool = False
    steps: int = 0

    def config(self, count: int) -> Config:
        """Whose learning rate it is trained at."""
        if self.budgeted:
            return (SETTLING, RANK, count)
        return (self.method, PAPER_RANK if self.method == PAPER else RANK, count)

    @property
    def budgeted(self) -> bool:
        """Whether the paper's form is held to the size that ours has."""
        return self.method == PAPER and any(name == "budget_mb" for name, _ in self.changes)


AS_IT_IS = Variant("as it is", "", sides=True)
FIXED_AS_IT_IS = Variant("fixed rank, as it is", "", method=FIXED, sides=True)
PAPER_AS_IT_IS = Variant("paper's form, as it is", "", method=PAPER, sides=True)


def _swept(setting: str, values: Sequence[Any], sides: bool = False, method: str = SETTLING) -> list[Variant]:
    words = {SETTLING: "", PAPER: "paper's form, ", FIXED: "fixed rank, "}[method]
    return [Variant(words + setting, f"{value}", ((setting, value),), method=method, sides=sides) for value in values]


DECAYS = (0.0, 0.3, 3.0, 10.0)
"""Beside the default, which is about 1 with more pictures and 5 with few."""


def _kept(rest: float) -> tuple[tuple[str, Any], ...]:
    return (("budget_mb", 2e-6 * RANK * UNIT), ("rank_rest", rest))


UNMIXED = Variant("positions after a cut", "in singular order", twist="not mixed", sides=True)
OURS = [
    AS_IT_IS,
    UNMIXED,
    *_swept("init", ["paper"], sides=True),
    Variant("gain of Λ", "none", twist="no gain", sides=True),
    Variant("first position", "1", twist="positions from 1"),
    Variant("what a cut goes by", "energy alone", twist="energy only"),
    Variant("moments at a cut", "carried over", twist="moments carried", sides=True),
    Variant("learning rate before the last cut", "as given", twist="rate as given", sides=True),
    *_swept("settle_at", [0.15, 0.25, 0.3, 0.6]),
    *_swept("settle_cuts", [1, 2, 4, 5]),
    *_swept("initial_rank", [RANK, 2 * RANK, 8 * RANK]),
    *_swept("min_rank", [1]),
    *_swept("rank_hold", [0.0, 0.1]),
    Variant("rank_hold", NEVER, (("rank_hold", 1.0),)),
    *_swept("rank_learning_rate", [0.003, 0.03, 0.1]),
    *_swept("q", [0.5, 0.75, 0.95, 0.99]),
    *_swept("rank_weight", [0.0, 1e-3, 1e-2, 1e-1]),
    *_swept("weight_decay", DECAYS, sides=True),
    Variant("Λ in the second phase", "kept, ranks rest at 0.45", _kept(0.55), method=PAPER, sides=True),
    Variant("Λ in the second phase", "kept, ranks rest at 0.75", _kept(0.25), method=PAPER, sides=True),
]

FIXED_ONES = [
    FIXED_AS_IT_IS,
    Variant("fixed rank, moments", "start anew where ours is cut", twist="moments anew", method=FIXED, sides=True),
    *_swept("weight_decay", DECAYS, sides=True, method=FIXED),
]
PAPERS = [
    PAPER_AS_IT_IS,
    *_swept("rank_weight", [0.0, 1e-5, 1e-3, 1e-2, 1e-1], method=PAPER),
    *_swept("init", ["paper"], sides=True, method=PAPER),
    Variant("paper's form, gain of Λ", "none", twist="no gain", method=PAPER, sides=True),
    Variant("paper's form, first position", "1", twist="positions from 1", method=PAPER),
    Variant("paper's form, 600 steps", "as it is", method=PAPER, steps=LONG),
    *(
        Variant("paper's form, 600 steps", f"rank_weight {w:g}", (("rank_weight", w),), method=PAPER, steps=LONG)
        for w in (0.0, 1e-3, 1e-2)
    ),
    Variant(
        "paper's form, 600 steps", "rank_weight 0, rank_learning_rate 0.03",
        (("rank_weight", 0.0), ("rank_learning_rate", 0.03)), method=PAPER, steps=LONG,
    ),
    Variant(
        "paper's form, 600 steps", "rank_weight 0, weight_decay 0", (("rank_weight", 0.0), ("weight_decay", 0.0)), method=PAPER,
        steps=LONG,
    ),
    Variant("paper's form, 600 steps", "rank_learning_rate 0.03", (("rank_learning_rate", 0.03),), method=PAPER, steps=LONG),
]  # fmt: skip

FEW = (
    "as it is", "positions after a cut", "what a cut goes by", "learning rate before the last cut", "settle_at", "settle_cuts",
    "weight_decay", "fixed rank, as it is", "fixed rank, weight_decay",
)  # fmt: skip
"""What is tried with few pictures too."""


def variants(count: int) -> list[Variant]:
    """Those that are tried with so many pictures."""
    every = [*OURS, *FIXED_ONES, *PAPERS]
    return every if count == COUNTS[0] else [variant for variant in every if variant.setting in FEW]


def rates(variant: Variant, count: int, tuned: Tuned) -> tuple[float, ...]:
    """The learning rates that it is trained at; none where its own is not known."""
    choice = tuned.get(variant.config(count))
    if choice is None:
        return ()
    return _with_sides(choice) if variant.sides else (choice.coarse,)


def _with_sides(choice: Choice) -> tuple[float, ...]:
    """The best rate by half powers of ten, and half a decade to both sides."""
    index = RATES.index(choice.coarse)
    return tuple(RATES[i] for i in (index - HALF, index, index + HALF) if 0 <= i < len(RATES))


def jobs_of(variant: Variant, count: int, rate: float, names: Sequence[str] | None = None) -> list[Job]:
    """Its runs at a learning rate, over subjects and seeds."""
    rank = variant.config(count)[1]
    config = (variant.method, rank, count)
    more: dict[str, Any] = {"changes": variant.changes, "twist": variant.twist}
    found = [job(config, name, rate, seed, **more) for name in names or tuning_names() for seed in SEEDS]
    return [lengthened(one, variant.steps) for one in found] if variant.steps else found


def lengthened(one: Job, steps: int) -> Job:
    """The same with more steps, measured at the same shares of them."""
    return replace(one, steps=steps, marks=tuple(round(mark * steps / one.steps) for mark in one.marks))


def jobs(tuned: Tuned, counts: Sequence[int] = COUNTS) -> Iterator[Job]:
    """Everything, with the more pictures first."""
    for count in counts:
        for variant in variants(count):
            for rate in rates(variant, count, tuned):
                yield from jobs_of(variant, count, rate)
    if COUNTS[0] in counts:
        yield from all_unmixed(tuned)


def unmixed(target: int, rate: float) -> list[Job]:
    """The tuning runs of a target at a learning rate, without mixtures."""
    count = COUNTS[0]
    config = (SETTLING, target, count)
    return [job(config, name, rate, seed, twist=UNMIXED.twist) for seed in TUNING_SEEDS for name in tuning_names()]


def rates_unmixed(target: int, tuned: Tuned) -> tuple[float, ...]:
    """Those that a target is tried at without mixtures."""
    choice = tuned.get((SETTLING, target, COUNTS[0]))
    return _with_sides(choice) if choice else ()


def all_unmixed(tuned: Tuned) -> Iterator[Job]:
    """Those of every target."""
    for target in TARGETS:
        for rate in rates_unmixed(target, tuned):
            yield from unmixed(target, rate)

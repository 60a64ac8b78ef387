"""Every impossible setting is refused by name, before anything starts."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest

from lora2.config import INITS, OPTIMIZERS, SCHEDULES, TIMESTEP_SAMPLINGS, TrainingConfig
from lora2.util.errors import LoraError

NAN, INF = math.nan, math.inf
COUNTS = ["steps", "batch_size", "accumulation", "target_rank", "settle_cuts", "sync_every", "bytes_per_parameter"]
MAYBE = ["initial_rank", "min_rank", "max_rank", "file_overhead", "layer_overhead"]
POSITIVE = ["learning_rate", "rank_learning_rate"]
NOT_NEGATIVE = ["rank_weight", "entropy_weight", "weight_decay", "clip_norm", "min_snr_gamma", "budget_mb"]
SHARES = ["rank_hold", "rank_rest", "settle_at", "caption_dropout", "warmup"]
WORDS = ["schedule", "optimizer", "timestep_sampling", "init", "on_out_of_memory", "on_bad_step"]
BAD = [
    *((name, value) for name in COUNTS for value in (0, -1, 2.5, NAN, INF, "3", None, True)),
    *((name, value) for name in MAYBE for value in (-1, 2.5, NAN, "3", None)),
    *((name, value) for name in POSITIVE for value in (0, -1e-9, NAN, INF, "1e-4", None)),
    *((name, value) for name in NOT_NEGATIVE for value in (-1e-9, NAN, INF, -INF, "0", None)),
    *(("weight_decay", value) for value in (-0.5, -1.001, 3334, 1e9)),
    *(("settle_keep", value) for value in (0, 0.09, 1.01, -1, NAN, INF, "all", None)),
    *((name, value) for name in SHARES for value in (-0.01, 1.01, NAN, INF, "half", None)),
    *(("q", value) for value in (0, 0.009, 1, 1.5, -0.9, NAN, INF, "0.9")),
    *((name, value) for name in WORDS for value in ("", "Cosine", "linear", None, 3)),
    *(("seed", value) for value in (-1, 2**64, 0.5, NAN, "1", None)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}={v!r}" for n, v in BAD])
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(LoraError, match=rf"^{name} = .*\.$"):
        TrainingConfig(**{name: value})


def test_every_setting_is_covered() -> None:
    assert {name for name, _ in BAD} == {field.name for field in fields(TrainingConfig)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("min_rank", {"min_rank": 9, "target_rank": 8}),
        ("min_rank", {"min_rank": 9, "max_rank": 8, "budget_mb": 1.0}),
        ("initial_rank", {"initial_rank": 17, "max_rank": 16}),
        ("target_rank", {"target_rank": 17, "max_rank": 16}),
    ],
)
def test_settings_that_contradict_each_other(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(LoraError, match=rf"^{name} = .* must not be above "):
        TrainingConfig(**changes)


@pytest.mark.parametrize(("pictures", "decay"), [(1, 5.0), (4, 5.0), (5, 4.8), (24, 1.0), (240, 0.1), (0, 5.0)])
def test_weight_decay_is_chosen_by_the_number_of_pictures(pictures: int, decay: float) -> None:
    """A prior's weight against a mean over n pictures is as 1 / n; for fewer than five it is what was tried with two of them."""
    chosen = TrainingConfig().resolved_for(pictures)
    assert chosen.weight_decay == pytest.approx(decay)
    assert replace(chosen, weight_decay=-1.0) == TrainingConfig(), "nothing else"
    assert chosen.resolved_for(1000) == chosen, "once"
    assert TrainingConfig(learning_rate=0.9).resolved_for(pictures).weight_decay <= 0.5 / 0.9, (
        "no step takes more than half"
    )
    for other in set(OPTIMIZERS) - {"adamw"}:
        assert TrainingConfig(optimizer=other).resolved_for(pictures).weight_decay == 0, "the others have none"
    for told in (0.0, 0.01, 7.0):
        assert TrainingConfig(weight_decay=told).resolved_for(pictures) == TrainingConfig(weight_decay=told)


def test_the_ends_of_every_range_are_allowed() -> None:
    for changes in (
        dict.fromkeys(COUNTS, 1),
        dict.fromkeys(MAYBE, 0),
        dict.fromkeys(NOT_NEGATIVE, 0),
        dict.fromkeys(SHARES, 0),
        dict.fromkeys(SHARES, 1.0),
        {"q": 0.01},
        {"q": 0.9999},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"target_rank": 99, "max_rank": 16, "budget_mb": 1.0},
    ):
        TrainingConfig(**changes)
    for name, choices in (
        ("schedule", SCHEDULES),
        ("optimizer", OPTIMIZERS),
        ("timestep_sampling", TIMESTEP_SAMPLINGS),
        ("init", INITS),
    ):
        for choice in choices:
            assert getattr(TrainingConfig(**{name: choice}), name) == choice


def test_settings_are_plain_values_for_a_file() -> None:
    told = TrainingConfig(steps=7, seed=2**64 - 1)
    assert TrainingConfig(**json.loads(json.dumps(told.to_dict()))) == told


@pytest.mark.parametrize(
    ("steps", "share", "step"),
    [
        (600, 0.5, 300),
        (600, 0.0, 0),
        (600, 1.0, 600),
        (600, 0.999, 599),
        (10, 0.95, 9),
        (1, 0.5, 0),
        (1, 0.9, 0),
        (1, 1.0, 1),
        (3, 0.9, 2),
    ],
)
def test_ranks_settle_before_the_last_step_or_never(steps: int, share: float, step: int) -> None:
    """Below a share of 1 there is always a step left in which they have settled: the target must be met."""
    for cuts in (1, 3, 100):
        steps_of = TrainingConfig(steps=steps, settle_at=share, settle_cuts=cuts).cut_steps
        assert steps_of[-1:] == ((step,) if step < steps else ())
        assert len(steps_of) <= cuts


def test_cuts_are_evenly_spaced_and_each_has_a_step_of_its_own() -> None:
    assert TrainingConfig(steps=600, settle_at=0.45, settle_cuts=3).cut_steps == (90, 180, 270)
    assert TrainingConfig(steps=600, settle_at=0.5, settle_cuts=1).cut_steps == (300,)
    assert TrainingConfig(steps=4, settle_at=0.5, settle_cuts=8).cut_steps == (0, 1, 2)
    assert TrainingConfig(steps=5, settle_at=0.9, settle_cuts=2).cut_steps == (2, 4)
    assert TrainingConfig(steps=600, settle_at=0, settle_cuts=3).cut_steps == (0,)
    assert TrainingConfig(steps=600, settle_at=0.45, settle_cuts=3).adapting_steps == 90
    assert TrainingConfig(steps=600, settle_at=1.0).adapting_steps == 600


# -- sizes ---------------------------------------------------------------------------------------------------

COSTS, LIMITS = [100, 50], [20, 10]


def test_a_target_is_a_number_of_parameters() -> None:
    assert TrainingConfig(target_rank=4).budget(COSTS, LIMITS) == 4 * 150
    assert TrainingConfig(target_rank=15).budget(COSTS, LIMITS) == 15 * 100 + 10 * 50, (
        "a layer has no more than its limit"
    )
    with pytest.raises(LoraError, match=r"target_rank = 21 .* at most 20"):
        TrainingConfig(target_rank=21).budget(COSTS, LIMITS)


def test_megabytes_are_a_number_of_parameters() -> None:
    """10⁶ bytes, less what the file holds beside the factors."""
    told = TrainingConfig(budget_mb=0.0015).with_file_format(overhead=300, bytes_per_parameter=2)
    assert told.budget(COSTS, LIMITS) == (1500 - 300) // 2
    assert told.with_file_format(300, 4).budget(COSTS, LIMITS) == (1500 - 300) // 4


@pytest.mark.parametrize("min_rank", [0, 1, 3])
def test_a_budget_that_cannot_be_met_says_what_can(min_rank: int) -> None:
    """The smallest and the largest size are named, and they are the right ones."""
    least, most = 2 * {0: 50, 1: 100 + 50, 3: 3 * (100 + 50)}[min_rank], 2 * (20 * 100 + 10 * 50)
    short = f"smaller than rank {min_rank} on all 2 layers" if min_rank else "smaller than rank 1 on a single layer"
    for size, word in ((least - 1, short), (most + 2, "more than the 2 layers can hold")):
        told = TrainingConfig(budget_mb=(size + 1000) / 1e6, min_rank=min_rank).with_file_format(
            overhead=1000, bytes_per_parameter=2
        )
        with pytest.raises(LoraError, match=rf"^budget_mb = .* {word}") as refused:
            told.budget(COSTS, LIMITS)
        named = (least if size < least else most) + 1000
        assert f"{named / 1e6:.3f} MB" in str(refused.value)
    for size in (least, most):
        told = TrainingConfig(budget_mb=(size + 1000) / 1e6, min_rank=min_rank).with_file_format(
            overhead=1000, bytes_per_parameter=2
        )
        assert told.budget(COSTS, LIMITS) == size // 2


def test_messages_about_foreign_values_are_short_and_printable() -> None:
    """Settings come out of training states too, which may be a stranger's."""
    large, text = 10**400, "\x1b[31m\u202e"
    for name, value in (("learning_rate", large), ("clip_norm", -large), ("init", "x" * 100_000), ("schedule", text)):
        with pytest.raises(LoraError, match=name) as error:
            TrainingConfig(**{name: value})
        assert len(str(error.value)) < 300
        assert str(error.value).isprintable()

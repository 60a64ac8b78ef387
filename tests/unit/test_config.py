"""Options of a run: every impossible value is refused by name, before anything starts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from lora2.config import TrainingConfig
from lora2.util.errors import LoraError
from lora2.util.knobs import Knob, check_range, knobs_of

NAN, INF = math.nan, math.inf
OPTIONS = knobs_of(TrainingConfig)


def outside(option: Knob) -> list[Any]:
    """Values that an option must refuse: other types, and numbers beside its limits."""
    if isinstance(option.default, str):
        return ["", "Cosine", 3, None]
    width = 1 if isinstance(option.default, int) else 1e-9 * max(1.0, option.high)
    wrong = [option.low - width, option.high + width, NAN, INF, -INF, str(option.default), None, True]
    return [*wrong, 2.5] if isinstance(option.default, int) else wrong


def within(option: Knob) -> list[Any]:
    """Values that an option must accept: all choices, or both limits."""
    return list(option.choices) or [option.low, option.high]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_value_is_refused_by_name(name: str) -> None:
    for value in outside(OPTIONS[name]):
        with pytest.raises(LoraError, match=rf"^{name} = .*\.$"):
            TrainingConfig(**{name: value})


@pytest.mark.parametrize("name", OPTIONS)
def test_the_ends_of_every_range_are_accepted(name: str) -> None:
    for value in within(OPTIONS[name]):
        # Of the options that limit each other, the others leave all of the range.
        free = {"budget_mb": 1.0, "learning_rate": 1e-3, name: value}
        assert getattr(TrainingConfig(**free), name) == value


def test_limits_that_no_declaration_may_lose() -> None:
    """Written out once more: the tests above follow the declarations, whatever they are."""
    ranges = {name: (option.low, option.high) for name, option in OPTIONS.items() if not option.choices}
    for name in (
        "steps",
        "batch_size",
        "accumulation",
        "target_rank",
        "settle_cuts",
        "sync_every",
        "bytes_per_parameter",
    ):
        assert ranges[name][0] == 1
    for name in ("rank_hold", "rank_rest", "settle_at", "caption_dropout", "warmup"):
        assert ranges[name] == (0, 1)
    for name in (
        "rank_weight",
        "entropy_weight",
        "clip_norm",
        "min_snr_gamma",
        "budget_mb",
        "initial_rank",
        "min_rank",
    ):
        assert ranges[name][0] == 0
    assert all(ranges[name][0] > 0 for name in ("learning_rate", "rank_learning_rate"))
    assert ranges["settle_keep"] == (0.1, 1)
    assert ranges["q"] == (0.01, 0.9999)
    assert ranges["seed"] == (0, 2**64 - 1)


@pytest.mark.parametrize("value", [-0.5, -1e-9, 3334.0, 9.0])
def test_weight_decay_between_off_and_automatic_or_against_the_learning_rate_is_refused(value: float) -> None:
    with pytest.raises(LoraError, match=r"^weight_decay = "):
        TrainingConfig(weight_decay=value, learning_rate=0.2)


@pytest.mark.parametrize("value", [NAN, INF, -0.001, 1.001, 10**400])
def test_a_range_refuses_every_number_outside(value: float) -> None:
    with pytest.raises(LoraError, match=r"^x = .* must lie between 0 and 1\.$"):
        check_range("x", value, 0, 1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("min_rank", {"min_rank": 9, "target_rank": 8}),
        ("min_rank", {"min_rank": 9, "max_rank": 8, "budget_mb": 1.0}),
        ("initial_rank", {"initial_rank": 17, "max_rank": 16}),
        ("target_rank", {"target_rank": 17, "max_rank": 16}),
    ],
)
def test_options_that_contradict_each_other(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(LoraError, match=rf"^{name} = .* must not be above "):
        TrainingConfig(**changes)


@pytest.mark.parametrize(("pictures", "decay"), [(1, 5.0), (4, 5.0), (5, 4.8), (24, 1.0), (240, 0.1), (0, 5.0)])
def test_automatic_weight_decay_depends_on_the_number_of_images(pictures: int, decay: float) -> None:
    """24 / n, as the weight of a prior against the mean over n pictures; at most 5, the highest value that was measured."""
    chosen = TrainingConfig().resolved_for(pictures)
    assert chosen.weight_decay == pytest.approx(decay)
    assert replace(chosen, weight_decay=-1.0) == TrainingConfig(), "nothing else"
    assert chosen.resolved_for(1000) == chosen, "once"
    assert TrainingConfig(learning_rate=0.9).resolved_for(pictures).weight_decay <= 0.5 / 0.9, (
        "no step takes more than half"
    )
    for other in set(OPTIONS["optimizer"].choices) - {"adamw"}:
        assert TrainingConfig(optimizer=other).resolved_for(pictures).weight_decay == 0, "the others have none"
    for given in (0.0, 0.01, 7.0):
        assert TrainingConfig(weight_decay=given).resolved_for(pictures) == TrainingConfig(weight_decay=given)


def test_a_config_survives_json() -> None:
    config = TrainingConfig(steps=7, seed=2**64 - 1)
    assert TrainingConfig(**json.loads(json.dumps(config.to_dict()))) == config


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
def test_the_last_cut_comes_before_the_last_step_or_never(steps: int, share: float, step: int) -> None:
    """Below a fraction of 1 at least one step follows the last cut: the target is met."""
    for cuts in (1, 3, 100):
        steps_of = TrainingConfig(steps=steps, settle_at=share, settle_cuts=cuts).cut_steps
        assert steps_of[-1:] == ((step,) if step < steps else ())
        assert len(steps_of) <= cuts


def test_cuts_are_evenly_spaced_and_distinct() -> None:
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


def of_size(megabytes: float, overhead: int, bytes_per_parameter: int = 2, **changes: Any) -> TrainingConfig:
    return TrainingConfig(
        budget_mb=megabytes, file_overhead=overhead, bytes_per_parameter=bytes_per_parameter, **changes
    )


def test_megabytes_are_a_number_of_parameters() -> None:
    """10⁶ bytes, less the bytes of the file besides the factors."""
    assert of_size(0.0015, 300).budget(COSTS, LIMITS) == (1500 - 300) // 2
    assert of_size(0.0015, 300, 4).budget(COSTS, LIMITS) == (1500 - 300) // 4


@pytest.mark.parametrize("min_rank", [0, 1, 3])
def test_the_message_about_an_impossible_budget_names_a_possible_one(min_rank: int) -> None:
    """The smallest and the largest size are named, and they are the right ones."""
    least, most = 2 * {0: 50, 1: 100 + 50, 3: 3 * (100 + 50)}[min_rank], 2 * (20 * 100 + 10 * 50)
    short = f"smaller than rank {min_rank} on all 2 layers" if min_rank else "smaller than rank 1 on a single layer"
    for size, message in ((least - 1, short), (most + 2, "more than the 2 layers can hold")):
        with pytest.raises(LoraError, match=rf"^budget_mb = .* {message}") as refused:
            of_size((size + 1000) / 1e6, 1000, min_rank=min_rank).budget(COSTS, LIMITS)
        named = (least if size < least else most) + 1000
        assert f"{named / 1e6:.3f} MB" in str(refused.value)
    for size in (least, most):
        assert of_size((size + 1000) / 1e6, 1000, min_rank=min_rank).budget(COSTS, LIMITS) == size // 2


def test_messages_about_foreign_values_are_short_and_printable() -> None:
    """Options are read from training states too, which may come from anyone."""
    large, text = 10**400, "\x1b[31m\u202e"
    for name, value in (("learning_rate", large), ("clip_norm", -large), ("init", "x" * 100_000), ("schedule", text)):
        with pytest.raises(LoraError, match=name) as error:
            TrainingConfig(**{name: value})
        assert len(str(error.value)) < 300
        assert str(error.value).isprintable()

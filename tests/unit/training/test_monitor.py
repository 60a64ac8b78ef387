"""Steps that are no numbers, stopped at or skipped, with their layers named; and a loss that explodes, said, never guessed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_trainer import Toy, hooks, state, toy_of, trainer_of

from lora2.training.monitor import (
    EXPLOSION_RATIO,
    WINDOW,
    Diverged,
    LossTracker,
    describe_layers,
    layers_with_nonfinite_gradient,
)
from lora2.training.trainer import Trainer


def spoil(trainer: Trainer, steps: Sequence[int], layer: str | None = None) -> None:
    """The loss of these steps (counted from 1) becomes NaN; or only the gradient that reaches one layer does."""
    toy = toy_of(trainer)
    ordinary = toy.denoise

    def denoise(noisy: Tensor, sigma: Tensor, captions: Sequence[int]) -> Tensor:
        bad = trainer.issued + 1 in steps
        handle = None
        if (
            bad and layer is not None
        ):  # NaN behind this layer's input stays in its own factors: the layer is the first one
            handle = toy.layers()[layer].register_forward_hook(
                lambda _m, _a, out: out.register_hook(lambda g: g * math.nan) and None
            )
        predicted = ordinary(noisy, sigma, captions)
        if handle is not None:
            handle.remove()
        return predicted * math.nan if bad and layer is None else predicted

    toy.denoise = denoise  # type: ignore[method-assign]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_layer_of_a_bad_gradient_is_named(compute: torch.dtype) -> None:
    """Of five layers only the first one's gradient is spoiled: the other four are not accused."""
    trainer = trainer_of(compute=compute)
    spoil(trainer, [4], "into")
    with pytest.raises(
        Diverged, match=r"^The gradients are not finite at step 4 \(in into\), and the step was not applied"
    ):
        trainer.run()


def test_all_layers_and_none_are_said_shortly() -> None:
    trainer = trainer_of()
    spoil(trainer, [2])
    with pytest.raises(
        Diverged, match=r"^The loss became nan at step 2 \(in all 5 layers\), and the step was not applied: lower"
    ):
        trainer.run()
    assert describe_layers([], 5) == "in no layer's gradient"
    assert describe_layers(["a", "b", "c", "d"], 9) == "in a, b, c and 1 more of 9 layers"
    assert describe_layers(["a"], 1) == "in a"
    assert layers_with_nonfinite_gradient(["a", "b"], [1.0, math.inf, 2.0, 3.0]) == ["a"]
    assert layers_with_nonfinite_gradient(["a", "b"], []) == []


def test_a_skipped_step_changes_nothing_and_the_run_goes_on() -> None:
    """The state after it is the state before it, the schedule and the draws go on, and it is counted and said."""
    words: list[str] = []
    trainer = trainer_of(steps=8, settle_at=0.5, on_bad_step="skip", sync_every=99)
    trainer.monitor.notify = words.append
    spoil(trainer, [3, 6, 7])
    states = [state(trainer)]
    trainer.run(lambda _: states.append(state(trainer)))
    progress = trainer.progress
    assert progress.skipped == [3, 6, 7]
    assert [math.isnan(loss) for loss in progress.losses] == [n in (3, 6, 7) for n in range(1, 9)]
    assert (progress.step, progress.applied) == (8, 5)
    for step in range(1, 9):
        same = all(torch.equal(a, b) for a, b in zip(states[step - 1], states[step], strict=True))
        if step != 4 + 1:  # before the fifth step the ranks settle: other arrays
            assert same == (step in (3, 6, 7)), step
    assert words == [
        "The loss became nan at step 3 (in all 5 layers), and the step was skipped.",
        "The loss became nan at step 6 (in all 5 layers), and the step was skipped.",
    ], "the second of two in a row is counted, not said"
    assert all(bool(p.isfinite().all()) for p in trainer.network.parameters())
    assert hooks(toy_of(trainer)) == 0


@pytest.mark.parametrize(("bad", "stopped_at", "words"), [
    (range(5, 99), 14, "10 steps were skipped in all, which is too many"),
    (range(2, 40, 2), 22, "11 steps were skipped in all, which is too many"),
    (range(1, 99), 10, "10 steps were skipped in all, which is too many"),
])  # fmt: skip
def test_too_many_skipped_steps_stop_the_run(bad: Any, stopped_at: int, words: str) -> None:
    """Ten in a row, or more than a tenth of the planned steps (of 60: more than ten)."""
    trainer = trainer_of(steps=60, on_bad_step="skip", settle_at=1.0)
    spoil(trainer, bad)
    with pytest.raises(Diverged, match=words):
        trainer.run()
    assert trainer.progress.step == stopped_at


@pytest.mark.parametrize(("first", "then", "stopped_at"), [
    (range(5, 99), range(15, 24), 60),
    (range(5, 99), range(15, 99), 24),
    (range(2, 40, 2), range(24, 44, 2), 60),
    (range(2, 40, 2), range(24, 99, 2), 44),
])  # fmt: skip
def test_a_run_that_was_stopped_for_too_many_can_go_on(first: Any, then: Any, stopped_at: int) -> None:
    """The rule counts anew: nine more in a row or ten more in all pass, one more stops it again. All stay listed."""
    trainer, again = (trainer_of(steps=60, on_bad_step="skip", settle_at=1.0) for _ in range(2))
    spoil(trainer, first)
    with pytest.raises(Diverged, match="which is too many"):
        trainer.run()
    again.restore(trainer.state())
    spoil(again, then)
    if stopped_at < 60:
        with pytest.raises(
            Diverged, match=f"{2 * len(trainer.progress.skipped)} steps were skipped in all, which is too many"
        ):
            again.run()
    else:
        again.run()
        assert again.progress.skipped == [*trainer.progress.skipped, *then]
    assert again.progress.step == stopped_at


def test_a_run_in_which_no_step_could_be_taken_is_no_success() -> None:
    trainer = trainer_of(steps=4, on_bad_step="skip")
    spoil(trainer, range(1, 5))
    with pytest.raises(Diverged, match="none of the 4 steps could be applied"):
        trainer.run()
    assert trainer.progress.applied == 0


def test_factors_that_are_no_numbers_are_named_too() -> None:
    trainer = trainer_of(steps=4)
    trainer.network.adapters[1].up.data[0, 0] = math.inf
    with pytest.raises(Diverged, match=r"the factors are not finite in q, and the step was not applied"):
        trainer.run()


# -- a loss that explodes ------------------------------------------------------------------------------------


def curve(seed: int, sigma: float, steps: int) -> list[float]:
    """Losses that differ from step to step by a log-normal law, around a course that falls to a half."""
    rng = random.Random(seed)
    return [math.exp(rng.gauss(0, sigma)) * (0.5 + 0.5 * math.exp(-n / 200)) for n in range(steps)]


def largest(losses: Sequence[float]) -> float:
    tracker = LossTracker()
    return max(tracker.ratio(loss) for loss in losses)


def test_noise_never_counts_as_an_explosion() -> None:
    """σ = 1.5: one loss in twenty is twenty times the median or a twentieth of it."""
    assert max(largest(curve(seed, 1.5, 2000)) for seed in range(100)) < 0.3 * EXPLOSION_RATIO


def test_an_explosion_is_said_once_and_within_a_window() -> None:
    tracker, said = LossTracker(), []
    losses = curve(1, 1.0, 200)
    for step, loss in enumerate([*losses, *(loss * 100 for loss in losses)], 1):
        if words := tracker.update(step, loss):
            said.append((step, words))
    ((step, words),) = said
    assert 200 < step <= 200 + WINDOW
    assert words.startswith("The loss has grown: its median over the last 50 steps")


def test_a_learning_rate_that_is_far_too_high_is_noticed_and_a_good_one_is_not() -> None:
    """AdamW on the small denoiser at a good rate and at one that is 90 times too high; weight decay would hold even that."""
    said: dict[float, list[str]] = {}
    for rate in (1e-2, 0.9):
        said[rate] = []
        changes: dict[str, Any] = {"clip_norm": 0.0, "settle_at": 1.0, "schedule": "constant", "weight_decay": 0.0}
        trainer = trainer_of(Toy(), steps=200, learning_rate=rate, **changes)
        trainer.monitor.notify = said[rate].append
        trainer.run()
    assert said[1e-2] == []
    assert len(said[0.9]) == 1

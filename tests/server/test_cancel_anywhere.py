"""A cancel at every kind of moment: before the first step, in one, settling, drawing, saving. The long version: make soak."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cancelling import STEPS, Cancelled, cancel, figures, next_prompt_is_as_ever, whole
from server_graphs import painted, picture

from dev.server import ComfyServer

MOMENTS = [("start", 0), ("step", random.Random(5).randrange(STEPS)), ("settling", 0), ("preview", 0), ("saving", 0)]


@pytest.fixture(scope="module")
def reference(server: ComfyServer) -> np.ndarray:
    """The picture of another workflow; and first a cancelled run, for what Python, torch and ComfyUI keep for good."""
    cancel(server, "step", 2, "warm/mug")
    return painted(server, picture("sks mug"))


@pytest.mark.parametrize(("point", "skip"), MOMENTS, ids=[point for point, _ in MOMENTS])
def test_a_cancel_at_any_moment(point: str, skip: int, server: ComfyServer, reference: np.ndarray) -> None:
    """Free within a step, what was learned is saved, memory is given back, and the next prompt is as ever."""
    before = figures(server)
    seen = cancel(server, point, skip, f"cancel_{point}/mug", seed=2)
    expect(seen, point, skip)
    whole(server)
    next_prompt_is_as_ever(server, reference, MOMENTS.index((point, skip)))
    after = figures(server)  # now: ComfyUI keeps the results of one prompt until the next
    assert (after["hooks"], after["forwards"], after["adapters"]) == (before["hooks"], before["forwards"], 0)
    assert not after["training"]
    assert after["tensors"] == before["tensors"]


def expect(seen: Cancelled, point: str, skip: int) -> None:
    """How a run ends that was cancelled there: within a step."""
    steps = {"start": 0, "step": skip, "settling": STEPS // 2, "preview": 1, "saving": STEPS}[point]
    assert seen.files == bool(steps), seen
    assert seen.steps in (steps, steps + 1), seen
    if point != "saving":
        assert seen.ended == "interrupted"

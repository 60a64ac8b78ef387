"""Cancels at random moments, from the API and from the web page: `make soak`."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cancelling import POINTS, STEPS, Cancelled, cancel, figures, next_prompt_is_as_ever, whole
from probing import probed
from recording import record
from test_cancel import painted, picture

from dev.browser import frontend, quiet_settings
from dev.server import ComfyServer

CANCELS = 40
BY_THE_PAGE = 4
"""One cancel in so many is the button of the page."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ComfyServer]:
    """A server of its own: what happened to others before does not count."""
    with probed(tmp_path / "comfy") as running:
        yield running


def moments(count: int, seed: int) -> Iterator[tuple[str, int]]:
    """Points with so many visits to let pass, every other time, and delays in hundredths of a second."""
    rng = random.Random(seed)
    visits = {"step": STEPS, "preview": 3, "sync": 1}
    for number in range(count):
        point = POINTS[number // 2 % len(POINTS)] if number % 2 else ""
        yield point, rng.randrange(visits.get(point, 1)) if point else rng.randrange(300)


def test_cancels_at_random_moments(server: ComfyServer) -> None:
    """Each stops, saves what was learned, gives memory back; the next prompt gives the picture that it gave before."""
    cancel(server, "step", 2, "warm/mug")
    reference = painted(server, picture("sks mug"))
    before, seen = figures(server), []
    for number, (point, skip) in enumerate(moments(CANCELS, 1)):
        seen.append(cancel(server, point, skip, f"cancel/mug_{number}", seed=number + 2))
        check(seen[-1])
        next_prompt_is_as_ever(server, reference, number)
        after = figures(server)
        assert (after["hooks"], after["forwards"], after["adapters"]) == (before["hooks"], before["forwards"], 0)
        assert after["tensors"] == before["tensors"], seen[-1]
        assert after["threads"] <= before["threads"] + 1
    whole(server)
    record("cancels", {
        "cancels": len(seen), "stopped early": sum(s.ended == "interrupted" for s in seen),
        "kept a LoRA": sum(s.files for s in seen), "median seconds to the end": round(statistics.median(s.seconds for s in seen), 2),
        "longest seconds to the end": round(max(s.seconds for s in seen), 2),
    })  # fmt: skip


def check(seen: Cancelled) -> None:
    """A file exactly where a step was done; soon, also on a busy machine."""
    assert seen.files == bool(seen.steps), seen
    assert seen.seconds < 10, seen

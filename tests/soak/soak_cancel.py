"""Cancels at random moments, from the API and from the web page: `make soak`."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cancelling import (
    POINTS,
    RUN,
    STEPS,
    Cancelled,
    cancel,
    figures,
    loras,
    next_prompt_is_as_ever,
    reached,
    until,
    whole,
)
from probed_server import probed
from recording import record
from server_graphs import painted, picture

from dev.browser import frontend, open_workflow, queue, quiet_settings, set_values, wait_for_end
from dev.demo import TRAIN, adapt, template
from dev.server import ComfyServer

CANCELS, FROM_THE_PAGE = 40, 12


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
        "kept a LoRA": sum(s.files for s in seen),
        "median seconds to the end": round(statistics.median(s.seconds for s in seen), 2),
        "longest seconds to the end": round(max(s.seconds for s in seen), 2),
    })  # fmt: skip


def check(seen: Cancelled) -> None:
    """A file exactly where a step was done; soon, also on a busy machine."""
    assert seen.files == bool(seen.steps), seen


def test_cancels_from_the_web_page(server: ComfyServer) -> None:
    """The button of the real frontend, at the same points and at random moments."""
    quiet_settings(server.base)
    ended, seconds = [], []
    with frontend(server.url) as page:
        workflow, _ = adapt(template(TRAIN), server.object_info())
        open_workflow(page, workflow, TRAIN)
        for number, (point, skip) in enumerate(moments(FROM_THE_PAGE, 2)):
            before = loras(server)
            told = {**RUN, "steps": STEPS, "save_name": f"page/mug_{number}", "seed": number + 2, "batch_size": 1}
            set_values(page, "LoRA2_TrainAdaptiveLora", told)
            if point:
                server.post("/probe/arm", {"point": point, "skip": skip})
            queue(page)
            if point:
                until(lambda: reached(server))
            else:
                page.wait_for_function("app.graph.nodes.find(n => n.progress > 0)", timeout=60_000)
                page.wait_for_timeout(skip)
            pressed = time.monotonic()
            page.get_by_label("Cancel current run").click()
            ended.append(wait_for_end(page, 60))
            seconds.append(time.monotonic() - pressed)
            assert ended[-1] in ("execution_interrupted", "execution_success")
            assert len(loras(server) - before) == (point != "start"), point
        set_values(page, "LoRA2_TrainAdaptiveLora", {"steps": 1, "save_name": "page/last"})
        queue(page)
        assert wait_for_end(page, 60) == "execution_success"
    whole(server)
    record("cancels from the page", {
        "cancels": len(ended), "stopped early": ended.count("execution_interrupted"),
        "median seconds to the end": round(statistics.median(seconds), 2), "longest seconds to the end": round(max(seconds), 2),
    })  # fmt: skip

"""Shared by the tests that cancel a run at a chosen or random moment of a real server."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from server_graphs import painted, picture, training

from dev.server import ComfyServer, PromptError

POINTS = ("start", "step", "sync", "settling", "preview", "factors", "saving", "after")
"""Where tests/support/probe can hold training until the cancel has arrived."""

STEPS = 6
MIDDLE = "*input_blocks*\n*output_blocks*"
"""To exclude, so that a step is short."""

RUN = {
    "target_rank": 2, "initial_rank": 4, "learning_rate": 1e-3, "settle_at": 0.5, "settle_cuts": 1, "rank_hold": 0.0,
    "exclude": MIDDLE,
}  # fmt: skip


@dataclass
class Cancelled:
    """What was seen of one cancel: where it came, seconds until the server was free, steps that were done, files saved."""

    point: str
    seconds: float
    steps: int
    files: int
    ended: str


def loras(server: ComfyServer) -> set[Path]:
    """Every file in the server's LoRA folder."""
    return {p for p in (server.base / "models" / "loras").rglob("*") if p.is_file()}


def said(server: ComfyServer, since: int) -> str:
    """What the log says since a length."""
    return server.logs()[since:]


def cancel(
    server: ComfyServer, point: str, skip: int, name: str, press: Callable[[], Any] | None = None, seed: int = 1
) -> Cancelled:
    """Run training, cancel it at a point (or after `skip` hundredths of a second from its first step), and check what is left.

    press: cancels; POST /interrupt if not given. Stopped within a step, the LoRA so far is saved under a new name and whole.
    """
    before, log = loras(server), len(server.logs())
    if point:
        server.post("/probe/arm", {"point": point, "skip": skip})
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(server.run, training(STEPS, **(RUN | {"save_name": name, "seed": seed})))
        until(lambda: run.done() or (reached(server) if point else f"{STEPS} steps." in said(server, log)))
        if not point:
            time.sleep(skip / 100)
        start = time.monotonic()
        (press or server.interrupt)()
        ended = "success"
        try:
            run.result(60)
        except PromptError as error:
            ended = "interrupted" if "interrupted at node" in str(error) else str(error)
        seconds = time.monotonic() - start
    new, words = loras(server) - before, said(server, log)
    stopped = re.findall(rf"Stopped after (\d+) of {STEPS} steps; the LoRA so far is saved as (\S+)\.", words)
    saved = re.findall(r"LoRA²: Saved as (\S+)\.", words)
    files = [name_ for _, name_ in stopped] + saved
    assert ended in ("success", "interrupted"), ended
    assert {p.relative_to(server.base / "models" / "loras").as_posix() for p in new} == set(files), (new, files)
    steps = int(stopped[0][0]) if stopped else (STEPS if saved else 0)
    return Cancelled(point or "at random", seconds, steps, len(new), ended)


def whole(server: ComfyServer) -> None:
    """Every file in the LoRA folder reads, and no temporary file is left."""
    from training import pack

    for path in loras(server):
        assert path.suffix == ".safetensors", path
        pack("lora2.files.document").read(path)


def next_prompt_is_as_ever(server: ComfyServer, reference: np.ndarray, number: int) -> None:
    """Another workflow, stock nodes only: the same picture as before; spaces make ComfyUI sample again."""
    assert np.array_equal(painted(server, picture("sks mug" + " " * (number % 60 + 1))), reference)


def figures(server: ComfyServer) -> dict[str, Any]:
    """Of the server's process, once its worker is idle: memory, threads, open files, hooks, tensors."""
    until(lambda: server.get("/prompt")["exec_info"]["queue_remaining"] == 0)
    return dict(server.get("/probe/figures"))


def reached(server: ComfyServer) -> bool:
    """Whether training waits at the point that was armed."""
    with contextlib.suppress(OSError):
        return bool(server.get("/probe/reached")["reached"])
    return False


def until(condition: Callable[[], bool], timeout: float = 60) -> None:
    """Wait for something that must happen."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the server took too long"
        time.sleep(0.01)

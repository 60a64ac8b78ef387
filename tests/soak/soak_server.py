"""One server for a long time: 2,000 steps, and 50 cycles of training, loading and sampling. `make soak`."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cancelling import figures, next_prompt_is_as_ever
from probed_server import probed
from recording import record
from server_graphs import node, painted, picture, training

from dev.server import ComfyServer

LONG = int(os.environ.get("LORA2_SOAK_STEPS", "2000"))
CYCLES = int(os.environ.get("LORA2_SOAK_CYCLES", "50"))
WARM = 5
"""Cycles until caches, allocators and the interpreter have what they keep for good."""

DRIFT = 500_000
"""Bytes of resident memory that a cycle may add: the slope over all cycles after the warm ones.

The allocators of C, Python and torch hand out pages of many kinds, so resident memory wanders by some MB: three prompts of stock
nodes alone drift by 200 to 300 KB. What is kept of a cycle by mistake is at least its adapter, 8 layers at rank 8 or more with
their gradients and moments: over a MB; and tensors are counted to the byte beside it.
"""

LONG_DRIFT = 40_000_000
"""Bytes that resident memory may grow over the long run: what a step kept by mistake would be half a MB, 2,000 times."""

SMALL = {"target_rank": 2, "initial_rank": 8, "exclude": "*input_blocks*\n*output_blocks*", "learning_rate": 1e-3}
WHOLE = {"strength_model": 30.0, "strength_clip": 1.0, "share": 1.0, "max_rank": 0, "megabytes": 0.0}
STEADY = ("threads", "hooks", "forwards", "adapters", "tensors")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ComfyServer]:
    """A server of its own: what happened to others before does not count."""
    with probed(tmp_path / "comfy") as running:
        yield running


def fingerprint(server: ComfyServer, number: int) -> dict[str, Any]:
    """The base model's weights and hooks, as the server has them in memory."""
    prompt = {"1": picture("")["1"], "9": node("LoRA2Test_Fingerprint", model=["1", 0], number=number)}
    (text,) = server.run(prompt)["outputs"]["9"]["text"]
    return dict(json.loads(text))


def temporary(server: ComfyServer) -> list[str]:
    """Files that no run may leave: ours that are half written, and anything in the models folder but LoRAs."""
    links = (server.base / "models" / "checkpoints").iterdir()
    known = {p.name for p in links}
    return [
        p.name
        for p in (server.base / "models").rglob("*")
        if p.is_file() and p.suffix != ".safetensors" and p.name not in known
    ]


def slope(values: Sequence[int]) -> float:
    """Bytes per cycle: the median of all pairs' slopes (Theil-Sen), which a single jump does not move."""
    pairs = [(b - a) / (j - i) for i, a in enumerate(values) for j, b in enumerate(values) if j > i]
    return statistics.median(pairs)


def test_cycles_of_training_loading_and_sampling(server: ComfyServer) -> None:
    """Nothing grows, the base model is bit-identical, and another workflow's picture never changes."""
    reference, base = painted(server, picture("sks mug")), fingerprint(server, 0)
    seen: list[dict[str, Any]] = []
    for number in range(1, CYCLES + 1):
        name = f"cycle/mug_{number}"
        server.run(training(6, seed=number, save_name=name, **SMALL), timeout=600)
        lora = {"model": ["1", 0], "lora_name": f"{name}_00001.safetensors", **WHOLE}
        with_lora = painted(server, picture("sks mug", node("LoRA2_LoadAdaptiveLora", **lora)))
        assert not np.array_equal(with_lora, reference)
        next_prompt_is_as_ever(server, reference, number)
        seen.append(figures(server))
    assert fingerprint(server, 1) == base
    steady = seen[WARM:]
    for name in STEADY:
        assert {f[name] for f in steady} == {steady[0][name]}, name
    assert max(f["files"] for f in steady) <= steady[0]["files"] + 3, "sockets of requests that end come and go"
    drift = slope([f["rss"] for f in steady])
    record("cycles", {
        "cycles": CYCLES, "KB of memory per cycle": round(drift / 1000, 1), "MB at the end": round(seen[-1]["rss"] / 1e6),
        "MB after the warm-up": round(steady[0]["rss"] / 1e6), "threads": seen[-1]["threads"], "hooks": base["hooks"],
        "temporary files": len(temporary(server)),
    })  # fmt: skip
    assert drift < DRIFT
    assert temporary(server) == []


def test_a_long_run(server: ComfyServer) -> None:
    """2,000 steps with ranks that move to the end; memory is looked at while it runs."""
    reference, base = painted(server, picture("sks mug")), fingerprint(server, 0)
    server.run(training(20, save_name="warm/mug", settle_at=1.0, **SMALL))
    next_prompt_is_as_ever(server, reference, 1)
    before = figures(server)
    samples: list[int] = []
    pid = server._process.pid if server._process else 0
    page = os.sysconf("SC_PAGE_SIZE")
    original = server._note_binary

    def look(data: bytes) -> None:  # a live picture: at its pace, look at the process
        samples.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page)
        original(data)

    server._note_binary = look  # type: ignore[method-assign]
    entry = server.run(training(LONG, save_name="long/mug", settle_at=1.0, **SMALL), timeout=6 * 3600)
    server._note_binary = original  # type: ignore[method-assign]
    assert entry["status"]["status_str"] == "success"
    next_prompt_is_as_ever(server, reference, 2)
    after = figures(server)
    assert fingerprint(server, 1) == base
    for name in STEADY:
        assert after[name] == before[name], name
    steady = samples[len(samples) // 10 :]
    thinned = steady[:: max(1, len(steady) // 200)]
    grown = slope(thinned) * len(thinned)
    record("long run", {
        "steps": LONG, "MB of memory over all steps": round(grown / 1e6, 1), "looked at": len(samples),
        "MB in the middle": round(statistics.median(steady) / 1e6), "threads": after["threads"],
    })  # fmt: skip
    assert grown < LONG_DRIFT
    assert temporary(server) == []

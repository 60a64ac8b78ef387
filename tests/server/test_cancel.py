"""A long run in the real server, cancelled: what was learned is kept and said, and the server goes on as if nothing was."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from probed_server import PICTURES
from server_graphs import NODE, lora_list, node, painted, picture, progress, training, until
from training import pack

from dev.server import ComfyServer, PromptError


@pytest.fixture(scope="module")
def cancelled(server: ComfyServer) -> dict[str, Any]:
    """A run of 100,000 steps, cancelled once it is on its way, and what was seen of it."""
    seen: dict[str, Any] = {"before": painted(server, picture("sks mug"))}
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(server.run, training(100_000))
        until(lambda: run.done() or (len(progress(server)) >= 3 and len(server.previews) >= 3), 60)
        assert not run.done(), run.exception()
        server.interrupt()
        seen["step"] = progress(server)[-1]["value"]
        with pytest.raises(PromptError, match=rf"interrupted at node 4 \({NODE}\)"):
            run.result(60)
    seen |= {"progress": progress(server), "previews": server.previews}
    return seen | {"texts": server.texts, "loras": lora_list(server)}


def test_it_stops_within_a_step(server: ComfyServer, cancelled: dict[str, Any]) -> None:
    document = pack("lora2.files.document").read(server.base / "models/loras/cancel/mug_00001.safetensors")
    # The step that ran when the cancel came, and one whose report was on its way.
    assert document.info["training"]["steps_done"] <= cancelled["step"] + 2


def test_what_was_learned_is_saved_and_said(server: ComfyServer, cancelled: dict[str, Any]) -> None:
    document = pack("lora2.files.document").read(server.base / "models/loras/cancel/mug_00001.safetensors")
    done = document.info["training"]["steps_done"]
    assert done >= 2
    words = (
        f"Stopped after {done} of 100000 steps; the LoRA so far is saved as cancel/mug_00001.safetensors. "
        "To resume, choose 'newest state' in continue_from."
    )
    assert cancelled["texts"][-1] == words
    assert words in server.logs()
    assert len(document.layers) == 8
    assert any(factors.up.count_nonzero() for factors in document.layers.values())
    folder = server.base / "models/loras/cancel"
    assert [p.name for p in folder.iterdir()] == ["mug_00001.safetensors"]


def test_it_is_in_the_list_of_loras_at_once(cancelled: dict[str, Any]) -> None:
    assert "cancel/mug_00001.safetensors" in cancelled["loras"]


def test_progress_and_live_pictures_arrived(cancelled: dict[str, Any]) -> None:
    steps = [p["value"] for p in cancelled["progress"]]
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert {p["max"] for p in cancelled["progress"]} == {100_000}
    assert cancelled["texts"][0] == f"Training 8 layers on {PICTURES} pictures, 100000 steps."
    for data in cancelled["previews"]:
        live = Image.open(io.BytesIO(data))
        live.load()
        assert (live.format, live.mode) == ("JPEG", "RGB")
        assert live.width >= 512
        assert np.asarray(live).std() > 5, "an empty picture"


def test_the_next_prompt_runs_on_the_same_model(server: ComfyServer, cancelled: dict[str, Any]) -> None:
    """The trailing space makes ComfyUI sample again instead of remembering; the text means the same."""
    assert np.array_equal(painted(server, picture("sks mug ")), cancelled["before"])


def test_the_kept_lora_loads_with_both_loaders(server: ComfyServer, cancelled: dict[str, Any]) -> None:
    inputs = {"model": ["1", 0], "lora_name": "cancel/mug_00001.safetensors", "strength_model": 30.0}
    theirs = painted(server, picture("sks mug", node("LoraLoaderModelOnly", **inputs)))
    ours = painted(server, picture("sks mug", node(
        "LoRA2_LoadAdaptiveLora", **inputs, strength_clip=1.0, share=1.0, max_rank=0, megabytes=0.0,
    )))  # fmt: skip
    assert server.texts == ["8 of 8 layers loaded."]
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, cancelled["before"])


def test_a_second_run_ends_and_has_a_name_of_its_own(server: ComfyServer, cancelled: dict[str, Any]) -> None:
    kept = (server.base / "models/loras/cancel/mug_00001.safetensors").read_bytes()
    entry = server.run(training(5))
    assert entry["status"]["status_str"] == "success"
    assert server.texts[-1] == "Saved as cancel/mug_00002.safetensors."
    assert [p["value"] for p in progress(server) if p["max"] == 5][-1] == 5
    assert {"cancel/mug_00001.safetensors", "cancel/mug_00002.safetensors"} <= set(lora_list(server))
    assert (server.base / "models/loras/cancel/mug_00001.safetensors").read_bytes() == kept
    shown = entry["outputs"]["4"]["images"][0]
    assert (server.base / "temp" / shown["filename"]).stat().st_size > 0
    assert np.array_equal(painted(server, picture("sks mug  ")), cancelled["before"])


def test_what_is_wrong_is_said_at_the_node(server: ComfyServer) -> None:
    """The sentence that the library raises is what the person at the graph reads."""
    with pytest.raises(PromptError, match=rf"^node 4 \({NODE}\): lora2.LoraError: save_name '../mug' points outside"):
        server.run(training(5, save_name="../mug"))
    assert not (server.base / "models" / "mug_00001.safetensors").exists()

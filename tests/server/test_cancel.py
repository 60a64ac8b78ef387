"""A long run in the real server, cancelled: what was learned is kept and said, and the server goes on as if nothing was."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training import pack

from dev.assets import CHECKPOINT
from dev.server import ComfyServer, PromptError

Graph = dict[str, Any]
NODE = "LoRA2_TrainAdaptiveLora"


def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def training(steps: int, **more: Any) -> Graph:
    """The small checkpoint learns the pictures in input/mug with the attention of its middle block."""
    choice = {"exclude": "*input_blocks*\n*output_blocks*", "target_rank": 4, "save_name": "cancel/mug", "seed": 1}
    data = {"model": ["1", 0], "latents": ["3", 0], "conditioning": ["3", 1]}
    values = {"learning_rate": 1e-3, "batch_size": 1, "budget_mb": 0.0, "layers": "attention"}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "2": node("LoadImageTextDataSetFromFolder", folder="mug"),
        "3": node("MakeTrainingDataset", images=["2", 0], texts=["2", 1], vae=["1", 2], clip=["1", 1]),
        "4": node(NODE, steps=steps, **(data | values | choice | more)),
        "5": node("LossGraphNode", loss=["4", 3], filename_prefix="loss"),
    }


def picture(text: str, lora: Graph | None = None) -> Graph:
    """A picture by stock nodes; with another node between the checkpoint and the sampler if given."""
    model = ["7", 0] if lora else ["1", 0]
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "2": node("CLIPTextEncode", clip=["1", 1], text=text),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": node(
            "KSampler", model=model, positive=["2", 0], negative=["3", 0], latent_image=["4", 0], seed=1, steps=2,
            cfg=3.0, denoise=1.0, sampler_name="euler", scheduler="normal",
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "8": node("SaveImage", images=["6", 0], filename_prefix="cancel"),
        **({"7": lora} if lora else {}),
    }  # fmt: skip


def painted(server: ComfyServer, prompt: Graph) -> np.ndarray:
    shown = server.run(prompt)["outputs"]["8"]["images"][0]
    return np.asarray(Image.open(server.base / "output" / shown["filename"]))


def lora_list(server: ComfyServer) -> list[str]:
    """What the stock loader offers now."""
    kind, *more = server.object_info("LoraLoader")["input"]["required"]["lora_name"]
    return kind if isinstance(kind, list) else more[0]["options"]


def until(condition: Any, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the server took too long"
        time.sleep(0.02)


def progress(server: ComfyServer) -> list[dict[str, Any]]:
    """The progress of the training node so far."""
    return [e["data"] for e in server.events if e["type"] == "progress" and e["data"].get("node") == "4"]


@pytest.fixture(scope="module")
def cancelled(server: ComfyServer) -> dict[str, Any]:
    """A run of 100,000 steps, cancelled once it is on its way, and what was seen of it."""
    seen: dict[str, Any] = {"before": painted(server, picture("sks mug"))}
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(server.run, training(100_000))
        until(lambda: run.done() or (len(progress(server)) >= 3 and len(server.previews) >= 3), 60)
        assert not run.done(), run.exception()
        server.interrupt()
        start = time.monotonic()
        with pytest.raises(PromptError, match=rf"interrupted at node 4 \({NODE}\)"):
            run.result(60)
    seen |= {"seconds": time.monotonic() - start, "progress": progress(server), "previews": server.previews}
    return seen | {"texts": server.texts, "loras": lora_list(server)}


def test_it_stops_within_a_step(server: ComfyServer, cancelled: dict[str, Any]) -> None:
    document = pack("lora2.files.document").read(server.base / "models/loras/cancel/mug_00001.safetensors")
    trained = document.info["training"]
    step = trained["seconds"] / trained["steps_done"]
    assert cancelled["seconds"] < 2 * step + 2.0, "a step, and what saving and the way there and back take"


def test_what_was_learned_is_saved_and_said(server: ComfyServer, cancelled: dict[str, Any]) -> None:
    document = pack("lora2.files.document").read(server.base / "models/loras/cancel/mug_00001.safetensors")
    done = document.info["training"]["steps_done"]
    assert done >= 2
    words = (
        f"Stopped after {done} of 100000 steps; what was learned is saved as cancel/mug_00001.safetensors. "
        "To go on, choose 'newest state' in continue_from."
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
    assert cancelled["texts"][0] == "Training 8 layers on 12 pictures, 100000 steps."
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

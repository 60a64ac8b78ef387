"""The pack inside a real server, and the tools that drive it."""

from __future__ import annotations

from typing import Any

import pytest

from dev.assets import CHECKPOINT
from dev.server import PACK, ComfyServer, PromptError


def picture_prompt(steps: int = 2) -> dict[str, Any]:
    """Text to a 64 x 64 picture through stock nodes only."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a photo of sks mug"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": 1,
                "steps": steps,
                "cfg": 3.0,
                "denoise": 1.0,
                "sampler_name": "euler",
                "scheduler": "normal",
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "stock"}},
    }


def test_pack_is_loaded_without_an_error(server: ComfyServer) -> None:
    """ComfyUI lists what failed to import; the pack must not be there."""
    log = server.logs()
    assert "IMPORT FAILED" not in "\n".join(line for line in log.splitlines() if PACK in line)
    assert PACK in log


def test_stock_nodes_sample_the_small_checkpoint(server: ComfyServer) -> None:
    """The checkpoint gives a usable model, text encoder and VAE."""
    entry = server.run(picture_prompt())
    picture = entry["outputs"]["7"]["images"][0]
    assert (server.base / "output" / picture["filename"]).stat().st_size > 0
    assert any(event["type"] == "progress" for event in server.events)


def test_a_refused_prompt_names_the_node(server: ComfyServer) -> None:
    """A checkpoint that does not exist is refused before anything runs."""
    prompt = picture_prompt()
    prompt["1"]["inputs"]["ckpt_name"] = "missing.safetensors"
    with pytest.raises(PromptError, match=r"node 1 \(CheckpointLoaderSimple\).*missing\.safetensors"):
        server.run(prompt)


def test_a_failing_node_raises_its_message(server: ComfyServer) -> None:
    """An exception inside a node arrives with the node's name."""
    prompt = picture_prompt()
    prompt["6"]["inputs"]["samples"] = ["4", 0]
    prompt["6"]["inputs"]["vae"] = ["1", 0]
    with pytest.raises(PromptError, match="node 6"):
        server.run(prompt)


def test_a_slow_prompt_is_cancelled(server: ComfyServer) -> None:
    """The timeout interrupts the server, which takes the next prompt at once."""
    with pytest.raises(TimeoutError):
        server.run(picture_prompt(steps=2000), timeout=1.5)
    assert server.run(picture_prompt(), timeout=30)["status"]["status_str"] == "success"

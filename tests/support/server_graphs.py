"""Shared by the tests that run a server: a training graph, a picture by stock nodes, and progress."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from PIL import Image

from dev.assets import CHECKPOINT
from dev.server import ComfyServer

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

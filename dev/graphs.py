"""What the templates hold: nodes, their places and values, links. dev.templates builds them in the real frontend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
CHECKPOINT_URL = f"https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{CHECKPOINT}"
MODELS = [{"name": CHECKPOINT, "url": CHECKPOINT_URL, "directory": "checkpoints"}]
SAVED = "lora2/adaptive_00001.safetensors"  # what the training template saves first
PROMPT = "a photo of sks mug on the beach"
SAMPLER = {
    "seed": 1,
    "control_after_generate": "fixed",
    "steps": 25,
    "cfg": 7.0,
    "sampler_name": "dpmpp_2m",
    "scheduler": "karras",
}
BLUE, ORANGE, GREEN = "#3f5159", "#8a6d3b", "#4a6b4f"


@dataclass
class Node:
    """One node: type, place, size, widget values, and where its inputs come from ("key.output")."""

    type: str
    x: int
    y: int
    width: int
    height: int
    values: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    title: str = ""
    properties: dict[str, Any] = field(default_factory=dict)


@dataclass
class Template:
    """A graph: nodes by key, and groups as (title, x, y, width, height, colour)."""

    name: str
    id: str
    nodes: dict[str, Node]
    groups: list[tuple[str, int, int, int, int, str]]


def _checkpoint(x: int, y: int) -> Node:
    values = {"ckpt_name": CHECKPOINT}
    return Node("CheckpointLoaderSimple", x, y, 380, 98, values, properties={"models": MODELS})


def _text(x: int, y: int, height: int, text: str, title: str) -> Node:
    return Node("CLIPTextEncode", x, y, 400, height, {"text": text}, {"clip": "checkpoint.CLIP"}, title)


def _sampler(x: int, y: int, model: str, title: str = "") -> Node:
    inputs = {"model": model, "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING"}
    return Node("KSampler", x, y, 400, 262, dict(SAMPLER), inputs | {"latent_image": "latent.LATENT"}, title)


def _decode(x: int, y: int, samples: str) -> Node:
    return Node("VAEDecode", x, y, 400, 46, {}, {"samples": samples, "vae": "checkpoint.VAE"})


def _note(height: int, text: str, width: int = 380) -> Node:
    return Node("MarkdownNote", 0, 0, width, height, {"text": text.strip()}, title="Read me first")


TRAIN = Template(
    "Train Adaptive LoRA",
    "a2f0c0de-0000-4000-8000-000000000001",
    {
        "note": _note(
            300,
            """
## Train a LoRA that finds its own ranks

1. Choose your **checkpoint**: SD 1.5, SDXL, …
2. Put 5 to 20 pictures of one subject into a folder inside `ComfyUI/input`, each with its caption in a text file \
of the same name (`mug1.png`, `mug1.txt`: *a photo of sks mug on a table*). Press **R**, choose the **folder**.
3. For SDXL, set both sizes (Upscale Image, Empty Latent) to **1024**.
4. **Run**. The node shows loss and ranks while it learns; *Cancel* keeps what was learned.

The LoRA is saved in `models/loras/lora2`, under a new name each time. Any LoRA loader reads it. \
`target_rank` decides how large it is.
""",
        ),
        "checkpoint": _checkpoint(0, 410),
        "folder": Node("LoadImageTextDataSetFromFolder", 0, 600, 380, 78, {"folder": "my_subject"}),
        "scale": Node(
            "ImageScale",
            0,
            760,
            380,
            130,
            {"upscale_method": "lanczos", "width": 512, "height": 512, "crop": "center"},
            {"image": "folder.images"},
        ),
        "dataset": Node(
            "MakeTrainingDataset",
            0,
            960,
            380,
            86,
            {},
            {"images": "scale.IMAGE", "vae": "checkpoint.VAE", "clip": "checkpoint.CLIP", "texts": "folder.texts"},
        ),
        "train": Node(
            "LoRA2_TrainAdaptiveLora",
            460,
            40,
            440,
            1200,
            {},
            {"model": "checkpoint.MODEL", "latents": "dataset.latents", "conditioning": "dataset.conditioning"},
        ),
        "positive": _text(980, 40, 130, PROMPT, "Prompt: use the words of your captions"),
        "negative": _text(980, 220, 88, "", "Negative prompt"),
        "latent": Node("EmptyLatentImage", 980, 360, 400, 106),
        "sampler": _sampler(980, 520, "train.model"),
        "decode": _decode(980, 840, "sampler.LATENT"),
        "picture": Node(
            "PreviewImage", 1420, 40, 440, 480, {}, {"images": "decode.IMAGE"}, "The trained model's picture"
        ),
        "ranks": Node("LoRA2_InspectRanks", 1420, 600, 440, 640, {}, {"lora": "train.lora"}),
    },
    [
        ("1  Model and pictures", -20, 330, 420, 770, BLUE),
        ("2  Train", 440, -40, 480, 1300, ORANGE),
        ("3  See the result", 960, -40, 920, 1300, GREEN),
    ],
)

LOAD = Template(
    "Load Adaptive LoRA",
    "a2f0c0de-0000-4000-8000-000000000002",
    {
        "note": _note(
            230,
            """
## The same seed, without and with the LoRA

1. Choose the **checkpoint** that the LoRA was trained on, and the **LoRA**.
2. **Run**.

At `share` 1, `max_rank` 0 and `megabytes` 0 all of the LoRA is loaded, exactly as ComfyUI's own loader does it. \
Lower one of them to load less of it: a smaller LoRA, cut at once, without training. The node says how large it is then.
""",
        ),
        "checkpoint": _checkpoint(0, 340),
        "load": Node(
            "LoRA2_LoadAdaptiveLora",
            0,
            520,
            380,
            310,
            {"lora_name": SAVED},
            {"model": "checkpoint.MODEL", "clip": "checkpoint.CLIP"},
        ),
        "positive": _text(460, 40, 130, PROMPT, "Prompt"),
        "negative": _text(460, 220, 88, "", "Negative prompt"),
        "latent": Node("EmptyLatentImage", 460, 360, 400, 106),
        "sampler_without": _sampler(940, 40, "checkpoint.MODEL", "KSampler: without the LoRA"),
        "decode_without": _decode(940, 360, "sampler_without.LATENT"),
        "without": Node("PreviewImage", 1380, 40, 400, 440, {}, {"images": "decode_without.IMAGE"}, "Without the LoRA"),
        "sampler_with": _sampler(940, 560, "load.model", "KSampler: with the LoRA"),
        "decode_with": _decode(940, 880, "sampler_with.LATENT"),
        "with": Node("PreviewImage", 1380, 560, 400, 440, {}, {"images": "decode_with.IMAGE"}, "With the LoRA"),
    },
    [
        ("1  Model and LoRA", -20, 260, 420, 600, ORANGE),
        ("2  What to paint", 440, -40, 440, 526, BLUE),
        ("3  Without and with", 920, -40, 880, 1060, GREEN),
    ],
)

INSPECT = Template(
    "Inspect Ranks",
    "a2f0c0de-0000-4000-8000-000000000003",
    {
        "note": _note(
            230,
            """
## What is inside a LoRA?

1. Choose any LoRA **file** in the node; it need not be one of ours.
2. **Run**.

The picture shows which layers hold how much rank, and how large the file is against one rank for all layers. \
With `send_preview` on *rank in use* it tells what a LoRA with one rank for all could be cut to.
""",
        ),
        "inspect": Node("LoRA2_InspectRanks", 440, 0, 520, 760),
        "text": Node(
            "PreviewAny", 1020, 0, 520, 760, {"preview_mode": True}, {"source": "inspect.markdown"}, "As text"
        ),
    },
    [],
)

TEMPLATES = (TRAIN, LOAD, INSPECT)

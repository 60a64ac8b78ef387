"""Shared by the tests that train on real ComfyUI models: the pack imported as a node pack, and small datasets."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACK = "lora2_pack"

# family: (latent channels, context width, pooled width)
WIDTHS = {
    "sd15": (4, 768, 0),
    "sd21": (4, 1024, 0),
    "sdxl": (4, 2048, 1280),
    "koala": (4, 2048, 1280),
    "flux": (16, 4096, 768),
}


def pack(module: str) -> Any:
    """A module of the pack, imported under a package of any name, as ComfyUI does."""
    if PACK not in sys.modules:
        package = types.ModuleType(PACK)
        package.__path__ = [str(ROOT)]
        sys.modules[PACK] = package
    return importlib.import_module(f"{PACK}.{module}")


def captions(family: str, count: int, tokens: int = 7, seed: int = 1) -> list[Any]:
    """ComfyUI conditioning lists, one per picture, each with its own text."""
    _, context, pooled = WIDTHS[family]
    g = torch.Generator().manual_seed(seed)
    options = [{"pooled_output": torch.randn(1, pooled, generator=g)} if pooled else {} for _ in range(count)]
    return [[[torch.randn(1, tokens, context, generator=g), option]] for option in options]


def latents(
    family: str, shapes: tuple[tuple[int, int], ...] = ((8, 8), (8, 8), (8, 12)), seed: int = 0
) -> list[dict[str, Any]]:
    """Latent dicts of one picture each, as MakeTrainingDataset gives them."""
    g = torch.Generator().manual_seed(seed)
    return [{"samples": torch.randn(1, WIDTHS[family][0], h, w, generator=g)} for h, w in shapes]

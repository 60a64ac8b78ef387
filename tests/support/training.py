"""Shared by the tests that train on real ComfyUI models: the pack imported as a node pack, and small datasets."""

from __future__ import annotations

from typing import Any

import torch

from dev.packs import pack

__all__ = ["WIDTHS", "captions", "latents", "pack"]


# family: (latent channels, context width, pooled width)
WIDTHS = {
    "sd15": (4, 768, 0),
    "sd21": (4, 1024, 0),
    "sdxl": (4, 2048, 1280),
    "koala": (4, 2048, 1280),
    "flux": (16, 4096, 768),
}


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

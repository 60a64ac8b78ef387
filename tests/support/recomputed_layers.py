"""Shared by the tests of adapters: one adapted layer whose inputs are recomputed."""

from __future__ import annotations

import torch
from small_networks import config, frozen, randomize
from torch import nn

from lora2.adapters.network import AdaptiveNetwork

SIZE = 64
"""Rows and columns: in float32 exactly the smallest size that is recomputed here."""


def layer_of(kind: str, compute: torch.dtype) -> tuple[nn.Module, AdaptiveNetwork]:
    """An adapted layer for inputs of SIZE × SIZE: linear, linear through a hook, or a convolution."""
    layer = frozen((nn.Conv2d(4, 8, 3, padding=1) if kind == "convolution" else nn.Linear(SIZE, 16)).to(compute))
    is_plain = None if kind == "linear" else (lambda _module: False)
    network = AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=compute, is_plain=is_plain)
    return layer, randomize(network)

"""Shared by the tests of metadata: layers with long names, and their entries."""

from __future__ import annotations

import torch
from torch import Tensor

from lora2.files.document import to_state_dict
from lora2.files.rank_info import LayerInfo, layer_info
from lora2.method.factors import Factors


def file_of(count: int, rank: int = 2, width: int = 8) -> tuple[dict[str, Tensor], dict[str, LayerInfo]]:
    """Tensors and entries of `count` layers with names as long as SDXL's longest."""
    generator = torch.Generator().manual_seed(0)
    names = [f"lora_unet_down_blocks_2_attentions_1_transformer_blocks_{i}_attn1_to_out_0" for i in range(count)]
    layers = {
        name: Factors(torch.randn(width, rank, generator=generator), torch.randn(rank, width, generator=generator))
        for name in names
    }
    entries = {
        name: layer_info(factors, nu=0.0123456789 * (i + 1), target=64, order="importance")
        for i, (name, factors) in enumerate(layers.items())
    }
    return to_state_dict(layers, "kohya", torch.float32), entries

"""Weights as a small file: rows of 7-bit whole numbers with a scale each, compressed."""

from __future__ import annotations

import lzma
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

LARGEST = 63
"""Of the whole numbers. Seven bits of a bell-shaped weight are about 5.5 bits once compressed."""

SCALE = ":scale"


def pack(tensors: dict[str, Tensor], path: Path) -> Path:
    """Writes tensors: matrices and kernels quantised by output row, the rest in float16."""
    stored = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            stored[name] = tensor.half()
            continue
        scale = tensor.float().flatten(1).abs().amax(1).clamp(min=1e-8) / LARGEST
        whole = (tensor.float() / scale.view(-1, *[1] * (tensor.dim() - 1))).round()
        stored[name], stored[name + SCALE] = whole.to(torch.int8), scale
    blob = safetensors.torch.save({name: t.cpu().contiguous() for name, t in stored.items()})
    path.write_bytes(lzma.compress(blob, preset=9 | lzma.PRESET_EXTREME))
    return path


def unpack(path: Path) -> dict[str, Tensor]:
    """What `pack` wrote, as float32."""
    stored = safetensors.torch.load(lzma.decompress(path.read_bytes()))
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        scale = stored.get(name + SCALE)
        values = tensor.float()
        tensors[name] = values if scale is None else values * scale.view(-1, *[1] * (tensor.dim() - 1))
    return tensors

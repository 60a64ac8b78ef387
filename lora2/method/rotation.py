"""Orthogonal rotation of a layer's components, which leaves ΔW unchanged.

Adam's steps have the same size for every parameter, whatever its gradient. Between singular components that is as much for a
direction that is almost zero, whose gradient is noise, as for the strongest. Between components that each mix almost all
directions, signal and noise share the steps as they share the gradients. Its effect is measured in docs/evidence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .svd import float64


def rotation_matrix(rank: int) -> Tensor:
    """Q (rank, rank), orthogonal and symmetric, float64: Q_jk = (cos x + sin x) / √rank, x = 2π j k / rank.

    The discrete Hartley transform (Bracewell, J. Opt. Soc. Am. 73, 1983): no entry exceeds √2 / √rank.
    """
    index = torch.arange(rank, dtype=torch.float64)
    # j k modulo rank: x keeps its digits without whole turns.
    x = 2 * math.pi / max(rank, 1) * (torch.outer(index, index) % max(rank, 1))
    return (x.cos() + x.sin()) / math.sqrt(max(rank, 1))


@torch.no_grad()
def rotate(rows: Tensor, device: torch.device) -> Tensor:
    """Q times rows (rank, …), in their dtype, computed in float64 on the device; (Q up)ᵀ (Q down) = upᵀ down."""
    flat = float64(rows.to(device)).flatten(1)
    return (rotation_matrix(len(rows)).to(flat) @ flat).to(rows).reshape(rows.shape)

"""Positions of a layer turned into mixtures of each other, without any change of the layer.

Adam gives every number a step of the same size, whatever its gradient. In the singular order that would be as much for a
direction that holds next to nothing, and whose gradient is noise, as for the strongest. In positions that each hold some of
almost all directions, noise and signal share their steps as they share their gradients. That is why it was tried; what it is
worth is measured in docs/evidence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .svd import float64


def rotation_matrix(rank: int) -> Tensor:
    """Q (rank, rank), orthogonal and symmetric, float64: Q_jk = (cos x + sin x) / √rank, x = 2π j k / rank.

    The discrete Hartley transform (Bracewell, J. Opt. Soc. Am. 73, 1983), all of whose entries are of one size on average.
    """
    place = torch.arange(rank, dtype=torch.float64)
    turn = (
        2 * math.pi / max(rank, 1) * (torch.outer(place, place) % max(rank, 1))
    )  # whole turns taken out: x stays exact
    return (turn.cos() + turn.sin()) / math.sqrt(max(rank, 1))


@torch.no_grad()
def rotate(rows: Tensor, device: torch.device) -> Tensor:
    """Q times rows (rank, …), in their type, worked out in float64 on this device; (Q up)ᵀ (Q down) is upᵀ down."""
    flat = float64(rows.to(device)).flatten(1)
    return (rotation_matrix(len(rows)).to(flat) @ flat).to(rows).reshape(rows.shape)

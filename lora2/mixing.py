"""Positions of a layer turned into mixtures of each other, without any change of the layer.

Adam gives every number a step of the same size, whatever its gradient. In the singular order that would be as much for a
direction that holds next to nothing, and whose gradient is noise, as for the strongest. In positions that each hold some of all
directions, noise and signal share their steps as they share their gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mixing(rank: int) -> Tensor:
    """Q (rank, rank), orthogonal and symmetric, float64: Q_jk = (cos x + sin x) / √rank, x = 2π j k / rank.

    The discrete Hartley transform (Bracewell, J. Opt. Soc. Am. 73, 1983), all of whose entries are of one size on average.
    """
    place = torch.arange(rank, dtype=torch.float64)
    turn = 2 * math.pi / max(rank, 1) * (torch.outer(place, place) % max(rank, 1))  # whole turns taken out: x stays exact
    return (turn.cos() + turn.sin()) / math.sqrt(max(rank, 1))


@torch.no_grad()
def mix(rows: Tensor) -> Tensor:
    """Q times rows (rank, …), in their type and on their device; (Q up)ᵀ (Q down) is upᵀ down."""
    place = torch.device("cpu") if rows.device.type == "mps" else rows.device  # Apple's has no float64
    flat = rows.detach().to(place).double().flatten(1)
    return (mixing(len(rows)).to(place) @ flat).to(rows).reshape(rows.shape)

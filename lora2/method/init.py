"""How layers start: their rank, and the scale of their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..adapters.layer import cost, full_rank
from ..config import Settings
from . import importance as imp

INITIAL_OVER_TARGET = 4
SMALLEST_INITIAL = 16


def initial_ranks(target: float, limits: Sequence[int], settings: Settings) -> list[int]:
    """The ranks that layers start from. target: the mean rank to end with; limits: every layer's largest."""
    wanted = settings.initial_rank or max(SMALLEST_INITIAL, INITIAL_OVER_TARGET * math.ceil(target))
    return [min(max(wanted, settings.min_rank), limit) for limit in limits]


def rank_limit(shape: tuple[int, ...], settings: Settings) -> int:
    """The largest rank that a layer of this shape may have."""
    most = full_rank(shape)
    return min(most, settings.max_rank) if settings.max_rank else most


def starting(shape: tuple[int, ...], rank: int, settings: Settings) -> tuple[float, float]:
    """σ of new down rows in a layer of this shape that starts at this rank, and the gain of its Λ."""
    energy = imp.kept_energy(rank, imp.mass_constant(settings.q) / rank)
    if settings.init == "paper":
        return imp.paper_down_std(energy), 1.0
    return imp.down_std(cost(shape) - shape[0]), imp.gain(rank, energy)

"""How layers start: their rank, and the scale of their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config import TrainingConfig
from . import importance as imp
from .factors import cost, full_rank

INITIAL_OVER_TARGET = 4
SMALLEST_INITIAL = 16


def initial_ranks(target: float, limits: Sequence[int], config: TrainingConfig) -> list[int]:
    """The ranks that layers start from. target: the mean rank to end with; limits: every layer's largest."""
    wanted = config.initial_rank or max(SMALLEST_INITIAL, INITIAL_OVER_TARGET * math.ceil(target))
    return [min(max(wanted, config.min_rank), limit) for limit in limits]


def rank_limit(shape: tuple[int, ...], config: TrainingConfig) -> int:
    """The largest rank that a layer of this shape may have."""
    most = full_rank(shape)
    return min(most, config.max_rank) if config.max_rank else most


def init_scale(shape: tuple[int, ...], rank: int, config: TrainingConfig) -> tuple[float, float]:
    """σ of new down rows in a layer of this shape that starts at this rank, and the gain of its Λ."""
    energy = imp.kept_energy(rank, imp.mass_constant(config.q) / rank)
    if config.init == "paper":
        return imp.paper_down_std(energy), 1.0
    return imp.down_std(cost(shape) - shape[0]), imp.gain(rank, energy)

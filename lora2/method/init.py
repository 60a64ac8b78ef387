"""Initialization of layers: their rank, and the scale of their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config import TrainingConfig
from . import importance as imp
from .factors import cost, full_rank

INITIAL_OVER_TARGET = 4
MIN_INITIAL_RANK = 16


def initial_ranks(target: float, limits: Sequence[int], config: TrainingConfig) -> list[int]:
    """Initial rank of every layer. target: mean rank to end with. limits: largest rank of every layer."""
    rank = config.initial_rank or max(MIN_INITIAL_RANK, INITIAL_OVER_TARGET * math.ceil(target))
    return [min(max(rank, config.min_rank), limit) for limit in limits]


def rank_limit(shape: tuple[int, ...], config: TrainingConfig) -> int:
    """Largest rank of a layer whose weight has this shape."""
    full = full_rank(shape)
    return min(full, config.max_rank) if config.max_rank else full


def init_scale(shape: tuple[int, ...], rank: int, config: TrainingConfig) -> tuple[float, float]:
    """Standard deviation of new down rows in a layer of this shape and initial rank, and the gain of its Λ."""
    energy = imp.kept_energy(rank, imp.mass_constant(config.q) / rank)
    if config.init == "paper":
        return imp.paper_down_std(energy), 1.0
    return imp.down_std(cost(shape) - shape[0]), imp.gain(rank, energy)

"""When and how far arrays follow the ranks: rarely, because a CUDA graph has to be recorded again after every resize."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config import TrainingConfig
from .layer import GRANULE, round_up_capacity

HEADROOM = 1.3
"""Capacity of a growing layer in multiples of its rank, where its growth is unknown."""

MIN_PRESSED_SHARE, MIN_FREED_SHARE = 0.02, 0.05
"""Fractions of all parameters, in layers that need larger arrays or in rows to be freed, from which a resize pays."""

MAX_RESIZES = 4
"""Resizes per run, evenly spaced."""

MAX_GROWTH = 2.5
"""Largest growth of a rank until the next resize that is planned for."""


def next_capacity(capacity: int, rank: int, max_rank: int, expected_rank: int | None = None) -> int:
    """A layer's next capacity: it grows when the rank exceeds it, and shrinks with one granule of hysteresis.

    rank: what θ asks for now; max_rank: the most it may ever ask for; expected_rank: what it is expected to ask for at the next
    resize, if known.
    """
    grows = max(rank, expected_rank or 0) > capacity
    if expected_rank is None:
        expected_rank = math.ceil(HEADROOM * rank)
    wanted = max(round_up_capacity(rank) + GRANULE, round_up_capacity(expected_rank))
    if grows:
        return max(capacity, min(wanted, round_up_capacity(max_rank)))
    return wanted if wanted <= capacity - GRANULE else capacity


class CapacityPolicy:
    """Decides at every sync whether arrays are resized.

    last_ranks: every layer's continuous rank at the last sync. resized_at: the syncs, counted from 1, that resized arrays.
    """

    def __init__(self, config: TrainingConfig, ranks: Sequence[float]) -> None:
        self.last_ranks = [float(rank) for rank in ranks]
        self.resized_at: list[int] = []
        self.syncs = 0
        adapting_steps = config.adapting_steps - round(config.steps * config.rank_hold)
        self._interval = max(1, math.ceil(adapting_steps / config.sync_every / MAX_RESIZES))

    def next_capacities(
        self,
        capacities: Sequence[int],
        ranks: Sequence[int],
        continuous_ranks: Sequence[float],
        max_ranks: Sequence[int],
        costs: Sequence[int],
        exact: bool,
    ) -> list[int]:
        """Every layer's next capacity; `capacities` themselves where arrays stay as they are.

        ranks: what θ asks for, as whole numbers; max_ranks: the most it may ever ask for; costs: parameters per component.
        exact: hold every rank that is asked for, even where resizing does not pay.
        """
        self.syncs += 1
        wanted = [
            next_capacity(capacity, rank, most, self._expected_rank(now, before))
            for capacity, rank, most, now, before in zip(
                capacities, ranks, max_ranks, continuous_ranks, self.last_ranks, strict=True
            )
        ]
        self.last_ranks = list(continuous_ranks)
        required = exact and any(rank > capacity for rank, capacity in zip(ranks, capacities, strict=True))
        if not required and not (self._interval_over() and _resizing_pays(capacities, wanted, ranks, costs)):
            return list(capacities)
        self.resized_at.append(self.syncs)
        return wanted

    def _interval_over(self) -> bool:
        return not self.resized_at or self.syncs - self.resized_at[-1] >= self._interval

    def _expected_rank(self, now: float, before: float) -> int:
        """The rank at the next possible resize, if it keeps growing as since the last sync."""
        return math.ceil(now * min(MAX_GROWTH, max(1.0, now / before) ** self._interval))


def _resizing_pays(
    capacities: Sequence[int], wanted: Sequence[int], ranks: Sequence[int], costs: Sequence[int]
) -> bool:
    """Whether enough parameters need larger arrays or would be freed, or a single layer asks for much more than it has."""
    if any(rank > HEADROOM * capacity for rank, capacity in zip(ranks, capacities, strict=True)):
        return True
    layers = list(zip(capacities, wanted, ranks, costs, strict=True))
    pressed = sum(now * cost for now, new, rank, cost in layers if rank > now and new > now)
    freed = sum((now - new) * cost for now, new, _, cost in layers if new < now)
    total = sum(now * cost for now, _, _, cost in layers)
    return pressed > MIN_PRESSED_SHARE * total or freed > MIN_FREED_SHARE * total

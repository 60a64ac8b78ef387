"""When arrays follow the ranks: seldom, since a recorded step has to be recorded again after it (engine.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config import TrainingConfig
from .layer import HEADROOM, next_capacity

PRESSED_SHARE, FREED_SHARE = 0.02, 0.05
"""Of the parameters held: what makes the arrays follow the ranks."""

MAX_RESIZES = 4
"""How often they follow in a run, evenly spaced."""

MAX_GROWTH = 2.5
"""A growing layer gets room for this many times its rank at most."""


class CapacityPolicy:
    """What is remembered from sync to sync. ranks: every layer's continuous rank at the last one. at: the syncs, counted from 1,
    at which arrays were resized.
    """

    def __init__(self, config: TrainingConfig, ranks: Sequence[float]) -> None:
        self.ranks = [float(rank) for rank in ranks]
        self.at: list[int] = []
        self.syncs = 0
        adapting = config.adapting_steps - round(config.steps * config.rank_hold)
        self._between = max(1, math.ceil(adapting / config.sync_every / MAX_RESIZES))

    def sync(
        self,
        held: Sequence[int],
        wanted: Sequence[int],
        ranks: Sequence[float],
        limits: Sequence[int],
        costs: Sequence[int],
        exactly: bool,
    ) -> list[int]:
        """The capacities to hold from now on; those held, where arrays stay as they are.

        held: every layer's capacity; wanted: the whole rank that it asks for; ranks: the continuous one; limits: the largest one;
        costs: the parameters of a position. exactly: hold every rank that is asked for, also where resizing would not pay.
        """
        self.syncs += 1
        capacities = [
            next_capacity(capacity, rank, limit, self._expected(now, before))
            for capacity, rank, limit, now, before in zip(held, wanted, limits, ranks, self.ranks, strict=True)
        ]
        self.ranks = list(ranks)
        short = exactly and any(rank > capacity for rank, capacity in zip(wanted, held, strict=True))
        if not short and not (self._may() and _worth(held, capacities, wanted, costs)):
            return list(held)
        self.at.append(self.syncs)
        return capacities

    def _may(self) -> bool:
        return not self.at or self.syncs - self.at[-1] >= self._between

    def _expected(self, now: float, before: float) -> int:
        """The rank that a layer will ask for when the arrays may follow again, if it grows on as since the last sync."""
        return math.ceil(now * min(MAX_GROWTH, max(1.0, now / before) ** self._between))


def _worth(held: Sequence[int], capacities: Sequence[int], wanted: Sequence[int], costs: Sequence[int]) -> bool:
    """Whether resizing pays.

    It does when layers that hold a share of the parameters press against their arrays, or a single one wants much more
    than its own, or when a share would be freed.
    """
    if any(rank > HEADROOM * capacity for rank, capacity in zip(wanted, held, strict=True)):
        return True
    layers = list(zip(held, capacities, wanted, costs, strict=True))
    pressed = sum(now * cost for now, new, rank, cost in layers if rank > now and new > now)
    freed = sum((now - new) * cost for now, new, _, cost in layers if new < now)
    everything = sum(now * cost for now, _, _, cost in layers)
    return pressed > PRESSED_SHARE * everything or freed > FREED_SHARE * everything

"""Learning rates and timesteps over a run."""

from __future__ import annotations

import math

LAST_SHARE = 0.1
"""Where the cosine ends, as a share of the learning rate: the last steps should still count."""


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The share of the learning rate at a step: linear warm-up over `warmup` · steps, then constant or half a cosine."""
    rising = round(steps * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, steps - rising)
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def size_factor(size: int, target: int) -> float:
    """√(target / size), at most 1: the learning rate's share while more parameters are trained than the target has.

    The change of a weight by one step of Adam grows with the number of positions, about as its root where they move in
    directions of their own; so a learning rate means the same before the cuts and after them.
    """
    return min(1.0, math.sqrt(target / max(size, 1)))

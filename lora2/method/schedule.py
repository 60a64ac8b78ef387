"""The learning rate over a run, as factors of the configured one."""

from __future__ import annotations

import math

FINAL_FRACTION = 0.1
"""Where the cosine ends, as a fraction of the learning rate: the last steps should still count."""


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Factor of the learning rate at a step: linear warm-up over `warmup` · steps, then constant or half a cosine."""
    warmup_steps = round(steps * warmup)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))


def size_factor(size: int, target: int) -> float:
    """√(target / size), at most 1: factor of the learning rate while more parameters are trained than the target has.

    One step of Adam changes a weight by about the square root of the number of components, if they move independently. With
    this factor, a learning rate means the same before the cuts and after them.
    """
    return min(1.0, math.sqrt(target / max(size, 1)))

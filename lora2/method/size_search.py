"""The smallest size that is enough: it keeps a share of what training has taken off the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

SAMPLES = 32
"""On which losses are compared, the same for all sizes."""

BATCH_SIZE = 4
"""Of them run at once, where memory allows: nothing is kept for a backward pass."""

HALVINGS = 6
"""How often the largest size is halved at most: nothing below a 64th of it is found."""

FINER = 3
"""Halvings of the last step's logarithm: what is found lies within a tenth, 2^(1/8), of the smallest size."""


def smallest_sufficient_size(loss: Callable[[int], float], least: int, most: int, share: float) -> int | None:
    """The smallest size whose loss is at most none − share · (none − best); None where no size lowers the loss.

    loss: of a size in parameters, 0 or least … most; not a number where it has none. none: loss(0). best: the lowest that was
    seen, which need not be that of the largest size. Sizes are halved for as long as they are enough, then it is bisected.
    """
    none = loss(0)
    size, seen = most, {most: _or_worst(loss(most))}

    def learned() -> bool:
        return min(seen.values()) < none

    def goal() -> float:
        return none - share * (none - min(seen.values()))

    while size > max(least, 1, most >> HALVINGS) and not (learned() and seen[size] > goal()):
        size = max(size // 2, least)
        seen[size] = _or_worst(loss(size))
    if not (learned() and math.isfinite(none)):
        return None
    high = min(size for size, found in seen.items() if found <= goal())
    low = max((size for size in seen if size < high), default=high)
    for _ in range(FINER if low < high else 0):
        middle = round(math.sqrt(low * high))
        low, high = (low, middle) if loss(middle) <= goal() else (middle, high)
    return high


def _or_worst(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss

"""Search for the smallest size that preserves a share of the loss reduction."""

from __future__ import annotations

import math
from collections.abc import Callable

SAMPLES = 32
"""Samples that losses are compared on, the same for all sizes."""

BATCH_SIZE = 4
"""Samples that run together if memory allows; nothing is kept for a backward pass."""

MAX_HALVINGS = 6
"""The largest size is halved at most this often: the result is never below a 64th of it."""

BISECTIONS = 3
"""Bisections of the last halving, in the logarithm: the result is within a tenth, 2^(1/8), of the smallest size."""


def smallest_sufficient_size(loss: Callable[[int], float], smallest: int, largest: int, share: float) -> int | None:
    """The smallest size whose loss is at most loss(0) − share · (loss(0) − best); None if no size lowers the loss.

    loss: of a size in parameters, 0 or smallest … largest; NaN if unknown. best: the lowest loss that was found, which need not
    be that of the largest size. Sizes are halved while they suffice, then the last halving is bisected.
    """
    untrained = loss(0)
    size, losses = largest, {largest: _nan_to_infinity(loss(largest))}

    def improves() -> bool:
        return min(losses.values()) < untrained

    def goal() -> float:
        return untrained - share * (untrained - min(losses.values()))

    while size > max(smallest, 1, largest >> MAX_HALVINGS) and not (improves() and losses[size] > goal()):
        size = max(size // 2, smallest)
        losses[size] = _nan_to_infinity(loss(size))
    if not (improves() and math.isfinite(untrained)):
        return None
    high = min(size for size, value in losses.items() if value <= goal())
    low = max((size for size in losses if size < high), default=high)
    for _ in range(BISECTIONS if low < high else 0):
        middle = round(math.sqrt(low * high))
        low, high = (low, middle) if loss(middle) <= goal() else (middle, high)
    return high


def _nan_to_infinity(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss

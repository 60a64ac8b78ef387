"""One plain LoRA layer: two factors and a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The update of one layer, ΔW = (alpha / rank) · up · down.

    down: (rank, d_in) for a linear layer, (rank, c_in / groups, *kernel) for a convolution.
    up: (d_out, rank), or (d_out, rank, 1, …) for a convolution.
    alpha: the scale's numerator; None means alpha = rank, a scale of 1.
    """

    up: Tensor
    down: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Number of rank-one components."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """Alpha / rank; 1 without an alpha and for a layer of rank 0."""
        return 1.0 if self.alpha is None or self.rank == 0 else self.alpha / self.rank

    @property
    def cost(self) -> int:
        """Parameters per unit of rank."""
        return self.up.shape[0] + self.down.shape[1:].numel()

    @property
    def parameters(self) -> int:
        """Number of values in both factors."""
        return self.up.numel() + self.down.numel()

    def head(self, rank: int) -> Factors:
        """The first `rank` components, or all if there are fewer, at the same scale."""
        down = self.down[:rank]
        return Factors(self.up[:, :rank], down, self.scale * len(down))

    def delta(self) -> Tensor:
        """ΔW with the weight's shape, in the factors' dtype: (d_out, d_in) or (d_out, c_in / groups, *kernel)."""
        product = self.up.reshape(self.up.shape[0], self.rank) @ self.down.reshape(
            self.rank, self.down.shape[1:].numel()
        )
        return (self.scale * product).reshape(self.up.shape[0], *self.down.shape[1:])


def float32(factors: Factors) -> Factors:
    """The same factors in float32."""
    return Factors(factors.up.float(), factors.down.float(), factors.alpha)


def full_rank(shape: tuple[int, ...]) -> int:
    """min(d_out, d_in · kernel) of a weight's shape."""
    return min(shape[0], math.prod(shape[1:]))


def cost(shape: tuple[int, ...]) -> int:
    """d_out + d_in · kernel of a weight's shape: the parameters of one component."""
    return shape[0] + math.prod(shape[1:])

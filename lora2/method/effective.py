"""How many directions of a layer carry its update: the rank that it uses, whatever rank it was given."""

from __future__ import annotations

import torch
from torch import Tensor

from ..util.errors import LoraError
from .factors import Factors
from .svd import float64


@torch.no_grad()
def energies(factors: Factors) -> Tensor:
    """σ² of ΔW without its scale, (min(rank, d_out, d_in),) float64, non-increasing.

    The eigenvalues of (downdownᵀ)^½ (upᵀup) (downdownᵀ)^½ are those of ΔWᵀΔW other than zero: only
    rank × rank matrices are decomposed, which is many times faster than an SVD and exact enough for shares of
    the energy (relative error about 1e-15 of the largest). Raises LoraError on NaN or infinity.
    """
    up = float64(factors.up).reshape(factors.up.shape[0], factors.rank)
    down = float64(factors.down).reshape(factors.rank, factors.down.shape[1:].numel())
    if factors.rank > min(up.shape[0], down.shape[1]):
        # More positions than directions: the product is the smaller matrix, whatever rank a file claims.
        product = up @ down
        if not bool(torch.isfinite(product).all()):
            raise LoraError("A LoRA layer holds NaN, infinity or numbers too large to square.")
        return _singular_values(product) ** 2
    left, right = up.T @ up, down @ down.T
    if not (bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())):
        raise LoraError("A LoRA layer holds NaN, infinity or numbers too large to square.")
    try:
        values, vectors = torch.linalg.eigh(right)
        half = vectors * values.clamp_min(0.0).sqrt()
        sigma_squared = torch.linalg.eigvalsh(half.T @ left @ half).clamp_min(0.0).flip(0)
    except torch.linalg.LinAlgError:  # numbers of very different sizes: what takes longer bears them
        return _singular_values(torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T) ** 2
    return sigma_squared[: min(factors.rank, up.shape[0], down.shape[1])]


def _singular_values(matrix: Tensor) -> Tensor:
    try:
        return torch.linalg.svdvals(matrix)
    except torch.linalg.LinAlgError as error:
        raise LoraError("A LoRA layer holds numbers that are too far apart to be decomposed.") from error


def energy_rank(factors: Factors, share: float) -> int:
    """The least number of directions that hold `share` of Σ σ²; 0 for a layer that changes nothing."""
    if factors.rank == 0 or factors.scale == 0.0:
        return 0
    kept = energies(factors).cumsum(0)
    total = float(kept[-1]) if len(kept) else 0.0
    # The last sum is the total itself, so a share of 1 finds it in spite of rounding.
    return 0 if total == 0.0 else int((kept < share * total).sum()) + 1

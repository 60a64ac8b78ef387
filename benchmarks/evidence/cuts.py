"""Cutting a trained LoRA without training: what resize tools do, what the pack's loader does, and leaving last positions out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from benchmarks.models import pack

SIZES = (1, 2, 4, 8, 16, 32)
SHARES = (0.75, 0.5, 0.25)
BISECTIONS = 40

Factors = Mapping[str, Any]
"""lora2.method.factors.Factors by layer."""


def size_of(factors: Factors) -> int:
    """Parameters of a file."""
    return sum(f.parameters for f in factors.values())


def singular(factors: Factors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every layer in the order of its singular values, and those."""
    pairs = {name: pack("lora2.method.svd").decompose(f) for name, f in factors.items()}
    return {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}


def resized(factors: Factors) -> Iterator[tuple[int, Factors]]:
    """Cut to the size of a uniform rank as resize tools do: every layer keeps the same share of its Frobenius norm (sv_fro).

    The share is the largest whose file is no larger than that of the uniform rank.
    """
    ordered, sigmas = singular(factors)
    costs = {n: f.cost for n, f in factors.items()}
    for size in SIZES:
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            share = (low + high) / 2
            taken = sum(costs[n] * rank_for(sigmas[n], share) for n in costs)
            low, high = (share, high) if taken <= size * sum(costs.values()) else (low, share)
        yield size, {n: f.head(rank_for(sigmas[n], low)) for n, f in ordered.items()}


def rank_for(sigma: Tensor, share: float) -> int:
    """The smallest rank, at least 1, whose singular values hold a share of the Frobenius norm."""
    norms = sigma.square().cumsum(0).sqrt()
    return int((norms < share * norms[-1]).sum()) + 1


def allocated(factors: Factors) -> Iterator[tuple[int, Factors]]:
    """Cut to the size of a uniform rank by energy per parameter over all layers together, as the pack's own loader does."""
    ordered, sigmas = singular(factors)
    costs = {n: f.cost for n, f in factors.items()}
    for size in SIZES:
        ranks = pack("lora2.method.allocation").allocate(sigmas, costs, size * sum(costs.values()))
        yield size, {n: f.head(ranks[n]) for n, f in ordered.items()}


def shortened(factors: Factors) -> Iterator[tuple[float, Factors]]:
    """Every layer without its last positions, in the order that the file has: 75, 50 and 25 % of them, at least one."""
    for share in SHARES:
        yield share, {n: f.head(min(f.rank, max(1, round(share * f.rank)))) for n, f in factors.items()}


def shared_out(factors: Factors) -> Iterator[tuple[float, Factors]]:
    """75, 50 and 25 % of the bytes, by energy per parameter over all layers: what the loader does with a file of ours."""
    ordered, sigmas = singular(factors)
    costs = {n: f.cost for n, f in factors.items()}
    for share in SHARES:
        ranks = pack("lora2.method.allocation").allocate(sigmas, costs, int(share * size_of(factors)))
        yield share, {n: f.head(ranks[n]) for n, f in ordered.items()}


CUTS = {"resized": resized, "allocated": allocated, "shortened": shortened, "shared_out": shared_out}

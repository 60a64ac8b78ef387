"""How a limit on the size is met: steering ranks while they adapt, and cutting layers together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..util.errors import LoraError
from .factors import Factors
from .orders import singular_orders
from .svd import allocate


def next_pressure(pressure: float, ratio: float, last: float) -> float:
    """The budget's multiplier for a size of `ratio` times the budget, `last` times it before; within 1e-6 … 1e6.

    Proportional and differential in r = ln ratio, so that it eases off while the size is already coming down.
    """
    r, before = math.log(max(ratio, 1e-3)), math.log(max(last, 1e-3))
    return min(1e6, max(1e-6, pressure * math.exp(0.5 * r + 2 * (r - before))))


def next_size(size: int, target: int, left: int) -> int:
    """The parameters to cut to now, with `left` cuts to come: in equal ratios, the last cut meets the target."""
    return target if not left else max(target, round(size * (target / size) ** (1 / (left + 1))))


def scaled_ranks(
    rho: Sequence[float], costs: Sequence[int], floors: Sequence[int], limits: Sequence[int], budget: int
) -> list[int]:
    """Whole ranks in the proportions of continuous ones, as large together as a budget of parameters allows.

    All are ρ times one factor, found by bisection, and between floor and limit; what that leaves goes one by one to the
    layers that lost most by rounding. The sum of rank · cost stays within the budget wherever the floors do.
    """

    def at(factor: float) -> list[int]:
        return [min(max(int(r * factor), low), high) for r, low, high in zip(rho, floors, limits, strict=True)]

    def size(ranks: Sequence[int]) -> int:
        return sum(rank * c for rank, c in zip(ranks, costs, strict=True))

    low, high = 0.0, max(limits) / min(rho) + 1
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) <= budget else (low, middle)
    ranks = at(low)
    left = budget - size(ranks)
    while open_ := [i for i in range(len(rho)) if ranks[i] < limits[i] and costs[i] <= left]:
        most_lost = min(open_, key=lambda i: ranks[i] - rho[i] * high)
        ranks[most_lost] += 1
        left -= costs[most_lost]
    return ranks


def fit(
    factors: Mapping[str, Factors],
    budget: int,
    min_rank: int = 1,
    weights: Mapping[str, float] | None = None,
    device: torch.device | None = None,
    unused: int = 0,
) -> dict[str, Factors]:
    """Cut layers together to a budget of parameters, by energy per parameter, each kept in singular order, float32, on the CPU.

    Keeps min_rank positions everywhere as far as the budget allows: a layer of rank 0 could not go on learning. With a
    min_rank of 0 a layer may lose all its positions. weights: what a layer's energy σ² counts for in the choice, 1 where it
    is not named; what is kept of a layer does not change by it. unused: parameters that a layer without positions leaves to the
    others beside.
    device: a GPU that may help. Raises LoraError on NaN or infinity in factors, and where a weight is negative or not a number.
    """
    orders = singular_orders(factors, device)
    costs = {name: factors[name].cost for name in orders}
    ranks = split({name: order.sigma for name, order in orders.items()}, costs, budget, min_rank, weights, unused)
    return {name: order.head(ranks[name]) for name, order in orders.items()}


def split(
    sigmas: Mapping[str, Tensor],
    costs: Mapping[str, int],
    budget: int,
    min_rank: int = 1,
    weights: Mapping[str, float] | None = None,
    unused: int = 0,
) -> dict[str, int]:
    """The ranks that `fit` cuts layers to, from their singular values and the parameters of their positions."""
    floor = {name: min(min_rank, len(sigma)) for name, sigma in sigmas.items()}
    counted = {name: amplitude(name, weights or {}) * sigma for name, sigma in sigmas.items()}

    def within(size: int) -> dict[str, int]:
        spare = size - sum(floor[name] * costs[name] for name in sigmas)
        more = allocate({name: sigma[floor[name] :] for name, sigma in counted.items()}, costs, max(0, spare))
        return {name: floor[name] + more[name] for name in sigmas}

    ranks = within(budget)
    gone = _gone(ranks)
    while unused and gone:
        ranks = within(budget + gone * unused)
        if _gone(ranks) >= gone:
            break
        gone = _gone(ranks)  # with so much room one came back: count on those alone that stay away
    return ranks


def _gone(ranks: Mapping[str, int]) -> int:
    """How many layers have no position."""
    return sum(not rank for rank in ranks.values())


def amplitude(layer: str, weights: Mapping[str, float]) -> float:
    """√weight, what a layer's σ is multiplied by so that its σ² counts weight times; 1 for a layer without a weight."""
    weight = float(weights.get(layer, 1.0))
    if not 0 <= weight < math.inf:
        raise LoraError(f"Layer {layer} has the weight {weight} in the split of the size; it has to be 0 or more.")
    return math.sqrt(weight)

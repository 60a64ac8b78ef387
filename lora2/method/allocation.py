"""How a limit on the size is met: steering ranks while they adapt, and cutting layers together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..util.errors import LoraError
from .factors import Factors
from .svd import decompose_layers


def next_multiplier(pressure: float, ratio: float, last: float) -> float:
    """The budget's multiplier for a size of `ratio` times the budget, `last` times it before; within 1e-6 … 1e6.

    Proportional and differential in r = ln ratio, so that it eases off while the size is already coming down.
    """
    r, before = math.log(max(ratio, 1e-3)), math.log(max(last, 1e-3))
    return min(1e6, max(1e-6, pressure * math.exp(0.5 * r + 2 * (r - before))))


def next_cut_size(size: int, target: int, left: int) -> int:
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


def cut_to_budget(
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
    orders = decompose_layers(factors, device)
    costs = {name: factors[name].cost for name in orders}
    ranks = allocate_ranks(
        {name: order.sigma for name, order in orders.items()}, costs, budget, min_rank, weights, unused
    )
    return {name: order.head(ranks[name]) for name, order in orders.items()}


def allocate_ranks(
    sigmas: Mapping[str, Tensor],
    costs: Mapping[str, int],
    budget: int,
    min_rank: int = 1,
    weights: Mapping[str, float] | None = None,
    unused: int = 0,
) -> dict[str, int]:
    """The ranks that `cut_to_budget` cuts layers to, from their singular values and the parameters of their positions."""
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


def allocate(
    sigmas: Mapping[str, Tensor], costs: Mapping[str, int], budget: int, max_rank: int | None = None
) -> dict[str, int]:
    """Ranks for all layers together, so that the energy kept, Σ σ², is large and Σ rank · cost ≤ budget.

    sigmas: per layer σ (rank,), non-increasing. costs: per layer the price of one unit of rank, in the unit
    of the budget (parameters or bytes). max_rank: an upper limit for every layer.

    Positions are taken in the order of σ² / cost, over all layers; where one does not fit any more, its layer
    is closed and cheaper ones go on, so what is left over is less than one unit of any layer that could still
    grow. Every result is a prefix of its layer's positions. Equal ratios go to the lower position, then to
    the layer that comes first in `sigmas`. Raises LoraError on NaN or infinite σ.
    """
    names = list(sigmas)
    lengths = [len(sigmas[name]) if max_rank is None else min(len(sigmas[name]), max_rank) for name in names]
    ranks = dict.fromkeys(names, 0)
    if not any(lengths):
        return ranks
    # One row per position and one column per layer: a stable sort of the rows then breaks ties as promised.
    table = torch.full((len(names), max(lengths)), -1.0, dtype=torch.float64)
    for row, name, length in zip(table, names, lengths, strict=True):
        row[:length] = sigmas[name][:length].double().cpu().square() / costs[name]
    if not bool(torch.isfinite(table).all()):
        raise LoraError("A layer's singular values hold NaN or infinity, so no budget can be split over them.")
    flat = table.T.reshape(-1)
    order = torch.argsort(flat, descending=True, stable=True)[: sum(lengths)]
    layer = order % len(names)
    price = torch.tensor([costs[name] for name in names], dtype=torch.int64)[layer]
    taken = torch.zeros(len(names), dtype=torch.int64)
    while len(price):
        fits = int((price.cumsum(0) <= budget).sum())
        taken += torch.bincount(layer[:fits], minlength=len(names))
        budget -= int(price[:fits].sum())
        layer, price = layer[fits:], price[fits:]
        # The first position left does not fit, so each turn closes one price for good.
        layer, price = layer[price <= budget], price[price <= budget]
    return {name: int(count) for name, count in zip(names, taken, strict=True)}

"""Size budgets: steering ranks toward one while they adapt, and splitting one over layers when they are cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..util.errors import LoraError
from .factors import Factors
from .svd import decompose_layers


def next_multiplier(multiplier: float, ratio: float, last_ratio: float) -> float:
    """The multiplier of the rank penalty that steers the size to a budget, between 1e-6 and 1e6.

    A proportional-derivative controller in r = ln(size / budget); the derivative eases off while the size is already
    shrinking. ratio: size / budget now. last_ratio: at the update before.
    """
    r, before = math.log(max(ratio, 1e-3)), math.log(max(last_ratio, 1e-3))
    return min(1e6, max(1e-6, multiplier * math.exp(0.5 * r + 2 * (r - before))))


def next_cut_size(size: int, target: int, remaining: int) -> int:
    """Parameters to cut to now, with `remaining` cuts after this one: a geometric sequence that ends at the target."""
    return target if not remaining else max(target, round(size * (target / size) ** (1 / (remaining + 1))))


def scaled_ranks(
    rho: Sequence[float], costs: Sequence[int], floors: Sequence[int], limits: Sequence[int], budget: int
) -> list[int]:
    """Integer ranks proportional to continuous ones, ρ, scaled to fill a budget of parameters.

    costs: parameters per component. floors, limits: bounds of every rank. One factor scales all ρ, found by bisection; the
    remaining parameters go to the layers that rounding reduced most, one component at a time. Σ rank · cost stays within
    the budget unless the floors alone exceed it.
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
    spare = budget - size(ranks)
    while growable := [i for i in range(len(rho)) if ranks[i] < limits[i] and costs[i] <= spare]:
        most_reduced = min(growable, key=lambda i: ranks[i] - rho[i] * high)
        ranks[most_reduced] += 1
        spare -= costs[most_reduced]
    return ranks


def cut_to_budget(
    factors: Mapping[str, Factors],
    budget: int,
    min_rank: int = 1,
    weights: Mapping[str, float] | None = None,
    device: torch.device | None = None,
    unused: int = 0,
) -> dict[str, Factors]:
    """Truncate the SVD of all layers so that together they meet a budget of parameters; float32, on the CPU.

    Components are chosen by weight · σ² per parameter over all layers, at least min_rank in each; with a min_rank of 0 a
    cut may remove a layer. weights: by layer, 1 for a layer without one; they affect the choice only. unused: parameters that
    a removed layer frees in addition to its components. device: a GPU for the decompositions. Raises LoraError on NaN or
    infinity in the factors, and on a weight that is negative or not finite.
    """
    layers = decompose_layers(factors, device)
    costs = {name: factors[name].cost for name in layers}
    sigmas = {name: layer.sigma for name, layer in layers.items()}
    ranks = allocate_ranks(sigmas, costs, budget, min_rank, weights, unused)
    return {name: layer.head(ranks[name]) for name, layer in layers.items()}


def allocate_ranks(
    sigmas: Mapping[str, Tensor],
    costs: Mapping[str, int],
    budget: int,
    min_rank: int = 1,
    weights: Mapping[str, float] | None = None,
    unused: int = 0,
) -> dict[str, int]:
    """The ranks that `cut_to_budget` cuts to. sigmas: singular values by layer. costs: parameters per component.

    The parameters that removed layers free are spent on the others as long as no removed layer returns because of them.
    """
    floor = {name: min(min_rank, len(sigma)) for name, sigma in sigmas.items()}
    weighted = {name: _amplitude(name, weights or {}) * sigma for name, sigma in sigmas.items()}

    def within(size: int) -> dict[str, int]:
        spare = size - sum(floor[name] * costs[name] for name in sigmas)
        more = allocate({name: sigma[floor[name] :] for name, sigma in weighted.items()}, costs, max(0, spare))
        return {name: floor[name] + more[name] for name in sigmas}

    ranks = within(budget)
    removed = _count_removed(ranks)
    while unused and removed:
        larger = within(budget + removed * unused)
        if _count_removed(larger) >= removed:
            return larger
        removed = _count_removed(larger)  # one returned: count only on what the layers that stay removed free
    return ranks


def _count_removed(ranks: Mapping[str, int]) -> int:
    return sum(not rank for rank in ranks.values())


def _amplitude(layer: str, weights: Mapping[str, float]) -> float:
    """√weight, the factor of σ that makes σ² count weight times."""
    weight = float(weights.get(layer, 1.0))
    if not 0 <= weight < math.inf:
        raise LoraError(f"Layer {layer} has the weight {weight} in the size allocation; it must be 0 or more.")
    return math.sqrt(weight)


def allocate(
    sigmas: Mapping[str, Tensor], costs: Mapping[str, int], budget: int, max_rank: int | None = None
) -> dict[str, int]:
    """Ranks for all layers that keep a large energy Σ σ² with Σ rank · cost ≤ budget (a greedy knapsack).

    sigmas: σ (rank,) by layer, non-increasing. costs: cost of one component by layer, in the unit of the budget
    (parameters or bytes). max_rank: upper limit of every rank.

    Components are taken in the order of σ² / cost over all layers. Where one does not fit, its layer is closed and cheaper
    ones continue, so the unspent rest is less than the cost of any layer that could still grow. Every layer keeps a prefix
    of its components. Ties go to the lower component, then to the layer that comes first in `sigmas`. Raises LoraError on
    NaN or infinite σ.
    """
    names = list(sigmas)
    lengths = [len(sigmas[name]) if max_rank is None else min(len(sigmas[name]), max_rank) for name in names]
    ranks = dict.fromkeys(names, 0)
    if not any(lengths):
        return ranks
    # A stable sort of the flattened (component, layer) table breaks ties as promised.
    table = torch.full((len(names), max(lengths)), -1.0, dtype=torch.float64)
    for row, name, length in zip(table, names, lengths, strict=True):
        row[:length] = sigmas[name][:length].double().cpu().square() / costs[name]
    if not bool(torch.isfinite(table).all()):
        raise LoraError("A layer's singular values contain NaN or infinity: no budget can be split over them.")
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
        # The first remaining component does not fit, so every iteration closes at least one price.
        layer, price = layer[price <= budget], price[price <= budget]
    return {name: int(count) for name, count in zip(names, taken, strict=True)}

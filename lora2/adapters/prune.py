"""Pruning: cut all layers together to a size in parameters. Which components stay is decided in method/allocation.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..method.allocation import allocate_ranks, cut_to_budget
from ..method.factors import Factors
from .network import AdaptiveNetwork, PendingPrune

ChooseSize = Callable[[Callable[[int], None], int, int], int]
"""Chooses a size in parameters. Arguments: a function that shows the network at a size, the smallest and the largest size."""


@torch.no_grad()
def prune(
    network: AdaptiveNetwork,
    size: int | None = None,
    weights: Mapping[str, float] | None = None,
    choose_size: ChooseSize | None = None,
) -> None:
    """Fold Λ into the factors, cut all layers to a size by their singular values, and continue as a plain LoRA.

    Training then continues on rotations of the remaining components (method/rotation.py).

    size: in parameters, the network's budget by default; where everything fits, the output changes by rounding error only.
    weights: loss per unit of each layer's energy (method/sensitivity.py). choose_size: finds a sufficient size below `size`.
    Create a new optimizer afterwards: the old moments belong to other directions. If memory runs out, nothing learned is lost,
    and a second call continues. May be called again with a smaller size.
    """
    if network.pending_prune is None:
        limit = network.budget if size is None else size
        cut = cut_factors(network, network.export_factors(ordered=False), limit, weights)
        network.pending_prune = PendingPrune(cut, choose_size is not None)
    network.pruned = True
    if choose_size is not None and network.pending_prune.size_open:
        cut = _cut_to_chosen_size(network, network.pending_prune.factors, weights, choose_size)
        network.pending_prune = PendingPrune(cut, size_open=False)
    for name, adapter in zip(network.names, network.adapters, strict=True):
        adapter.load(network.pending_prune.factors[name])
        adapter.restart_zero_components(network.generator)
        adapter.rotate()
    network.rebuild()
    network.pending_prune = None


@torch.no_grad()
def final_factors(
    network: AdaptiveNetwork, weights: Mapping[str, float] | None = None
) -> tuple[dict[str, Factors], bool]:
    """The factors to save, and whether components are sorted by singular value.

    The paper's form keeps the order of Λ, unless a budget still has to be met. A run that stopped before its last cut is cut to
    the budget, with `weights` as in `prune`, so its file is no larger than requested.
    """
    factors, config = network.export_factors(), network.config
    removed = sum(not f.rank for f in factors.values())
    limit = network.budget + removed * config.removed_layer_parameters
    if network.pruned and sum(f.parameters for f in factors.values()) <= limit:
        return factors, True
    if not network.pruned and config.settle_at >= 1 and not config.budget_mb:
        return factors, False
    return cut_factors(network, factors, network.budget, weights), True


def cut_factors(
    network: AdaptiveNetwork, factors: Mapping[str, Factors], size: int, weights: Mapping[str, float] | None
) -> dict[str, Factors]:
    """Factors cut to a size, under the constraints of the network's configuration."""
    config = network.config
    return cut_to_budget(factors, size, config.min_rank, weights, network.device, config.removed_layer_parameters)


def _cut_to_chosen_size(
    network: AdaptiveNetwork, factors: Mapping[str, Factors], weights: Mapping[str, float] | None, choose: ChooseSize
) -> dict[str, Factors]:
    """Factors at the chosen size. The network is left at one of the sizes that were shown."""
    candidates = PruneCandidates(network, factors, weights)
    return candidates.cut(choose(candidates.show, candidates.smallest, candidates.largest))


class PruneCandidates:
    """A pruned network at any size up to its own, without another decomposition.

    factors: from `cut_factors`, sorted by singular value, √σ in each factor; the network loads them. weights: as in `prune`.
    largest: the parameters of all factors; smallest: with `min_rank` components in every layer.
    """

    def __init__(
        self, network: AdaptiveNetwork, factors: Mapping[str, Factors], weights: Mapping[str, float] | None
    ) -> None:
        self._network, self._factors, self._weights = network, factors, weights
        for name, adapter in zip(network.names, network.adapters, strict=True):
            adapter.load(factors[name])
        network.rebuild()
        min_rank = network.config.min_rank
        self.largest = sum(f.parameters for f in factors.values())
        self.smallest = sum(min(min_rank, f.rank) * f.cost for f in factors.values())
        self._up_rows = {name: f.up.reshape(len(f.up), f.rank).t() for name, f in factors.items()}
        self._sigmas = {name: rows.double().square().sum(1) for name, rows in self._up_rows.items()}
        self._costs = {name: f.cost for name, f in factors.items()}

    @torch.no_grad()
    def show(self, size: int) -> None:
        """Make the network compute as if cut to a size; 0 disables the adapters."""
        ranks = self._ranks(size) if size else dict.fromkeys(self._factors, 0)
        for name, adapter in zip(self._network.names, self._network.adapters, strict=True):
            rank = ranks[name]
            adapter.up.data[:rank] = self._up_rows[name][:rank].to(adapter.up)
            adapter.up.data[rank:] = 0
        self._network.refresh()

    def cut(self, size: int) -> dict[str, Factors]:
        """The factors of a size."""
        ranks = self._ranks(size)
        return {name: f.head(ranks[name]) for name, f in self._factors.items()}

    def _ranks(self, size: int) -> dict[str, int]:
        config = self._network.config
        return allocate_ranks(
            self._sigmas, self._costs, size, config.min_rank, self._weights, config.removed_layer_parameters
        )

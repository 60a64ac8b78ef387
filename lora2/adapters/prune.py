"""Layers that were cut together, shown at sizes below that one after the other, with no further decomposition."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..config import TrainingConfig
from ..method.allocation import allocate_ranks
from ..method.factors import Factors
from .layer import Adapter


class PruneCandidates:
    """adapters: the layers, which hold `factors`. factors: in singular order, √σ in either factor, as `budget.fit` gives them.

    weights: of `cut_to_budget`. largest: the parameters of all factors. smallest: of what no cut takes, `min_rank` everywhere.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        factors: Mapping[str, Factors],
        weights: Mapping[str, float] | None,
        config: TrainingConfig,
    ) -> None:
        self.largest = sum(f.parameters for f in factors.values())
        self._adapters, self._factors, self._weights, self._settings = adapters, factors, weights, config
        self._rows = {name: f.up.reshape(len(f.up), f.rank).t() for name, f in factors.items()}
        self._sigmas = {name: rows.double().square().sum(1) for name, rows in self._rows.items()}
        self._costs = {name: f.cost for name, f in factors.items()}
        self.smallest = sum(min(config.min_rank, f.rank) * f.cost for f in factors.values())

    @torch.no_grad()
    def show(self, size: int) -> None:
        """Let the layers answer as if they had been cut to so many parameters, or with 0 as the frozen ones.

        Working copies (packed.py) do not follow.
        """
        ranks = self._ranks(size) if size else dict.fromkeys(self._factors, 0)
        for name, adapter in self._adapters.items():
            adapter.up.data[: ranks[name]] = self._rows[name][: ranks[name]].to(adapter.up)
            adapter.up.data[ranks[name] :] = 0

    def cut(self, size: int) -> dict[str, Factors]:
        """The factors of that size."""
        ranks = self._ranks(size)
        return {name: f.head(ranks[name]) for name, f in self._factors.items()}

    def _ranks(self, size: int) -> dict[str, int]:
        config = self._settings
        return allocate_ranks(
            self._sigmas, self._costs, size, config.min_rank, self._weights, config.removed_layer_parameters
        )

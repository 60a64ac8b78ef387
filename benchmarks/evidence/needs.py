"""How much of a LoRA's rank is in use: the positions that hold most of its energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.cuts import Factors, singular

SHARE = 0.9
"""Of the energy Σ σ²: what the rest holds is left out of the count."""


def in_use(factors: Factors, weights: Mapping[str, float] | None) -> dict[str, Any]:
    """Three counts of the positions that hold SHARE of the energy, and of the parameters that these take.

    layers: by layer, each for itself. together: over all layers, largest σ² first: [positions, parameters]. weighed: the same
    with every layer's σ² times its weight; without weights None.
    """
    _, sigmas = singular({name: f for name, f in factors.items() if f.rank})
    costs = {name: f.cost for name, f in factors.items()}
    return {
        "layers": {name: count(sigmas[name].square()) if name in sigmas else 0 for name in factors},
        "together": together({name: sigma.square() for name, sigma in sigmas.items()}, costs),
        "weighed": weights
        and together({name: weights[name] * sigma.square() for name, sigma in sigmas.items()}, costs),
    }


def count(energy: Tensor, share: float = SHARE) -> int:
    """The fewest of these energies, largest first, that hold a share of their sum; 0 where there is none."""
    kept = energy.sort(descending=True).values.cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1 if float(energy.sum()) > 0 else 0


def together(energies: Mapping[str, Tensor], costs: Mapping[str, int]) -> list[int]:
    """Positions and parameters that hold SHARE of the energy of all layers."""
    flat = torch.cat(list(energies.values()))
    prices = torch.cat([torch.full((len(e),), costs[name]) for name, e in energies.items()])
    order = flat.argsort(descending=True, stable=True)
    positions = count(flat)
    return [positions, int(prices[order[:positions]].sum())]

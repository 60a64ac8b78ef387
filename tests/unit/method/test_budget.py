"""Layers cut together to a budget of parameters, by weighted energy."""

from __future__ import annotations

import math

import pytest
import torch

from lora2.method.allocation import allocate_ranks, cut_to_budget
from lora2.method.factors import Factors
from lora2.util.errors import LoraError


def layer(values: list[float], d_out: int = 6, d_in: int = 8, seed: int = 0) -> Factors:
    """A layer with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(d_out, len(values), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(d_in, len(values), generator=generator, dtype=torch.float64))[0]
    return Factors((u * torch.tensor(values, dtype=torch.float64)).float(), v.T.float())


def ranks(layers: dict[str, Factors]) -> dict[str, int]:
    return {name: f.rank for name, f in layers.items()}


def test_weights_multiply_the_energy() -> None:
    layers = {"a": layer([4.0, 3.0, 2.0]), "b": layer([1.0, 0.9, 0.8], seed=1)}
    budget = 3 * 14
    assert ranks(cut_to_budget(layers, budget, 0)) == ranks(cut_to_budget(layers, budget, 0, {})) == {"a": 3, "b": 0}
    # Weighted energies: a 16, 9, 4; b 12, 9.7, 7.7; then a 1.28, 0.72, 0.32; b 1, 0.81, 0.64.
    assert ranks(cut_to_budget(layers, budget, 0, {"b": 12.0})) == {"a": 1, "b": 2}
    assert ranks(cut_to_budget(layers, budget, 0, {"a": 0.08})) == {"a": 1, "b": 2}
    assert ranks(cut_to_budget(layers, budget, 0, {"a": 0.0})) == {"a": 0, "b": 3}
    assert ranks(cut_to_budget(layers, budget, 1, {"a": 0.0})) == {"a": 1, "b": 2}


def test_weights_affect_the_choice_only() -> None:
    layers = {"a": layer([4.0, 3.0, 2.0]), "b": layer([1.0, 0.9, 0.8], seed=1)}
    plain, weighted = (cut_to_budget(layers, 4 * 14, 2, weights) for weights in (None, {"a": 7.0, "b": 0.3}))
    assert ranks(plain) == ranks(weighted) == {"a": 2, "b": 2}
    for name in layers:
        assert torch.equal(plain[name].delta(), weighted[name].delta())


def test_a_layer_is_removed_only_with_a_min_rank_of_0() -> None:
    layers = {"a": layer([4.0, 3.0, 2.0]), "b": layer([1e-3, 1e-4, 1e-5], seed=1)}
    empty = cut_to_budget(layers, 3 * 14, 0)["b"]
    assert empty.up.shape == (6, 0)
    assert empty.down.shape == (0, 8)
    assert not empty.delta().any()
    assert ranks(cut_to_budget(layers, 3 * 14, 1)) == {"a": 2, "b": 1}


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(LoraError, match="Layer a has the weight"):
        cut_to_budget({"a": layer([1.0])}, 100, 0, {"a": weight})


@pytest.mark.parametrize("seed", range(8))
def test_freed_parameters_are_spent_within_the_budget(seed: int) -> None:
    """A removed layer frees more than its components; what is spent counts only on layers that are removed in the end."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(25):
        count, unused = int(torch.randint(2, 6, (), generator=g)), int(torch.randint(1, 8, (), generator=g))
        names = [f"l{i}" for i in range(count)]
        sigmas = {n: torch.rand(3, generator=g, dtype=torch.float64).sort(descending=True)[0] for n in names}
        costs = {n: int(torch.randint(2, 12, (), generator=g)) for n in names}
        budget = int(torch.randint(0, 60, (), generator=g))
        ranks = allocate_ranks(sigmas, costs, budget, 0, None, unused)
        removed = sum(not rank for rank in ranks.values())
        assert sum(ranks[n] * costs[n] for n in names) <= budget + removed * unused

"""Layers cut together to a budget, by what their energy counts for."""

from __future__ import annotations

import math

import pytest
import torch

from lora2.method.allocation import cut_to_budget
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


def test_weights_change_the_choice_and_nothing_else() -> None:
    layers = {"a": layer([4.0, 3.0, 2.0]), "b": layer([1.0, 0.9, 0.8], seed=1)}
    plain, weighted = (cut_to_budget(layers, 4 * 14, 2, weights) for weights in (None, {"a": 7.0, "b": 0.3}))
    assert ranks(plain) == ranks(weighted) == {"a": 2, "b": 2}
    for name in layers:
        assert torch.equal(plain[name].delta(), weighted[name].delta())


def test_a_layer_may_lose_everything_only_without_a_least_rank() -> None:
    layers = {"a": layer([4.0, 3.0, 2.0]), "b": layer([1e-3, 1e-4, 1e-5], seed=1)}
    empty = cut_to_budget(layers, 3 * 14, 0)["b"]
    assert empty.up.shape == (6, 0)
    assert empty.down.shape == (0, 8)
    assert not empty.delta().any()
    assert ranks(cut_to_budget(layers, 3 * 14, 1)) == {"a": 2, "b": 1}


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    with pytest.raises(LoraError, match="Layer a has the weight"):
        cut_to_budget({"a": layer([1.0])}, 100, 0, {"a": weight})

"""The exact decomposition of one layer, and the split of a budget over layers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora2.method.allocation import allocate
from lora2.method.factors import Factors
from lora2.method.svd import decompose
from lora2.util.errors import LoraError

# (rank, d_out, shape of the input side): ordinary, wider than one or both sides, rank 1, convolutions.
SHAPES = [
    (4, 10, (20,)),
    (30, 10, (20,)),
    (15, 10, (20,)),
    (15, 20, (10,)),
    (1, 5, (7,)),
    (8, 8, (8,)),
    (4, 8, (3, 3, 3)),
    (40, 8, (3, 3, 3)),
    (3, 6, (5, 3)),
    (2, 4, (3, 2, 2, 2)),
]


def factors(rank: int, d_out: int, inner: tuple[int, ...], dtype: torch.dtype, alpha: float | None) -> Factors:
    generator = torch.Generator().manual_seed(rank * 1000 + d_out)
    up = torch.randn(d_out, rank, *[1] * (len(inner) - 1), generator=generator, dtype=torch.float64)
    down = torch.randn(rank, *inner, generator=generator, dtype=torch.float64)
    return Factors(up.to(dtype), down.to(dtype), alpha)


def delta(layer: Factors) -> Tensor:
    """ΔW in float64, by the definition."""
    product = torch.einsum("or,ri->oi", layer.up.double().flatten(1), layer.down.double().flatten(1))
    scale = 1.0 if layer.alpha is None else layer.alpha / layer.rank
    return scale * product.reshape(layer.up.shape[0], *layer.down.shape[1:])


CASES = [
    *((shape, torch.float32, 3.0) for shape in SHAPES),
    *((SHAPES[6], dtype, None) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    *((SHAPES[1], torch.float64, alpha) for alpha in (None, -0.5)),
]


@pytest.mark.parametrize(("shape", "dtype", "alpha"), CASES)
def test_a_decomposition_keeps_delta(
    shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype, alpha: float | None
) -> None:
    rank, d_out, inner = shape
    layer = factors(rank, d_out, inner, dtype, alpha)
    ordered, sigma = decompose(layer)
    expected = delta(layer)
    # Some hundred float64 roundings of 1.1e-16 each.
    assert (delta(ordered) - expected).norm() <= 1e-12 * expected.norm()
    assert ordered.rank == ordered.alpha == len(sigma) == min(rank, d_out, math.prod(inner))
    assert ordered.down.shape[1:] == inner
    assert ordered.up.shape[2:] == layer.up.shape[2:]
    assert ordered.up.dtype == ordered.down.dtype == sigma.dtype == torch.float64
    assert torch.allclose(sigma, torch.linalg.svdvals(expected.flatten(1))[: len(sigma)], rtol=1e-10, atol=1e-12)
    assert bool((sigma.diff() <= 0).all())


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_every_prefix_is_the_best_approximation(rank: int) -> None:
    layer = factors(6, 12, (9,), torch.float64, None)
    ordered, sigma = decompose(layer)
    prefix = Factors(ordered.up[:, :rank], ordered.down[:rank])
    # Eckart and Young: the error of the best approximation is the energy of the tail.
    assert (delta(prefix) - delta(layer)).norm().item() == pytest.approx(sigma[rank:].norm().item(), rel=1e-10)


def test_both_factors_share_the_weight_equally() -> None:
    layer = Factors(1e-3 * torch.randn(20, 4), 1e3 * torch.randn(4, 30))
    ordered, sigma = decompose(layer)
    assert torch.allclose(ordered.up.norm(dim=0), sigma.sqrt(), rtol=1e-10)
    assert torch.allclose(ordered.down.norm(dim=1), sigma.sqrt(), rtol=1e-10)


@pytest.mark.parametrize("inner", [(5,), (3, 3, 3)])
def test_zero_and_empty_layers(inner: tuple[int, ...]) -> None:
    tail = [1] * (len(inner) - 1)
    ordered, sigma = decompose(Factors(torch.zeros(7, 3, *tail), torch.randn(3, *inner), 1.0))
    assert not sigma.any()
    assert not delta(ordered).any()
    assert ordered.rank == 3
    ordered, sigma = decompose(Factors(torch.zeros(7, 0, *tail), torch.zeros(0, *inner), 1.0))
    assert ordered.rank == len(sigma) == 0
    assert ordered.down.shape == (0, *inner)


def test_a_decomposition_leaves_training_tensors_alone() -> None:
    up, down = torch.randn(6, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    ordered, _ = decompose(Factors(up, down))
    assert not ordered.up.requires_grad
    assert up.requires_grad
    assert up.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_values_that_cannot_be_decomposed_are_refused(value: float) -> None:
    up = torch.ones(4, 2, dtype=torch.float64)
    up[1, 1] = value
    with pytest.raises(LoraError, match="singular values"):
        decompose(Factors(up, torch.full((2, 4), 1e300, dtype=torch.float64)))


def brute_force(sigmas: dict[str, Tensor], costs: dict[str, int], budget: int) -> float:
    """The most energy that any choice of ranks keeps within the budget."""
    best = 0.0
    for ranks in itertools.product(*(range(len(s) + 1) for s in sigmas.values())):
        if sum(r * costs[n] for r, n in zip(ranks, sigmas, strict=True)) <= budget:
            energy = sum(float(s[:r].square().sum()) for r, s in zip(ranks, sigmas.values(), strict=True))
            best = max(best, energy)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_allocation_against_all_choices(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = ["a", "b", "c"]
    lengths = [int(torch.randint(1, 6, (), generator=generator)) for _ in names]
    drawn = [torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True)[0] for n in lengths]
    sigmas = dict(zip(names, drawn, strict=True))
    equal, mixed = dict.fromkeys(names, 7), {"a": 3, "b": 5, "c": 8}
    for budget in range(0, 100, 3):
        ranks = allocate(sigmas, equal, budget)
        energy = sum(float(sigmas[n][: ranks[n]].square().sum()) for n in names)
        # With one price for all, taking the largest first is the best there is.
        assert energy == pytest.approx(brute_force(sigmas, equal, budget), rel=1e-12)

        ranks = allocate(sigmas, mixed, budget)
        spent = sum(ranks[n] * mixed[n] for n in names)
        open_costs = [mixed[n] for n in names if ranks[n] < len(sigmas[n])]
        assert spent <= budget
        assert not open_costs or budget - spent < min(open_costs)
        # Greedy filling loses at most the one component that did not fit (bound of the fractional knapsack).
        energy = sum(float(sigmas[n][: ranks[n]].square().sum()) for n in names)
        lost = max(float(s[0].square()) for s in sigmas.values())
        assert brute_force(sigmas, mixed, budget) - lost <= energy


def test_the_strongest_component_per_cost_comes_first() -> None:
    sigmas = {"cheap": torch.tensor([2.0, 0.9]), "dear": torch.tensor([3.0, 3.0])}
    # Energy per unit: cheap 4 and 0.81, dear 0.9 and 0.9.
    assert allocate(sigmas, {"cheap": 1, "dear": 10}, 11) == {"cheap": 1, "dear": 1}
    assert allocate(sigmas, {"cheap": 1, "dear": 10}, 10) == {"cheap": 2, "dear": 0}
    assert allocate(sigmas, {"cheap": 1, "dear": 10}, 12) == {"cheap": 2, "dear": 1}


def test_ties_go_to_low_components_then_to_the_first_layer() -> None:
    sigmas = {"z": torch.ones(3), "a": torch.ones(3), "m": torch.ones(3)}
    costs = dict.fromkeys(sigmas, 2)
    assert allocate(sigmas, costs, 2 * 3) == {"z": 1, "a": 1, "m": 1}
    assert allocate(sigmas, costs, 2 * 5) == {"z": 2, "a": 2, "m": 1}
    zeros = {name: torch.zeros(3) for name in sigmas}
    assert allocate(zeros, costs, 2 * 4) == {"z": 2, "a": 1, "m": 1}


def test_limits_of_the_allocation() -> None:
    sigmas = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([1.0]), "empty": torch.zeros(0)}
    costs = {"a": 2, "b": 3, "empty": 1}
    assert allocate(sigmas, costs, 10**9) == {"a": 3, "b": 1, "empty": 0}
    assert allocate(sigmas, costs, 10**9, max_rank=2) == {"a": 2, "b": 1, "empty": 0}
    assert allocate(sigmas, costs, 10**9, max_rank=0) == {"a": 0, "b": 0, "empty": 0}
    assert allocate(sigmas, costs, 1) == allocate(sigmas, costs, -5) == {"a": 0, "b": 0, "empty": 0}
    assert allocate({}, {}, 10) == {}
    with pytest.raises(LoraError, match="NaN"):
        allocate({"a": torch.tensor([math.nan])}, {"a": 1}, 10)


class Calls(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_large_model() -> None:
    """Thousands of layers of hundreds of components are no more work than sorting them, counted in calls of torch."""
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(4096, 512, generator=generator).sort(descending=True)[0]
    sigmas = {f"layer{i}": row for i, row in enumerate(table)}
    costs = {name: 640 + 320 * (i % 7) for i, name in enumerate(sigmas)}
    budget = sum(costs.values()) * 64
    with Calls() as calls:
        ranks = allocate(sigmas, costs, budget)
    assert 0 <= budget - sum(ranks[name] * costs[name] for name in ranks) < min(costs.values())
    assert calls.count < 12 * len(sigmas)

"""Decomposition of many layers by Gram matrices, against the exact one of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lora2.method.svd as module
from lora2.method.factors import Factors
from lora2.method.svd import decompose, decompose_layers
from lora2.util.errors import LoraError

# Two float32 factors, each rounded to 6e-8 of its largest numbers, in sums of up to some dozen.
ROUNDING = 1e-6


def random(rank: int, d_out: int, *inner: int, seed: int = 0) -> Factors:
    g = torch.Generator().manual_seed(seed)
    up = torch.randn(d_out, rank, *[1] * (len(inner) - 1), generator=g)
    return Factors(up, torch.randn(rank, *inner, generator=g), 0.7 * rank)


def dependent(apart: float) -> Factors:
    """Nearly dependent components: up's second half lies this far from the first."""
    layer = random(8, 40, 30)
    layer.up[:, 4:] = layer.up[:, :4] + apart * layer.up[:, 4:]
    return layer


def graded(span: float) -> Factors:
    """Components of very different sizes, the last of them almost zero."""
    layer = random(12, 40, 30)
    sizes = span ** torch.linspace(-1, 1, 12)
    return Factors(layer.up * sizes, layer.down * sizes.flip(0)[:, None] ** 0.5)


def some_dead() -> Factors:
    layer = random(6, 20, 10)
    layer.up[:, 3:] = 0
    return layer


LAYERS = {
    "linear": random(16, 64, 48),
    "rank 1": random(1, 5, 7),
    "full rank": random(8, 8, 8),
    "wider than the layer": random(30, 10, 20),
    "convolution": random(4, 8, 3, 3, 3),
    "wide convolution": random(40, 8, 3, 3, 3),
    "close": dependent(1e-2),
    "closer": dependent(3e-6),
    "the same": dependent(0.0),
    "graded": graded(1e3),
    "steep": graded(1e6),
    "some dead": some_dead(),
    "zero": Factors(torch.zeros(7, 3), torch.randn(3, 5)),
    "empty": Factors(torch.zeros(7, 0), torch.zeros(0, 5)),
    "negative": Factors(torch.ones(4, 1), torch.ones(1, 3), -2.0),
    "float16": Factors(random(4, 9, 11).up.half(), random(4, 9, 11).down.half()),
}


def delta(layer: Factors) -> Tensor:
    return Factors(layer.up.double(), layer.down.double(), layer.alpha).delta()


@pytest.fixture(scope="module")
def decomposed() -> dict[str, module.Decomposition]:
    return decompose_layers(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_singular_values_and_the_whole_product(decomposed: dict[str, module.Decomposition], name: str) -> None:
    layer, order = LAYERS[name], decomposed[name]
    exact = decompose(layer)[1]
    assert order.sigma.dtype == torch.float64
    assert order.sigma.shape == exact.shape
    assert bool((order.sigma.diff() <= 0).all())
    assert torch.allclose(order.sigma, exact, rtol=0, atol=1e-7 * float(exact.sum()))
    whole = order.head(len(exact))
    assert (delta(whole) - delta(layer)).norm() <= ROUNDING * delta(layer).norm()
    assert whole.rank == whole.alpha == len(exact)
    assert whole.down.shape[1:] == layer.down.shape[1:]
    assert whole.up.shape[2:] == layer.up.shape[2:]
    assert whole.up.dtype == whole.down.dtype == torch.float32
    assert torch.allclose(whole.up.norm(dim=0).flatten(), exact.sqrt().float(), atol=1e-3 * float(exact.sum()) ** 0.5)


@pytest.mark.parametrize("name", LAYERS)
def test_every_prefix_is_the_best_approximation(decomposed: dict[str, module.Decomposition], name: str) -> None:
    layer, order = LAYERS[name], decomposed[name]
    for rank in range(len(order.sigma) + 1):
        missed = (delta(order.head(rank)) - delta(layer)).norm()
        # Eckart and Young: the error of the best approximation is the energy of the tail.
        assert missed <= order.sigma[rank:].norm() + ROUNDING * delta(layer).norm()


def test_only_badly_conditioned_layers_go_through_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Factors] = []
    monkeypatch.setattr(module, "decompose", lambda f: (seen.append(f), decompose(f))[1])
    decompose_layers(LAYERS)
    needed = ("wider than the layer", "wide convolution", "closer", "the same", "some dead", "zero", "empty")
    assert [tuple(f.up.shape) for f in seen] == [tuple(LAYERS[name].up.shape) for name in needed]


def test_without_the_limit_the_gram_path_loses_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values of nearly dependent components are then wrong by more than a thousandth."""
    layer = Factors(dependent(1e-2).up.double(), dependent(1e-2).down.double())
    layer.up[:, 4:] = layer.up[:, :4] + 1e-7 * random(4, 40, 30, seed=3).up
    monkeypatch.setattr(module, "MAX_INVERSE_NORM", math.inf)
    order = decompose_layers({"a": layer})["a"]
    exact = decompose(layer)[1]
    assert float((order.sigma[4:] / exact[4:] - 1).abs().max()) > 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["up", "down"])
def test_values_that_are_not_finite_are_refused(value: float, side: str) -> None:
    layer = random(3, 5, 4)
    getattr(layer, side)[1, 1] = value
    with pytest.raises(LoraError, match="singular values"):
        decompose_layers({"good": random(3, 5, 4), "bad": layer})


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_threads_give_the_same_values_and_are_restored(
    decomposed: dict[str, module.Decomposition], two_threads: None
) -> None:
    parallel = decompose_layers(LAYERS)
    assert torch.get_num_threads() == 2
    assert list(parallel) == list(LAYERS)
    for name in ("linear", "convolution", "graded", "closer"):
        # Two threads may add up products in another order.
        assert torch.allclose(parallel[name].sigma, decomposed[name].sigma, rtol=1e-9)
    with pytest.raises(LoraError, match="singular values"):
        decompose_layers({"bad": Factors(torch.full((2, 1), math.nan), torch.ones(1, 2))})
    assert torch.get_num_threads() == 2


def test_a_gpu_that_is_out_of_memory_is_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    original = module._matrices

    def matrices(factors: Factors, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        assert device is not None
        tried.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(factors, device)

    monkeypatch.setattr(module, "_matrices", matrices)
    layers = {"linear": LAYERS["linear"]}
    order = decompose_layers(layers, torch.device("cuda"))["linear"]
    assert tried == ["cuda", "cpu"]
    assert (delta(order.head(16)) - delta(layers["linear"])).norm() <= ROUNDING * delta(layers["linear"]).norm()
    assert tried == ["cuda", "cpu", "cuda", "cpu"]


def test_other_gpus_are_not_used() -> None:
    """Apple's have no float64: the CPU does all the work there."""
    assert torch.equal(
        decompose_layers({"a": LAYERS["linear"]}, torch.device("mps"))["a"].sigma,
        decompose_layers({"a": LAYERS["linear"]})["a"].sigma,
    )

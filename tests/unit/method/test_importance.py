"""Importance, ranks and the start, against sums written out in numpy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lora2.adapters.network import AdaptiveNetwork
from lora2.config import TrainingConfig
from lora2.method import importance as imp

QS = [0.5, 0.6, 0.75, 0.9, 0.95, 0.99, 0.999]
RANKS = np.arange(1, 513)
Array = NDArray[np.float64]

# numpy's and torch's exp differ by an ulp or two of 2.2e-16;
# 1 − e^(−ν) written out loses 1 / ν ≤ 740 of it.
EXACT = 1e-12


def rate_of(rank: float, q: float) -> float:
    """ν of a continuous rank."""
    return float(-np.log(1.0 - q) / rank)


def mass(positions: int, nu: float) -> Array:
    """f(0; ν), f(1; ν), …, term by term."""
    return np.exp(-nu * np.arange(positions)) * (1.0 - np.exp(-nu))


def fewest_positions(nu: float, q: float) -> int:
    """Add positions one by one until their mass is q. A whole rank's mass is just q: 1e-12 is for its sum."""
    return int(np.argmax(np.cumsum(mass(600, nu)) >= q - 1e-12)) + 1


@pytest.mark.parametrize("q", QS)
def test_rate_of_a_rank(q: float) -> None:
    theta = torch.from_numpy(np.log(RANKS.astype(np.float64)))
    expected = np.array([rate_of(rank, q) for rank in RANKS])
    assert np.allclose(imp.rate(theta, q).numpy(), expected, rtol=EXACT, atol=0)
    # float32: θ up to 6.2 is known to 2.4e-7, so e^(−θ) is too, in proportion.
    assert np.allclose(imp.rate(theta.float(), q).numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("q", QS)
def test_importance_of_every_position(q: float) -> None:
    positions = torch.arange(512, dtype=torch.float64)
    for rank in RANKS:
        nu = rate_of(rank, q)
        expected = mass(int(rank), nu)
        got = imp.importance(positions[:rank], torch.tensor(nu, dtype=torch.float64)).numpy()
        assert np.allclose(got, expected, rtol=EXACT, atol=0)
        # float32: the exponent is at most −ln(1 − q) ≤ 6.9, so it is known to 6.9 · 1.2e-7.
        got = imp.importance(positions[:rank].float(), torch.tensor(nu, dtype=torch.float32)).numpy()
        assert np.allclose(got, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("q", QS)
def test_importance_sums_to_one_over_all_positions(q: float) -> None:
    for rank in (1, 2, 3, 7, 16, 64):
        nu = torch.tensor(rate_of(rank, q), dtype=torch.float64)
        # Beyond 40 / ν there is e^(−40) = 4e-18 left.
        positions = torch.arange(math.ceil(40 / float(nu)) + 1, dtype=torch.float64)
        assert math.fsum(imp.importance(positions, nu).tolist()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("q", QS)
def test_the_first_positions_hold_the_share_q_and_one_less_does_not(q: float) -> None:
    for rank in RANKS:
        kept = mass(int(rank), rate_of(rank, q))
        assert math.fsum(kept) == pytest.approx(q, abs=1e-12)
        assert math.fsum(kept[:-1]) < q - 1e-6


@pytest.mark.parametrize("q", QS)
def test_quantile_rank_counts_positions(q: float) -> None:
    """For ranks between whole numbers too: the count of positions decides, not the formula.

    Within 2e-6 of a whole number, in proportion, is that number (float32 needs it); 1e-5 beside it is not.
    """
    between = np.arange(300) + np.random.default_rng(0).uniform(0.01, 0.99, 300)
    continuous = np.concatenate([RANKS, RANKS - 0.5, RANKS * (1 + 1e-5), RANKS * (1 - 1e-5), between])
    expected = [fewest_positions(rate_of(rho, q), q) for rho in continuous]
    for dtype in (torch.float64, torch.float32):
        theta = torch.from_numpy(np.log(continuous)).to(dtype)
        assert imp.quantile_rank(theta).tolist() == expected


def test_a_whole_rank_survives_its_logarithm() -> None:
    """e^(ln 64) is 64.000004 in float32 and must not become 65; nor may any other rank up to 4096."""
    ranks = torch.arange(1, 4097)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(imp.quantile_rank(ranks.double().log().to(dtype)), ranks.to(dtype))


def test_a_rank_is_never_below_one() -> None:
    assert imp.quantile_rank(torch.tensor([-50.0, -1.0, 0.0])).tolist() == [1, 1, 1]


@pytest.mark.parametrize("q", QS)
def test_slope_of_log_importance_by_finite_differences(q: float) -> None:
    """∂ ln f / ∂θ, θ = ln ρ: central differences of a function written in plain float64."""

    def log_f(position: Array, theta: float) -> Array:
        nu = -np.log(1.0 - q) * np.exp(-theta)
        return -nu * position + np.log(1.0 - np.exp(-nu))

    step = 1e-5
    for rank in (1, 1.5, 2, 3, 5, 8, 17.3, 64, 200, 512):
        theta = math.log(rank)
        positions = np.arange(math.ceil(rank), dtype=np.float64)
        expected = (log_f(positions, theta + step) - log_f(positions, theta - step)) / (2 * step)
        nu = torch.tensor(rate_of(rank, q), dtype=torch.float64)
        got = imp.log_importance_slope(torch.from_numpy(positions), nu).numpy()
        # Truncation is step² = 1e-10; a logarithm up to 7, less the digits of 1 / ν, over 2e-5 gives 1e-8.
        assert np.allclose(got, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slope_of_log_importance_by_autograd(dtype: torch.dtype) -> None:
    theta = torch.tensor([0.0, 1.0, 2.5, 4.0, 6.2], dtype=dtype, requires_grad=True)
    position = torch.tensor([0.0, 1.0, 3.0, 20.0, 400.0], dtype=dtype)
    (expected,) = torch.autograd.grad(imp.importance(position, imp.rate(theta, 0.9)).log().sum(), theta)
    got = imp.log_importance_slope(position, imp.rate(theta.detach(), 0.9))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("q", QS)
def test_energy_and_both_starts_against_direct_sums(q: float) -> None:
    for rank in RANKS:
        nu = rate_of(rank, q)
        energy = math.fsum(value**2 for value in mass(int(rank), nu))
        assert imp.kept_energy(int(rank), nu) == pytest.approx(energy, rel=EXACT)
        for d_in in (1, 320, 2880):
            assert imp.down_std(d_in) ** 2 == pytest.approx(1 / (3 * d_in), rel=EXACT)
        assert imp.gain(int(rank), energy) ** 2 == pytest.approx(rank / energy, rel=EXACT)
        assert imp.paper_down_std(energy) == pytest.approx(math.sqrt(2) / math.sqrt(energy), rel=EXACT)


@pytest.mark.parametrize("q", QS)
def test_the_start_has_the_size_of_a_plain_lora(q: float) -> None:
    """E‖gΛA‖² = Σ (gΛ)² · d_in · σ² equals D · d_in · variance of nn.Linear's own start, which peft has for A."""
    d_in = 320
    generator = torch.Generator().manual_seed(0)
    plain = nn.init.kaiming_uniform_(torch.empty(500, d_in), a=math.sqrt(5), generator=generator)
    variance = float(plain.double().square().mean())
    for rank in (1, 2, 8, 64, 512):
        values = mass(rank, rate_of(rank, q))
        values *= imp.gain(rank, math.fsum(values**2))
        std = imp.down_std(d_in)
        # The variance of 160,000 uniform numbers is known to √(0.8 / 160000) = 0.2 %.
        assert math.fsum(values**2) * d_in * std**2 == pytest.approx(rank * d_in * variance, rel=0.01)


def test_the_papers_start_is_the_number_of_the_paper() -> None:
    """DESIGN: √2 / √Σf² is 10.6 at rank 64, whatever the layer's width."""
    assert imp.paper_down_std(imp.kept_energy(64, rate_of(64, 0.9))) == pytest.approx(10.6, abs=0.05)


@pytest.mark.parametrize("init", ["fan-in", "paper"])
def test_a_network_starts_as_said(init: str) -> None:
    """B = 0, A ~ N(0, σ²), gΛ = g f, at the initial rank, with d_in counting a convolution's kernel."""
    q, rank = 0.9, 16
    layers = {"linear": nn.Linear(640, 320), "conv": nn.Conv2d(96, 64, 3)}
    network = AdaptiveNetwork(layers, TrainingConfig(initial_rank=rank, target_rank=4, q=q, init=init))
    values = mass(rank, rate_of(rank, q))
    energy = math.fsum(values**2)
    for adapter, d_in in zip(network.adapters, (640, 96 * 9), strict=True):
        std, gain = (
            (math.sqrt(2 / energy), 1.0) if init == "paper" else (1 / math.sqrt(3 * d_in), math.sqrt(rank / energy))
        )
        assert not adapter.up.any()
        # 10,240 normal numbers: their deviation is known to 1 / √20480 = 0.7 %; three of these.
        assert float(adapter.down.detach().double().std()) == pytest.approx(std, rel=0.021)
        assert adapter.importance is not None
        assert np.allclose(adapter.importance[:rank].numpy(), gain * values, rtol=2e-6, atol=0)
    assert network.ranks() == {"linear": rank, "conv": rank}
    assert all(nu == pytest.approx(rate_of(rank, q), rel=1e-6) for nu in network.nu_by_layer().values())


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 16, 31, 64, 100, 512])
def test_a_network_starts_at_exactly_the_initial_rank(rank: int) -> None:
    network = AdaptiveNetwork({"a": nn.Linear(600, 512)}, TrainingConfig(initial_rank=rank, target_rank=1))
    assert network.ranks() == {"a": rank}
    assert network.export_factors()["a"].rank == rank

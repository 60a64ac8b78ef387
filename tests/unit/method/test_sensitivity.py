"""Sensitivity of the loss to each layer's energy, from the optimizer's second moments."""

from __future__ import annotations

import pytest
import torch
from scaled_layers import SCALES, inputs, network_of
from torch import Tensor, nn

from lora2.adapters.network import AdaptiveNetwork
from lora2.method.allocation import next_cut_size
from lora2.training.optimizer import Optimizer


def outputs(layers: dict[str, nn.Linear], x: dict[str, Tensor]) -> Tensor:
    return torch.stack([layer(x[name]) for name, layer in layers.items()]).sum(0)


def train(network: AdaptiveNetwork, optimizer: Optimizer, layers: dict[str, nn.Linear], steps: int = 150) -> None:
    """On the adapters' own output plus noise: a loss without a signal, whose gradients are noise."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = {name: value.to(network.compute) for name, value in inputs(1, generator).items()}
        with network.attached():
            answer = outputs(layers, x).float()
        loss = 0.5 * (answer - answer.detach() - torch.randn(answer.shape, generator=generator)).square().sum()
        loss.backward()
        optimizer.step(1.0, False, loss.detach())
        network.refresh()


def test_sensitivity_is_adams_second_moment_over_the_energy() -> None:
    """The formula in float64, with Λ in the energy."""
    network, optimizer, layers = network_of()
    train(network, optimizer, layers, steps=5)
    found = optimizer.sensitivities()
    assert found is not None
    for name, adapter in zip(network.names, network.adapters, strict=True):
        squares = optimizer.inner.state[adapter.up]["exp_avg_sq"].double()
        assert adapter.importance is not None
        down = adapter.down.detach().double() * adapter.importance[:8, None].double()
        up = adapter.up.detach().double()
        energy = (up.square().sum(1) * down.square().sum(1)).sum()
        assert found[name] == pytest.approx(float((squares * up.square()).sum() / energy), rel=1e-6)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_sensitivity_is_proportional_to_the_rise_of_the_loss(compute: torch.dtype) -> None:
    """A change of the same energy costs more where inputs are larger, by the square of their scale."""
    network, optimizer, layers = network_of(compute=compute)
    for layer in layers.values():
        layer.to(compute)
    train(network, optimizer, layers)
    found = optimizer.sensitivities()
    assert found is not None
    updates = {name: factors.delta().double() for name, factors in network.export_factors().items()}
    x = inputs(20_000, torch.Generator().manual_seed(2))
    rises = {n: float((x[n].double() @ u.T).square().sum(1).mean() / u.square().sum()) for n, u in updates.items()}
    for name in SCALES:
        # 150 gradients of one sample each: the mean of their squares over 8 · 24 numbers is known to some 15 %.
        assert found[name] / found["plain"] == pytest.approx(rises[name] / rises["plain"], rel=0.3)


def test_sensitivity_is_unknown_before_the_first_step_and_with_sgd() -> None:
    network, optimizer, layers = network_of()
    assert optimizer.sensitivities() is None
    network, optimizer, layers = network_of(optimizer="sgd")
    train(network, optimizer, layers, steps=3)
    assert optimizer.sensitivities() is None


def test_sensitivity_is_unknown_from_zero_gradients() -> None:
    network, optimizer, _ = network_of()
    for adapter in network.adapters:
        adapter.up.grad, adapter.down.grad = torch.zeros_like(adapter.up), torch.zeros_like(adapter.down)
    optimizer.step(1.0, False, torch.ones(()))
    assert optimizer.sensitivities() is None


def test_a_layer_without_energy_has_weight_one() -> None:
    network, optimizer, layers = network_of()
    network.adapters[0].up.data.zero_()
    train(network, optimizer, layers, steps=2)
    network.adapters[0].up.data.zero_()
    found = optimizer.sensitivities()
    assert found is not None
    assert found["faint"] == 1


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_cuts_are_in_equal_ratios_and_never_below_the_target() -> None:
    sizes = [6400]
    for left in (2, 1, 0):
        sizes.append(next_cut_size(sizes[-1], 100, left))
    assert sizes == [6400, 1600, 400, 100]
    assert next_cut_size(80, 100, 2) == 100
    assert next_cut_size(80, 100, 0) == 100

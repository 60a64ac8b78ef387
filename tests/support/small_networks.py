"""Shared by the tests of adapters: three small layers and their network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora2.adapters.network import AdaptiveNetwork
from lora2.config import TrainingConfig

Q = 0.9

C = -math.log(1 - Q)


def frozen(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        if not parameter.is_meta:
            parameter.data.normal_(0, 0.3, generator=generator)
    return module.requires_grad_(False)


class Model(nn.Module):
    """Two linear layers and a convolution, one after the other."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.first = nn.Linear(24, 32, device=device)
        self.second = nn.Linear(32, 20, device=device)
        self.third = nn.Conv1d(20, 28, 3, padding=1, device=device)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        return self.third(hidden.transpose(1, 2))

    def layers(self) -> dict[str, nn.Module]:
        return {"a": self.first, "b": self.second, "c": self.third}


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(
        **{"q": Q, "target_rank": 2, "initial_rank": 12, "rank_weight": 0.01, "weight_decay": 0.0, **changes}
    )


def network_of(model: Model, device: str = "cpu", **changes: Any) -> AdaptiveNetwork:
    return AdaptiveNetwork(model.layers(), config(**changes), device)


def randomize(network: AdaptiveNetwork, seed: int = 0) -> AdaptiveNetwork:
    """Random up factors, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in network.adapters:
        adapter.up.data.normal_(0, 0.5, generator=generator)
    return network


def set_ranks(network: AdaptiveNetwork, *ranks: float) -> None:
    network.theta.data.copy_(torch.tensor(ranks, dtype=torch.float64).log())


def pictures(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())

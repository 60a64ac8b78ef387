"""Shared by the tests of sensitivity and size search: three layers whose inputs have different scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora2.adapters.network import AdaptiveNetwork
from lora2.config import TrainingConfig
from lora2.training.optimizer import Optimizer

SCALES = {"faint": 0.3, "plain": 1.0, "loud": 3.0}
"""The scale of every layer's inputs."""

WIDTH = 24


def network_of(**changes: Any) -> tuple[AdaptiveNetwork, Optimizer, dict[str, nn.Linear]]:
    """Three layers whose outputs are summed, with updates of the same size."""
    layers = {name: nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for name in SCALES}
    compute = changes.pop("compute", torch.float32)
    usual = {"initial_rank": 8, "target_rank": 4, "learning_rate": 1e-5, "clip_norm": 0.0, "weight_decay": 0.0}
    config = TrainingConfig(**{**usual, **changes})
    network = AdaptiveNetwork(layers, config, compute=compute)
    generator = torch.Generator().manual_seed(0)
    for adapter in network.adapters:
        adapter.up.data.normal_(0, 0.05, generator=generator)
    network.refresh()
    return network, Optimizer(network, config), layers


def inputs(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: scale * torch.randn(count, WIDTH, generator=generator) for name, scale in SCALES.items()}

"""How a step is run: as it is written, or replayed as CUDA graphs.

A step of a large model is thousands of small kernels, and launching them takes longer than running them. A graph holds the
launches of one forward and backward for one shape; replaying it costs one launch. Inputs are copied into the tensors that
the graph was recorded with, and gradients add up in tensors that stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.network import AdaptiveNetwork
from .optimizer import Optimizer

log = logging.getLogger("lora2")


@dataclass
class MicroBatch:
    """Samples of one shape whose conditioning fits together, and their share of the step.

    clean, noise: (batch, channels, …); sigma: (batch,). conditioning: what the denoiser made of the captions: tensors and
    plain values, in dicts and lists. weight: () share of the step's loss.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    conditioning: Any
    weight: Tensor


Loss = Callable[[MicroBatch], Tensor]


class StepRunner:
    """Runs steps as they are written."""

    def __init__(self, network: AdaptiveNetwork, loss: Loss) -> None:
        self.network = network
        self.loss = loss

    def step(self, parts: Iterable[MicroBatch], optimizer: Optimizer, rate: float, ranks_move: bool) -> Tensor:
        """One optimizer step over all samples.

        Returns (2 + 2 · layers,) float32 on the device: the loss before the step; 1 if the step was taken, 0 if it was not
        finite; and the norms of the gradients, each layer's down factor before its up factor.
        """
        self.network.refresh()
        self.network.allocate_gradients()
        optimizer.prepare(rate, ranks_move)
        loss = torch.stack([self.backward(part) for part in parts]).sum()
        taken = self.update(optimizer, loss)
        return torch.cat([torch.stack([loss, taken.to(loss.dtype)]), optimizer.norms])

    def backward(self, part: MicroBatch) -> Tensor:
        """Forward and backward of a part of the step; its share of the loss."""
        loss = self.loss(part) * part.weight
        loss.backward()
        return loss.detach()

    def update(self, optimizer: Optimizer, loss: Tensor) -> Tensor:
        """The optimizer's step; whether it was taken, () on the device."""
        return optimizer.take(loss)

    def forget(self) -> None:
        """Call when parameters were replaced."""

    def save_memory(self) -> str | None:
        """Change something so that a step needs less memory; in words what, None where there is nothing."""
        return None


class StepResult:
    """A step's loss, whether it was taken, and its gradients' norms, on their way from the device."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def read(self) -> tuple[float, bool, list[float]]:
        """All three, once the step is done."""
        if self._event is not None:
            self._event.synchronize()
        loss, taken, *norms = self._values.tolist()
        return loss, bool(taken), norms

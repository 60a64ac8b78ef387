"""One optimizer step: backward passes over micro-batches, then the update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.network import AdaptiveNetwork
from .optimizer import Optimizer


@dataclass
class MicroBatch:
    """Samples of one shape that run together, and their weight in the step.

    clean, noise: (batch, channels, …); sigma: (batch,). conditioning: made from the captions by the denoiser: tensors and
    plain values, in dicts and lists. weight: () share of the step's loss.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    conditioning: Any
    weight: Tensor


Loss = Callable[[MicroBatch], Tensor]


class StepRunner:
    """Takes steps eagerly. GraphStepRunner (cuda_graph.py) replays the same operations as CUDA graphs."""

    def __init__(self, network: AdaptiveNetwork, loss: Loss) -> None:
        self.network = network
        self.loss = loss

    def step(self, micro_batches: Iterable[MicroBatch], optimizer: Optimizer, rate: float, train_ranks: bool) -> Tensor:
        """One optimizer step over all micro-batches, at `rate` times the learning rate.

        Returns (2 + 2 · layers,) float32 on the device: the loss before the step; 1 if the step was applied, 0 if it was not
        finite; and the gradients' norms, each layer's down factor before its up factor.
        """
        self.network.refresh()
        self.network.allocate_gradients()
        optimizer.prepare(rate, train_ranks)
        loss = torch.stack([self.backward(micro_batch) for micro_batch in micro_batches]).sum()
        applied = self.update(optimizer, loss)
        return torch.cat([torch.stack([loss, applied.to(loss.dtype)]), optimizer.norms])

    def backward(self, micro_batch: MicroBatch) -> Tensor:
        """Forward and backward pass of a micro-batch; returns its share of the loss, ()."""
        loss = self.loss(micro_batch) * micro_batch.weight
        loss.backward()
        return loss.detach()

    def update(self, optimizer: Optimizer, loss: Tensor) -> Tensor:
        """Apply the gradients; returns whether they were finite, () bool on the device."""
        return optimizer.apply(loss)

    def reset(self) -> None:
        """Forget recordings; call it after parameters were replaced."""

    def save_memory(self) -> str | None:
        """Make steps need less memory; describe the change, None if there is none."""
        return None


class StepResult:
    """Loss, whether the step was applied, and gradient norms of a step, copied from the device without waiting for it."""

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
        """Loss, applied, norms; waits until the step is done."""
        if self._event is not None:
            self._event.synchronize()
        loss, applied, *norms = self._values.tolist()
        return loss, bool(applied), norms

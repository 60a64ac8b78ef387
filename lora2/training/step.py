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
from ..util.memory import out_of_memory
from .optimizer import Optimizer

log = logging.getLogger("lora2")

WARM_VISITS = 2
"""Steps of a shape that run as written before it is recorded: libraries choose their kernels and buffers in them."""

MOST_GRAPHS = 12
"""Shapes that are recorded; further ones run as written."""


@dataclass
class Part:
    """Samples of one shape whose conditioning fits together, and their share of the step.

    clean, noise: (batch, channels, …); sigma: (batch,). conditioning: what the denoiser made of the captions: tensors and
    plain values, in dicts and lists. weight: () share of the step's loss.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    conditioning: Any
    weight: Tensor


Loss = Callable[[Part], Tensor]


class Engine:
    """Runs steps as they are written."""

    def __init__(self, network: AdaptiveNetwork, loss: Loss) -> None:
        self.network = network
        self.loss = loss

    def step(self, parts: Iterable[Part], optimizer: Optimizer, rate: float, ranks_move: bool) -> Tensor:
        """One optimizer step over all samples.

        Returns (2 + 2 · layers,) float32 on the device: the loss before the step; 1 if the step was taken, 0 if it was not
        finite; and the norms of the gradients, each layer's down factor before its up factor.
        """
        self.network.refresh()
        self.network.hold_gradients()
        optimizer.prepare(rate, ranks_move)
        loss = torch.stack([self.backward(part) for part in parts]).sum()
        taken = self.update(optimizer, loss)
        return torch.cat([torch.stack([loss, taken.to(loss.dtype)]), optimizer.norms])

    def backward(self, part: Part) -> Tensor:
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


class GraphEngine(Engine):
    """Replays steps as CUDA graphs; falls back to running them as written, for good, where recording fails."""

    def __init__(self, network: AdaptiveNetwork, loss: Loss) -> None:
        super().__init__(network, loss)
        self.failed = False
        self._visits: dict[str, int] = {}
        self._graphs: dict[str, _Recorded] = {}
        self._update: _Recorded | None = None
        self._updates = 0
        self._pool: Any = None

    def backward(self, part: Part) -> Tensor:
        """As written the first times, then recorded, then replayed."""
        key = signature(part)
        if key not in self._graphs:
            visits = self._visits[key] = self._visits.get(key, 0) + 1
            if self.failed or visits <= WARM_VISITS or len(self._graphs) >= MOST_GRAPHS:
                return super().backward(part)
            static = copied(part)
            recorded = self._record(lambda: super(GraphEngine, self).backward(static))
            if recorded is None:
                return super().backward(part)
            recorded.inputs = static
            self._graphs[key] = recorded
        recorded = self._graphs[key]
        fill(recorded.inputs, part)
        return recorded.replay().clone()

    def update(self, optimizer: Optimizer, loss: Tensor) -> Tensor:
        """As written the first time, when the optimizer makes its moments; then recorded and replayed."""
        self._updates += 1
        if self._update is None and not self.failed and self._updates > 1:
            static = loss.clone()
            self._update = self._record(lambda: optimizer.take(static))
            if self._update is not None:
                self._update.inputs = static
        if self._update is None:
            return optimizer.take(loss)
        self._update.inputs.copy_(loss)
        return self._update.replay().clone()

    def _record(self, work: Callable[[], Tensor]) -> _Recorded | None:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = work()
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            # Recording stops at the first operation that a graph cannot hold; nothing of it has run.
            self.failed = True
            self.forget()
            log.info("LoRA²: steps cannot be recorded as CUDA graphs here, so they run as written: %s", error)
            return None
        return _Recorded(graph, output)

    def forget(self) -> None:
        """Drop what was recorded: it trains parameters that are gone."""
        self._graphs.clear()
        self._update = None
        self._updates = 0
        self._pool = None
        torch.cuda.empty_cache()

    def save_memory(self) -> str | None:
        """Record no more: what a graph works in is kept for it alone."""
        if self.failed or self._pool is None:
            return None
        self.failed = True
        return "steps run as written, which is slower, since recorded ones hold memory"


class _Recorded:
    """A graph with the tensors that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self.graph = graph
        self.output = output
        self.inputs: Any = None

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output


class Result:
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


def engine_for(network: AdaptiveNetwork, loss: Loss, graphs: bool) -> Engine:
    """Graphs where they are wanted and the device can replay them."""
    return GraphEngine(network, loss) if graphs and network.device.type == "cuda" else Engine(network, loss)


def signature(part: Part) -> str:
    """What a graph is made for: shapes and types of all tensors, and every plain value."""
    return repr([_sign(value) for value in (part.clean, part.sigma, part.conditioning)])


def copied(part: Part) -> Part:
    """The same values in tensors of their own."""
    return Part(*(_copy(value) for value in (part.clean, part.noise, part.sigma, part.conditioning, part.weight)))


def fill(target: Part, source: Part) -> None:
    """Copy the values of one part into another's tensors."""
    for name in ("clean", "noise", "sigma", "conditioning", "weight"):
        _fill(getattr(target, name), getattr(source, name))


def _sign(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, dict):
        return [(name, _sign(item)) for name, item in sorted(value.items())]
    return [_sign(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _fill(target: Any, source: Any) -> None:
    if isinstance(target, Tensor):
        target.copy_(source, non_blocking=True)
    elif isinstance(target, dict):
        for name, item in target.items():
            _fill(item, source[name])
    elif isinstance(target, list):
        for one, other in zip(target, source, strict=True):
            _fill(one, other)

"""Steps recorded as CUDA graphs and replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapters.network import AdaptiveNetwork
from ..util.memory import is_out_of_memory
from .optimizer import Optimizer
from .step import Loss, MicroBatch, StepRunner

log = logging.getLogger("lora2")


WARM_UP_RUNS = 2
"""Steps of a shape that run as written before it is recorded: libraries choose their kernels and buffers in them."""


MAX_GRAPHS = 12
"""Shapes that are recorded; further ones run as written."""


class GraphStepRunner(StepRunner):
    """Replays steps as CUDA graphs; falls back to running them as written, for good, where recording fails."""

    def __init__(self, network: AdaptiveNetwork, loss: Loss) -> None:
        super().__init__(network, loss)
        self.failed = False
        self._visits: dict[str, int] = {}
        self._graphs: dict[str, _Recorded] = {}
        self._update: _Recorded | None = None
        self._updates = 0
        self._pool: Any = None

    def backward(self, part: MicroBatch) -> Tensor:
        """As written the first times, then recorded, then replayed."""
        key = signature(part)
        if key not in self._graphs:
            visits = self._visits[key] = self._visits.get(key, 0) + 1
            if self.failed or visits <= WARM_UP_RUNS or len(self._graphs) >= MAX_GRAPHS:
                return super().backward(part)
            static = copied(part)
            recorded = self._record(lambda: super(GraphStepRunner, self).backward(static))
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
            if is_out_of_memory(error):
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


def step_runner(network: AdaptiveNetwork, loss: Loss, graphs: bool) -> StepRunner:
    """Graphs where they are wanted and the device can replay them."""
    return GraphStepRunner(network, loss) if graphs and network.device.type == "cuda" else StepRunner(network, loss)


def signature(part: MicroBatch) -> str:
    """What a graph is made for: shapes and types of all tensors, and every plain value."""
    return repr([_sign(value) for value in (part.clean, part.sigma, part.conditioning)])


def copied(part: MicroBatch) -> MicroBatch:
    """The same values in tensors of their own."""
    return MicroBatch(*(_copy(value) for value in (part.clean, part.noise, part.sigma, part.conditioning, part.weight)))


def fill(target: MicroBatch, source: MicroBatch) -> None:
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

"""Steps recorded as CUDA graphs and replayed.

A step of a large model is thousands of small kernels, and launching them takes longer than running them. A graph holds the
launches of one forward and backward pass for one shape; replaying it costs one launch. A graph reads and writes the memory
that it was recorded with: inputs are copied into its static tensors, and gradients accumulate in tensors that stay in place.
"""

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
"""Eager runs of a shape before it is recorded: libraries choose their kernels and buffers in them."""

MAX_GRAPHS = 12
"""Shapes that are recorded; further shapes run eagerly."""


class RecordedGraph:
    """A graph with its static tensors. inputs: written before a replay. output: written by the replay."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self.graph = graph
        self.output = output
        self.inputs: Any = None

    def replay(self) -> Tensor:
        """Run the graph; returns its static output."""
        self.graph.replay()
        return self.output


class GraphStepRunner(StepRunner):
    """Records the backward pass of every shape and the update, then replays them.

    disabled: steps run eagerly from now on, because recording failed or takes too much memory.
    """

    def __init__(self, network: AdaptiveNetwork, loss: Loss) -> None:
        super().__init__(network, loss)
        self.disabled = False
        self._eager_runs: dict[str, int] = {}
        self._graphs: dict[str, RecordedGraph] = {}
        self._update: RecordedGraph | None = None
        self._updates = 0
        self._pool: Any = None

    def backward(self, micro_batch: MicroBatch) -> Tensor:
        """Eager for the first runs of a shape, then recorded, then replayed."""
        key = signature(micro_batch)
        if key not in self._graphs:
            runs = self._eager_runs[key] = self._eager_runs.get(key, 0) + 1
            if self.disabled or runs <= WARM_UP_RUNS or len(self._graphs) >= MAX_GRAPHS:
                return super().backward(micro_batch)
            static = static_copy(micro_batch)
            recorded = self._record(lambda: super(GraphStepRunner, self).backward(static))
            if recorded is None:
                return super().backward(micro_batch)
            recorded.inputs = static
            self._graphs[key] = recorded
        recorded = self._graphs[key]
        copy_into(recorded.inputs, micro_batch)
        return recorded.replay().clone()

    def update(self, optimizer: Optimizer, loss: Tensor) -> Tensor:
        """Eager the first time, when the optimizer allocates its moments; then recorded and replayed."""
        self._updates += 1
        if self._update is None and not self.disabled and self._updates > 1:
            static = loss.clone()
            self._update = self._record(lambda: optimizer.apply(static))
            if self._update is not None:
                self._update.inputs = static
        if self._update is None:
            return optimizer.apply(loss)
        self._update.inputs.copy_(loss)
        return self._update.replay().clone()

    def _record(self, work: Callable[[], Tensor]) -> RecordedGraph | None:
        """Record `work`, which does not run; None, and disabled, if it holds an operation that a graph cannot."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = work()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.disabled = True
            self.reset()
            log.info("LoRA²: this model's steps cannot be recorded as CUDA graphs, so they run without them: %s", error)
            return None
        return RecordedGraph(graph, output)

    def reset(self) -> None:
        """Drop all graphs: they would train the memory of parameters that were replaced."""
        self._graphs.clear()
        self._update = None
        self._updates = 0
        self._pool = None
        torch.cuda.empty_cache()

    def save_memory(self) -> str | None:
        """Record no more: every graph keeps the memory that it works in."""
        if self.disabled or self._pool is None:
            return None
        self.disabled = True
        return "steps run without CUDA graphs, which is slower but takes less memory"


def step_runner(network: AdaptiveNetwork, loss: Loss, graphs: bool) -> StepRunner:
    """GraphStepRunner if graphs are wanted and the device has them."""
    return GraphStepRunner(network, loss) if graphs and network.device.type == "cuda" else StepRunner(network, loss)


def signature(micro_batch: MicroBatch) -> str:
    """The key of a graph: shapes and types of all tensors, and every plain value."""
    return repr([_sign(value) for value in (micro_batch.clean, micro_batch.sigma, micro_batch.conditioning)])


def static_copy(micro_batch: MicroBatch) -> MicroBatch:
    """The same values in tensors of their own."""
    m = micro_batch
    return MicroBatch(*(_copy(value) for value in (m.clean, m.noise, m.sigma, m.conditioning, m.weight)))


def copy_into(target: MicroBatch, source: MicroBatch) -> None:
    """Copy the tensors of one micro-batch into those of another."""
    for name in ("clean", "noise", "sigma", "conditioning", "weight"):
        _copy_into(getattr(target, name), getattr(source, name))


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


def _copy_into(target: Any, source: Any) -> None:
    if isinstance(target, Tensor):
        target.copy_(source, non_blocking=True)
    elif isinstance(target, dict):
        for name, item in target.items():
            _copy_into(item, source[name])
    elif isinstance(target, list):
        for one, other in zip(target, source, strict=True):
            _copy_into(one, other)

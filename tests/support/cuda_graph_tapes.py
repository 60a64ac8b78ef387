"""CUDA graphs as far as a CPU can stand in for them: the operations of a step on the memory that it was recorded with.

As on a GPU, recording leaves nothing done; a replay runs the same operations on the same addresses with the same plain numbers,
whatever Python has put in their place since; results between operations lie in memory of the recording's own; and whatever waits
for a value while recording is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from lora2.training.cuda_graph import GraphStepRunner, RecordedGraph
from lora2.training.trainer import Trainer

WAITS = ("_local_scalar_dense", "nonzero", "item", "equal")


def place(tensor: Tensor) -> int:
    """Where a tensor's memory begins."""
    return int(tensor.untyped_storage().data_ptr())


class Tape(TorchDispatchMode):
    """Notes every operation with the memory that it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.own: list[Tensor] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")
        if name[0] == "profiler":
            return func(*args, **(kwargs or {}))
        if name[1] in WAITS:
            raise RuntimeError(f"{name[1]} waits for a value: not permitted while a step is recorded")
        given = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs or {}))
        inputs = {place(v) for v in tree_flatten(given)[0] if isinstance(v, Tensor)}
        for tensor in written(func, *given):
            self.keep(tensor)
        out = func(*args, **(kwargs or {}))
        results = [v for v in tree_flatten(out)[0] if isinstance(v, Tensor)]
        fresh = [v.detach() for v in results if place(v) not in inputs]
        if fresh or func._schema.is_mutable:
            self.operations.append((func, *given, fresh))
        self.own += fresh
        return out

    def keep(self, tensor: Tensor) -> None:
        """What memory held before it is written to for the first time."""
        if place(tensor) not in self.before:
            flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before[place(tensor)] = flat, flat.clone()

    def undo(self) -> None:
        """Nothing has been done; results are not there yet."""
        for tensor in self.own:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        for flat, values in self.before.values():
            if not any(place(flat) == place(t) for t in self.own):
                flat.copy_(values)

    @torch.no_grad()
    def replay(self) -> None:
        """All operations again."""
        for func, args, kwargs, fresh in self.operations:
            results = [v for v in tree_flatten(func(*args, **kwargs))[0] if isinstance(v, Tensor)]
            if fresh:
                for target, value in zip(fresh, results, strict=True):
                    target.copy_(value)


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operation writes to."""
    for at, told in enumerate(func._schema.arguments):
        if told.alias_info is not None and told.alias_info.is_write:
            value = args[at] if at < len(args) else kwargs.get(told.name)
            yield from (v for v in tree_flatten(value)[0] if isinstance(v, Tensor))


class _Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self, tape: Tape, check: Callable[[], None]) -> None:
        self.tape, self.check = tape, check

    def replay(self) -> None:
        self.check()
        self.tape.replay()


class TapeStepRunner(GraphStepRunner):
    """GraphStepRunner with tapes for graphs. recorded, replayed, refused: how often."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.network, trainer.runner.loss)
        self.trainer = trainer
        self.recorded = self.replayed = self.refused = 0

    def _record(self, work: Callable[[], Tensor]) -> RecordedGraph | None:
        tape = Tape()
        try:
            with tape:
                output = work()
        except RuntimeError:
            tape.undo()
            self.disabled = True
            self.reset()
            self.refused += 1
            return None
        tape.undo()
        self.recorded += 1
        noted = places(self.trainer)

        def check() -> None:
            self.replayed += 1
            moved = sorted(name for name, at in places(self.trainer).items() if noted.get(name, at) != at)
            assert not moved, f"a recorded step would miss what has moved: {moved}"

        return RecordedGraph(_Graph(tape, check), output)  # type: ignore[arg-type]


def places(trainer: Trainer) -> dict[str, int]:
    """Where everything lies that steps read and write: by name."""
    network, optimizer = trainer.network, trainer.optimizer
    held: dict[str, Any] = {"theta": network.theta}
    if not network.pruned:
        held |= {"importance": network._importance, "shares": network._shares, "peak": network.peak}
    for i, adapter in enumerate(network.adapters):
        held |= {f"down {i}": adapter.down.data, f"up {i}": adapter.up.data}
        held |= {f"working {i} {n}": t for n, t in enumerate(adapter.working or ())}
        if network._flat is None or i not in network._flat.layers:
            held |= {f"gradient of down {i}": adapter.down.grad, f"gradient of up {i}": adapter.up.grad}
    for kind, inner in (("factors", optimizer.inner), ("blocks", optimizer.flat), ("theta", optimizer.theta)):
        for i, p in enumerate([] if inner is None else inner.param_groups[0]["params"]):
            held |= {f"{key} of {kind} {i}": value for key, value in inner.state.get(p, {}).items()}
        if inner is not None:
            held[f"rate of {kind}"] = inner.param_groups[0]["lr"]
    return {name: place(value) for name, value in held.items() if isinstance(value, Tensor)}


@contextmanager
def recordable() -> Iterator[None]:
    """While inside, the CPU's optimizers are made as those of a device that records."""
    import lora2.training.optimizer as module

    own, module.CAPTURABLE = module.CAPTURABLE, ("cpu",)
    try:
        yield
    finally:
        module.CAPTURABLE = own

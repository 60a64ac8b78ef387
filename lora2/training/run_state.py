"""The run's own part of a training state: progress, and how its steps are taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checkpoints.state import MAX_STEPS, State, raise_corrupted
from ..util.errors import LoraError
from .progress import Progress

MAX_PARAMETERS = 1 << 40
"""Upper bound for the number of parameters in a state; no adapter has as many."""


@dataclass
class RunState:
    """A run after `progress.step` steps; the states of the network, the optimizer and the batches lie beside it.

    size: parameters at the start or after the last cut. max_micro_batch: samples that run together, halved each time memory
    ran out. ranks_frozen: whether θ is final. resize_due: whether the last step left out the resize of the adapters.
    """

    progress: Progress
    size: int
    max_micro_batch: int
    ranks_frozen: bool
    resize_due: bool

    def state(self) -> State:
        """As a part of a training state."""
        progress = self.progress
        facts = {
            "step": progress.step,
            "cuts": list(progress.cuts),
            "pruned": progress.pruned,
            "size": self.size,
            "seconds": progress.seconds,
            "changes": list(progress.changes),
            "max_micro_batch": self.max_micro_batch,
            "ranks_frozen": self.ranks_frozen,
            "resize_due": self.resize_due,
        }
        return State({"losses": torch.tensor(progress.losses, dtype=torch.float64)}, facts)

    @classmethod
    def from_state(cls, state: State, steps: int) -> RunState:
        """The run to continue up to `steps` in all. Raises LoraError if that is reached already, or the state is damaged."""
        step = state.integer("step", 1, MAX_STEPS)
        if step >= steps:
            raise LoraError(
                f"This training state has {step} steps behind it already. To continue, set steps above {step}: it counts from "
                "the start of the run."
            )
        losses = state.tensor("losses", (step,), torch.float64, finite=False).tolist()
        cuts = list(state.list_of("cuts", int))
        if sorted(set(cuts)) != cuts or not all(0 <= cut <= step for cut in cuts):
            raise_corrupted("its cuts are out of bounds")
        progress = Progress(
            steps,
            step,
            losses,
            cuts=cuts,
            pruned=state.flag("pruned"),
            seconds=state.number("seconds", 0, 1e12),
            changes=list(state.list_of("changes", str)),
        )
        return cls(
            progress,
            state.integer("size", 1, MAX_PARAMETERS),
            state.integer("max_micro_batch", 1, MAX_STEPS),
            state.flag("ranks_frozen"),
            state.flag("resize_due"),
        )

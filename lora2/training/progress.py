"""Progress of a run, in plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Progress of a run.

    steps: planned in all. step: finished. losses: one per finished step, NaN for a skipped one. ranks: by layer, as of the
    last resize. cuts: the steps before which layers were pruned. pruned: whether the ranks are final. seconds: of training.
    changes: descriptions of what changed because memory ran out.
    """

    steps: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    pruned: bool = False
    seconds: float = 0.0
    changes: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> list[int]:
        """The skipped steps, counted from 1."""
        return [step for step, loss in enumerate(self.losses, 1) if math.isnan(loss)]

    @property
    def applied(self) -> int:
        """The number of finished steps that were not skipped."""
        return self.step - len(self.skipped)

    @property
    def phase(self) -> str:
        """Before the first cut "adapting", between the first and the last "pruning", after that "pruned"."""
        return "pruned" if self.pruned else "pruning" if self.cuts else "adapting"

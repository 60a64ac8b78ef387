"""Where a run is, in plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where a run is.

    losses: one per finished step, NaN for one that was skipped. ranks: by layer, as of the last time the arrays followed
    them. cuts: the steps before which layers were cut. pruned: whether the ranks are final. changes: what was changed on the
    way since memory ran out, in words.
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
        """The steps, counted from 1, that were not taken."""
        return [step for step, loss in enumerate(self.losses, 1) if math.isnan(loss)]

    @property
    def learned(self) -> int:
        """How many steps were taken."""
        return self.step - len(self.skipped)

    @property
    def phase(self) -> str:
        """The phase: "adapting" until layers are cut for the first time, "settling" until the last, then "pruned"."""
        return "pruned" if self.pruned else "settling" if self.cuts else "adapting"

"""Steps whose gradients are no numbers, and a loss that grows: which layers, how often, and when it is too much."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from ..adapters.network import AdaptiveNetwork
from ..config import TrainingConfig
from ..util.errors import LoraError
from ..util.text import escaped

if TYPE_CHECKING:
    from .progress import Progress

MOST_IN_A_ROW = 10
MOST_SHARE = 0.1
"""Skipped steps after which a run stops all the same: one after another, or of all its steps."""

MOST_NAMED = 3

WINDOW, TIMES = 50, 10.0
"""A loss has exploded when the median of so many steps is so many times the median of all steps before them.

Losses of single steps differ by factors of hundreds, since every step has its own noise level; medians do not: of losses
drawn from a log-normal law with σ = 1.5, in 100 runs of 2,000 steps, the largest ratio is 2.7 (tests/test_watch.py). The
lowest median so far in the place of the median so far would reach 17 with windows of 25.
"""


class Diverged(LoraError):
    """Gradients or the loss are no longer numbers. The network still holds the last good state."""


def bad_layers(names: Sequence[str], norms: Sequence[float]) -> list[str]:
    """The layers with a gradient that is not finite. norms: of every layer's two factors, one after the other."""
    pairs = zip(norms[0::2], norms[1::2], strict=True) if len(norms) == 2 * len(names) else ()
    return [name for name, pair in zip(names, pairs, strict=False) if not all(map(math.isfinite, pair))]


def describe_layers(layers: Sequence[str], of: int) -> str:
    """Some layers' names, and how many there are."""
    if not layers:
        return "in no layer's gradient"
    if len(layers) == of > MOST_NAMED:
        return f"in all {of} layers"
    named = ", ".join(escaped(name) for name in layers[:MOST_NAMED])
    more = len(layers) - MOST_NAMED
    return f"in {named}" + (f" and {more} more of {of} layers" if more > 0 else "")


class LossTracker:
    """Says once when the loss has exploded."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._before: list[float] = []
        self.said = False

    def ratio(self, loss: float) -> float:
        """Take in a step's loss; the recent median over that of all steps before, 0 while there are too few."""
        self._recent.append(loss)
        if len(self._recent) > WINDOW:
            insort(self._before, self._recent.popleft())
        if len(self._before) < WINDOW:
            return 0.0
        usual = self._before[len(self._before) // 2]
        return median(self._recent) / usual if usual > 0 else 0.0

    def note(self, step: int, loss: float) -> str | None:
        """Take in a step's loss; words to say, once, when it has exploded."""
        ratio = self.ratio(loss)
        if ratio <= TIMES or self.said:
            return None
        self.said = True
        return (
            f"The loss has grown: over the last {WINDOW} steps, up to step {step}, it was {ratio:.0f} times what it had been. "
            "The learning rate may be too high. Training goes on; if you cancel, what was learned is saved."
        )


class Monitor:
    """Takes in the result of every step: counts it, skips it, or stops the run."""

    def __init__(self, network: AdaptiveNetwork, config: TrainingConfig, say: Callable[[str], None]) -> None:
        self.network, self.config, self.say = network, config, say
        self.watch = LossTracker()
        self._in_a_row = self._skipped = 0

    def __call__(self, progress: Progress, loss: float, taken: bool, norms: Sequence[float], final: bool) -> None:
        """Note a step. norms: of its gradients. final: whether it may stop the run, by Diverged."""
        if taken:
            self._in_a_row = 0
            progress.losses.append(loss)
            progress.step += 1
            if words := self.watch.note(progress.step, loss):
                self.say(words)
        elif self.config.on_bad_step == "skip":
            self._skip(progress, self._fault(progress.step + 1, loss, norms), final)
        elif final:
            raise Diverged(f"{self._fault(progress.step + 1, loss, norms)}, and the step was not taken: {self._advice}")

    def remember(self, losses: Sequence[float]) -> None:
        """Know what a run that goes on has seen; nothing is said.

        Steps that were skipped then do not count towards too many: a run that was stopped for them could never go on.
        """
        for step, loss in enumerate(losses, 1):
            if not math.isnan(loss):
                self.watch.note(step, loss)

    def _skip(self, progress: Progress, fault: str, final: bool) -> None:
        self._in_a_row += 1
        self._skipped += 1
        progress.losses.append(math.nan)
        progress.step += 1
        if self._in_a_row == 1:
            self.say(f"{fault}, and the step was skipped.")
        if not final:
            return
        if progress.step == progress.steps and not progress.learned:
            raise Diverged(f"{fault}, and not one of the {progress.steps} steps could be taken: {self._advice}")
        if self._in_a_row >= MOST_IN_A_ROW or self._skipped > max(MOST_IN_A_ROW, MOST_SHARE * progress.steps):
            raise Diverged(
                f"{fault}, and so were {len(progress.skipped)} steps in all, which is too many: {self._advice}"
            )

    def _fault(self, step: int, loss: float, norms: Sequence[float]) -> str:
        """What is wrong with a step, and in which layers."""
        names = self.network.names
        what = "gradients are no longer numbers" if math.isfinite(loss) else f"loss became {loss}"
        words = f"The {what} at step {step} ({describe_layers(bad_layers(names, norms), len(names))})"
        broken = self.network.nonfinite_layers()
        return words + (
            f", the factors themselves are no longer numbers {describe_layers(broken, len(names))}" if broken else ""
        )

    @property
    def _advice(self) -> str:
        return (
            f"lower the learning rate (now {self.config.learning_rate:g}), check the latents, or train in bf16 or fp32."
        )

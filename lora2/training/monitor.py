"""Results of steps: recorded, skipped if not finite, and watched for a loss that explodes."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from ..adapters.network import AdaptiveNetwork
from ..config import TrainingConfig
from ..util.errors import LoraError
from ..util.text import escaped
from .progress import Progress

MAX_CONSECUTIVE_SKIPS = 10
MAX_SKIPPED_FRACTION = 0.1
"""Skipped steps after which a run stops: one after another, or of all its steps."""

MAX_NAMED_LAYERS = 3

WINDOW, EXPLOSION_RATIO = 50, 10.0
"""A loss has exploded when the median of the last WINDOW steps is EXPLOSION_RATIO times the median of all steps before them.

Losses of single steps differ by factors of hundreds, since every step has its own noise level; medians do not: of losses
drawn from a log-normal law with σ = 1.5, in 100 runs of 2,000 steps, the largest ratio is 2.7 (tests/unit/training/test_monitor.py). The
lowest median so far instead of the median so far would reach 17 with windows of 25.
"""


class Diverged(LoraError):
    """Gradients or the loss are no longer finite. The network still holds the last good factors."""


def layers_with_nonfinite_gradient(names: Sequence[str], norms: Sequence[float]) -> list[str]:
    """norms: of the gradients of every layer's two factors, one layer after the other."""
    pairs = zip(norms[0::2], norms[1::2], strict=True) if len(norms) == 2 * len(names) else ()
    return [name for name, pair in zip(names, pairs, strict=False) if not all(map(math.isfinite, pair))]


def describe_layers(layers: Sequence[str], total: int) -> str:
    """The first layers' names, and how many more there are."""
    if not layers:
        return "in no layer's gradient"
    if len(layers) == total > MAX_NAMED_LAYERS:
        return f"in all {total} layers"
    named = ", ".join(escaped(name) for name in layers[:MAX_NAMED_LAYERS])
    more = len(layers) - MAX_NAMED_LAYERS
    return f"in {named}" + (f" and {more} more of {total} layers" if more > 0 else "")


class LossTracker:
    """Warns once when the loss has exploded."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._before: list[float] = []
        self._warned = False

    def ratio(self, loss: float) -> float:
        """Add a step's loss; returns the recent median over the median of all steps before, 0 while there are too few."""
        self._recent.append(loss)
        if len(self._recent) > WINDOW:
            insort(self._before, self._recent.popleft())
        if len(self._before) < WINDOW:
            return 0.0
        usual = self._before[len(self._before) // 2]
        return median(self._recent) / usual if usual > 0 else 0.0

    def update(self, step: int, loss: float) -> str | None:
        """Add a step's loss; returns a warning, once, if the loss has exploded."""
        ratio = self.ratio(loss)
        if ratio <= EXPLOSION_RATIO or self._warned:
            return None
        self._warned = True
        return (
            f"The loss has grown: its median over the last {WINDOW} steps, up to step {step}, is {ratio:.0f} times the median "
            "before them. The learning rate may be too high. Training continues; if you cancel, the LoRA is saved as it is."
        )


class Monitor:
    """Records the result of every step; skips a step that is not finite, or stops the run."""

    def __init__(self, network: AdaptiveNetwork, config: TrainingConfig, notify: Callable[[str], None]) -> None:
        self.network, self.config, self.notify = network, config, notify
        self.losses = LossTracker()
        self._consecutive_skips = self._skips = 0

    def record(self, progress: Progress, loss: float, applied: bool, norms: Sequence[float], may_stop: bool) -> None:
        """Record a step in `progress`. norms: of its gradients. may_stop: whether to raise Diverged."""
        if applied:
            self._consecutive_skips = 0
            progress.losses.append(loss)
            progress.step += 1
            if warning := self.losses.update(progress.step, loss):
                self.notify(warning)
        elif self.config.on_bad_step == "skip":
            self._skip(progress, self._describe_fault(progress.step + 1, loss, norms), may_stop)
        elif may_stop:
            fault = self._describe_fault(progress.step + 1, loss, norms)
            raise Diverged(f"{fault}, and the step was not applied: {self._advice}")

    def replay(self, losses: Sequence[float]) -> None:
        """Add the losses of a resumed run, without warnings.

        Its skipped steps do not count as skips: otherwise, a run that was stopped for them could never be resumed.
        """
        for step, loss in enumerate(losses, 1):
            if not math.isnan(loss):
                self.losses.update(step, loss)

    def _skip(self, progress: Progress, fault: str, may_stop: bool) -> None:
        self._consecutive_skips += 1
        self._skips += 1
        progress.losses.append(math.nan)
        progress.step += 1
        if self._consecutive_skips == 1:
            self.notify(f"{fault}, and the step was skipped.")
        if not may_stop:
            return
        if progress.step == progress.steps and not progress.applied:
            raise Diverged(f"{fault}, and none of the {progress.steps} steps could be applied: {self._advice}")
        max_skips = max(MAX_CONSECUTIVE_SKIPS, MAX_SKIPPED_FRACTION * progress.steps)
        if self._consecutive_skips >= MAX_CONSECUTIVE_SKIPS or self._skips > max_skips:
            raise Diverged(
                f"{fault}. {len(progress.skipped)} steps were skipped in all, which is too many: {self._advice}"
            )

    def _describe_fault(self, step: int, loss: float, norms: Sequence[float]) -> str:
        names = self.network.names
        fault = "gradients are not finite" if math.isfinite(loss) else f"loss became {loss}"
        layers = describe_layers(layers_with_nonfinite_gradient(names, norms), len(names))
        factors = self.network.nonfinite_layers()
        suffix = f", the factors are not finite {describe_layers(factors, len(names))}" if factors else ""
        return f"The {fault} at step {step} ({layers}){suffix}"

    @property
    def _advice(self) -> str:
        return (
            f"lower the learning rate (now {self.config.learning_rate:g}), check the latents, or train in bf16 or fp32."
        )

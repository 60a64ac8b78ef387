"""Start of a run: from nothing, from a training state that it resumes, or from the factors of a state or a LoRA file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...lora2.adapters.layer import module_shape, round_up_capacity
from ...lora2.checkpoints.fingerprint import Fingerprint
from ...lora2.checkpoints.rules import compare_configs, config_from, merge_configs
from ...lora2.checkpoints.state import State, read_state
from ...lora2.config import TrainingConfig
from ...lora2.method.factors import cost, full_rank
from ...lora2.training.trainer import Trainer
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped
from .states import CheckpointSource, LoraSource
from .warm_start import WarmStartFactors, factors_of_lora, factors_of_state

REFUSE, FACTORS = "refuse", "start from its factors"
ON_DIFFERENCE = (REFUSE, FACTORS)

_FILE_SLACK = 1 << 26
"""Bytes of a state beside its factors and moments: header, losses, fingerprint."""

_ENVIRONMENT = {"torch": "PyTorch", "device": "the device", "dtype": "the number type"}


@dataclass(frozen=True)
class SavedRun:
    """A training state as read from its file."""

    path: Path
    name: str
    state: State
    fingerprint: Fingerprint
    config: TrainingConfig

    def factors(self, layers: Mapping[str, nn.Module]) -> WarmStartFactors:
        """Its factors for these layers."""
        return factors_of_state(self.name, self.state.part("network"), self.config.q, layers)


def open_source(
    source: CheckpointSource | LoraSource | None, layers: Mapping[str, nn.Module]
) -> SavedRun | LoraSource | None:
    """The source with a training state read and checked. Raises LoraError where it is corrupted or of another version."""
    if not isinstance(source, CheckpointSource):
        return source
    state = read_state(source.path, _max_bytes(layers))
    fingerprint = Fingerprint.restored(state.part("fingerprint"))
    return SavedRun(source.path, source.name, state, fingerprint, config_from(state.facts))


@dataclass
class RunStart:
    """How a run starts: it resumes `saved`, or starts from `factors`, or from nothing.

    config: to train with. messages: sentences for the user. rounding: why the steps of a resumed run are not the same bit for
    bit, as clauses.
    """

    config: TrainingConfig
    saved: SavedRun | None = None
    factors: WarmStartFactors | None = None
    messages: list[str] = field(default_factory=list)
    rounding: list[str] = field(default_factory=list)

    def apply(self, trainer: Trainer) -> None:
        """Bring a new trainer to the start, and complete `messages`. State and factors are dropped: they may be large."""
        if self.saved is not None:
            trainer.restore(self.saved.state)
            self.messages.insert(0, f"Resumes after step {trainer.progress.step} of {escaped(self.saved.name)}.")
            self.saved = None
        elif self.factors is not None:
            self.messages[:0] = self.factors.apply(trainer)
            self.factors = None


def plan_start(
    source: SavedRun | LoraSource | None,
    fingerprint: Fingerprint,
    config: TrainingConfig,
    on_difference: str,
    model: Any,
    layers: Mapping[str, nn.Module],
) -> RunStart:
    """Decide how a run starts, before its model is loaded. Raises LoraError where the source does not fit."""
    if source is None:
        return RunStart(config)
    if isinstance(source, LoraSource):
        return RunStart(config, factors=factors_of_lora(source.name, source.document, model, layers))
    different, rounding = fingerprint.compare_data(source.fingerprint)
    pruned, frozen = source.state.part("network").flag("pruned"), source.state.part("run").flag("ranks_frozen")
    preventing, changed = compare_configs(config, source.config, pruned, frozen)
    if different or preventing:
        return _start_from_factors(source, [*different, *preventing], on_difference, config, layers)
    messages = [f"From here on {change}." for change in changed]
    return RunStart(merge_configs(config, source.config), source, messages=messages, rounding=rounding)


def check_model(
    start: RunStart,
    fingerprint: Fingerprint,
    environment: Mapping[str, str],
    config: TrainingConfig,
    on_difference: str,
    layers: Mapping[str, nn.Module],
) -> RunStart:
    """The same start, once the loaded model has been compared with that of a resumed run.

    config: of a run that does not resume. Raises LoraError where the models differ and that is refused.
    """
    saved = start.saved
    if saved is None:
        return start
    if different := fingerprint.compare_model(saved.fingerprint):
        start.saved = None
        return _start_from_factors(saved, different, on_difference, config, layers)
    before = saved.state.part("environment")
    changed = {key: before.text(key) for key, now in environment.items() if before.text(key) != now}
    start.rounding += [
        f"{_ENVIRONMENT[key]} is {environment[key]}, it was {escaped(was)}" for key, was in changed.items()
    ]
    if start.rounding:
        start.messages.append(
            f"The steps are close to those of an uninterrupted run but not the same bit for bit: {'; '.join(start.rounding)}."
        )
    return start


def _start_from_factors(
    saved: SavedRun,
    different: Sequence[str],
    on_difference: str,
    config: TrainingConfig,
    layers: Mapping[str, nn.Module],
) -> RunStart:
    """A new run from the factors of a state that belongs to another run. Raises LoraError where that is to be refused."""
    differences = "; ".join(different)
    if on_difference == REFUSE:
        raise LoraError(
            f"The training state {escaped(saved.name)} belongs to another run: {differences}. Set these as they were, or set "
            f"on_difference to '{FACTORS}' for a new run that starts from the factors of the state."
        )
    return RunStart(config, factors=saved.factors(layers), messages=[f"A new run: {differences}."])


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Everything beside the inputs that decides a run's bits."""
    return {"torch": str(torch.__version__), "device": device.type, "dtype": str(dtype).removeprefix("torch.")}


def _max_bytes(layers: Mapping[str, nn.Module]) -> int:
    """Upper bound of a state's bytes: factors and two moments in float32 at full rank; at least 1 GiB."""
    shapes = [module_shape(m) for m in layers.values()]
    return max(1 << 30, 12 * sum(round_up_capacity(full_rank(s)) * cost(s) for s in shapes) + _FILE_SLACK)

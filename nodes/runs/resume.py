"""How a run begins: from nothing, where a training state stopped, or from factors that were learned before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...lora2.adapters.layer import module_shape, round_up_capacity
from ...lora2.checkpoints.fingerprint import Fingerprint
from ...lora2.checkpoints.rules import compare_configs, config_from, merge_configs
from ...lora2.checkpoints.state import State, read_state
from ...lora2.config import TrainingConfig
from ...lora2.method.factors import Factors, cost, full_rank
from ...lora2.training.trainer import Trainer
from ...lora2.training.warm_start import factors_from_state
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped
from ..comfy.apply_lora import MAX_NAMED
from ..comfy.dataset import Caption
from .fingerprint import digests_of
from .states import CheckpointSource, LoraSource
from .warm_start import WarmStartFactors, factors_for

REFUSE, FACTORS = "refuse", "start from its factors"
ON_DIFFERENCE = (REFUSE, FACTORS)

_FILE_SLACK = 1 << 26
"""Bytes of a state beside its arrays: header, losses, fingerprints."""


@dataclass(frozen=True)
class SavedRun:
    """A training state that a run may go on from: what to call it, all that it holds, and what its run was made of."""

    name: str
    state: State
    origin: Fingerprint
    words: list[str] = field(default_factory=list)

    def in_order(self, images: list[Tensor], captions: list[Caption]) -> tuple[list[Tensor], list[Caption]]:
        """The same pictures and captions in the order of the state's run, which `incompatibility_message` then say; others as they are.

        A folder lists its files in an order of its own, on another disk in another one.
        """
        order = self.origin.order(*digests_of(images, captions))
        if order is None or order == sorted(order):
            return images, captions
        self.words.append(
            "The pictures come in another order than in the state's run: they are taken in the order of that run."
        )
        return [images[i] for i in order], [captions[i] for i in order]


def open_source(
    source: CheckpointSource | LoraSource | None, layers: Mapping[str, nn.Module]
) -> SavedRun | LoraSource | None:
    """The same source with a state read whole; raises LoraError where it is damaged."""
    if not isinstance(source, CheckpointSource):
        return source
    state = read_state(source.path, _most_bytes(layers))
    return SavedRun(source.name, state, Fingerprint.restored(state.part("origin")))


@dataclass
class RunStart:
    """What a run begins with: a state to go on from, or factors to start from, or neither; and what to say of it.

    settings: those to train with. words: sentences for the person at the graph.
    """

    config: TrainingConfig
    state: State | None = None
    borrowed: WarmStartFactors | None = None
    name: str = ""
    words: list[str] = field(default_factory=list)

    def apply(self, trainer: Trainer) -> None:
        """Bring a new trainer there; `incompatibility_message` then tell what came of it."""
        if self.state is not None:
            trainer.restore(self.state)
            step = trainer.progress.step
            self.words.insert(0, f"Goes on after step {step} of {escaped(self.name)}.")
        elif self.borrowed is not None:
            self.words[:0] = _start(trainer, self.borrowed, self.name)
        self.state = None  # it may be large


def decide_start(
    source: SavedRun | LoraSource | None,
    on_difference: str,
    config: TrainingConfig,
    model: Any,
    layers: Mapping[str, nn.Module],
    origin: Callable[[], Fingerprint],
    about: Mapping[str, str],
) -> RunStart:
    """Decide how a run begins; raises LoraError where its state belongs to another run and that is to be refused.

    about: what the run is computed with; where a state's differs, its steps are not the same bit for bit, which is said.
    """
    if source is None:
        return RunStart(config)
    if isinstance(source, LoraSource):
        return RunStart(config, borrowed=factors_for(source.document, model, layers), name=source.name)
    state, old = source.state, config_from(source.state.facts)
    network = state.part("network")
    wrong, rounded = origin().against(source.origin)
    unfit, changed = compare_configs(config, old, network.flag("pruned"), state.part("run").flag("ranks_frozen"))
    wrong += unfit
    if not wrong:
        words = [*source.words, *(f"From here on {c}." for c in changed)]
        rounded += _computed_otherwise(state.part("about"), about)
        if rounded:
            words.append(
                f"Its steps are close to those of an unbroken run but not the same bit for bit: {'; '.join(rounded)}."
            )
        return RunStart(merge_configs(config, old), state=state, name=source.name, words=words)
    if on_difference == REFUSE:
        raise LoraError(
            f"The training state {escaped(source.name)} is of another run: {'; '.join(wrong)}. Set it as it was, or set "
            f"on_difference to '{FACTORS}' for a new run that starts with what the state had learned."
        )
    borrowed = _of_state(factors_from_state(network, old.q), layers)
    words = [f"A new run, since {'; '.join(wrong)}.", *source.words]
    return RunStart(config, borrowed=borrowed, name=source.name, words=words)


def _start(trainer: Trainer, borrowed: WarmStartFactors, name: str) -> list[str]:
    started = trainer.warm_start(borrowed.factors)
    words = [f"Starts from {escaped(name)}: {len(started.taken)} of {len(trainer.network.names)} layers taken."]
    if started.cut:
        words.append(f"{_named(started.cut)} cut to max_rank.")
    if started.fresh:
        words.append(f"{_named(started.fresh)} started fresh.")
    return [*words, *([borrowed.words()] if borrowed.left else [])]


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{len(names)} ({', '.join(escaped(n) for n in names[:MAX_NAMED])}{more})"


def _of_state(factors: Mapping[str, Factors], layers: Mapping[str, nn.Module]) -> WarmStartFactors:
    """A state's factors for the layers that are trained now; raises LoraError where there are none."""
    borrowed = WarmStartFactors({})
    for name, found in factors.items():
        if name not in layers:
            borrowed.leave(name, "not trained here")
        elif (found.up.shape[0], *found.down.shape[1:]) != module_shape(layers[name]):
            borrowed.leave(name, "have another size than the layer here")
        else:
            borrowed.factors[name] = found
    if not borrowed.factors:
        raise LoraError(f"Nothing in this training state belongs to a layer that is trained here. {borrowed.words()}")
    return borrowed


def about_run(device: torch.device, compute: torch.dtype) -> dict[str, str]:
    """What a run is computed with, as far as the same bits depend on it."""
    return {"torch": str(torch.__version__), "device": device.type, "type": str(compute).removeprefix("torch.")}


def _computed_otherwise(before: State, now: Mapping[str, str]) -> list[str]:
    kinds = {"torch": "PyTorch", "device": "the device", "type": "the number type"}
    other = {key: then for key in kinds if (then := before.text(key)) != now[key]}
    return [f"{kinds[key]} is {now[key]}, it was {escaped(then)}" for key, then in other.items()]


def _most_bytes(layers: Mapping[str, nn.Module]) -> int:
    """What a state of these layers takes at most, in bytes: factors and two moments in float32 at full rank; at least 1 GiB."""
    shapes = [module_shape(m) for m in layers.values()]
    return max(1 << 30, 12 * sum(round_up_capacity(full_rank(s)) * cost(s) for s in shapes) + _FILE_SLACK)

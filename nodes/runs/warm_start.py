"""Factors that a run starts from: those of a LoRA file or of a training state, for the layers that it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import torch
from torch import Tensor, nn

from ...lora2.adapters.layer import module_shape
from ...lora2.checkpoints.state import State
from ...lora2.files.document import LoraDocument
from ...lora2.files.families import describe_family, text_width
from ...lora2.method.factors import Factors
from ...lora2.training.trainer import Trainer
from ...lora2.training.warm_start import factors_from_state
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped
from ..comfy.apply_lora import mismatch_reason, other_layers, with_host_names
from ..comfy.layers import PREFIX

MAX_NAMED = 5
"""Layers that a message names."""

_NOT_TRAINED = "not trained here"


@dataclass
class WarmStartFactors:
    """Factors by layer path, and the names of layers that cannot be used, by reason. source: name of the file they are from."""

    source: str
    factors: dict[str, Factors] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, name: str, reason: str) -> None:
        """Record a layer that cannot be used."""
        self.unused.setdefault(reason, []).append(name)

    def unused_message(self) -> str:
        """Sentences about the layers that cannot be used; empty without any."""
        return " ".join(f"{len(names)} not used ({reason}): {_first(names)}." for reason, names in self.unused.items())

    def apply(self, trainer: Trainer) -> list[str]:
        """Start a new trainer from these factors; returns sentences about it."""
        start = trainer.warm_start(self.factors)
        total = len(trainer.network.names)
        messages = [f"Starts from {escaped(self.source)}: {len(start.taken)} of {total} layers used."]
        if start.cut:
            messages.append(f"{len(start.cut)} ({_first(start.cut)}) cut to max_rank.")
        if start.fresh:
            messages.append(f"{len(start.fresh)} ({_first(start.fresh)}) start without.")
        return [*messages, *filter(None, [self.unused_message()])]


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(escaped(name) for name in names[:MAX_NAMED]) + more


def factors_of_state(source: str, network: State, q: float, layers: Mapping[str, nn.Module]) -> WarmStartFactors:
    """The factors of a training state's network for these layers. Raises LoraError where there are none. q: of its run."""
    start = WarmStartFactors(source)
    for name, factors in factors_from_state(network, q).items():
        if name not in layers:
            start.skip(name, _NOT_TRAINED)
        elif (factors.up.shape[0], *factors.down.shape[1:]) != module_shape(layers[name]):
            start.skip(name, "have another size than the layer here")
        else:
            start.factors[name] = factors
    if not start.factors:
        raise LoraError(f"No layer of this training state is trained here. {start.unused_message()}")
    return start


def factors_of_lora(
    source: str, document: LoraDocument, model: Any, layers: Mapping[str, nn.Module]
) -> WarmStartFactors:
    """The plain layers of a LoRA file for these layers. Raises LoraError where there are none.

    Parts of a fused projection (q, k and v in files of other trainers) are joined; their ranks add up.
    """
    document = with_host_names(document)
    keys = _with_peft_names(comfy.lora.model_lora_keys_unet(model, {}))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    start = WarmStartFactors(source)
    for name in other_layers(document):
        start.skip(name, "no plain LoRA layer")
    for name, factors in document.layers.items():
        if name.startswith(("lora_te", "text_encoder")):
            start.skip(name, "text encoder, which is not trained")
            continue
        reason = mismatch_reason(name, keys, shapes, factors, None)
        if reason:
            start.skip(name, reason)
            continue
        key, *part = keys[name] if isinstance(keys[name], tuple) else (keys[name],)
        layer = key.removeprefix(PREFIX).removesuffix(".weight")
        if layer not in layers:
            start.skip(name, _NOT_TRAINED)
            continue
        fitted = _fitted(factors, module_shape(layers[layer]), part)
        if fitted is None or (not part and layer in start.factors):
            start.skip(name, "given twice, or in an unknown layout")
            continue
        other_part = start.factors.get(layer)
        start.factors[layer] = fitted if other_part is None else _joined(other_part, fitted)
    _check_fit(start, document, model)
    return start


def _check_fit(start: WarmStartFactors, document: LoraDocument, model: Any) -> None:
    """Raise LoraError where a file is for a model that reads another text, or has no factors that can be used."""
    width, own_width = text_width(document.layers), model.model_config.unet_config.get("context_dim")
    foreign = width is not None and isinstance(own_width, int) and width != own_width
    if foreign or not start.factors:
        problem = "does not fit this model" if foreign else "has no layer that is trained here"
        raise LoraError(
            f"This LoRA was made for {describe_family(document)} and {problem}. {start.unused_message()} Choose another file, the "
            "model that it belongs to, or other layers."
        )


def _with_peft_names(keys: Mapping[str, Any]) -> dict[str, Any]:
    """ComfyUI's names of layers, and those of current diffusers and PEFT: without `processor`, or below a prefix."""
    added: dict[str, Any] = {}
    for name, target in keys.items():
        if ".processor." in name:
            short = name.replace(".processor.", ".")
            for alias in (short, f"{short}.0") if short.endswith("to_out") else (short,):
                added |= {alias: target, f"base_model.model.{alias}": target}
    return {**added, **keys}


def _fitted(factors: Factors, shape: tuple[int, ...], part: list[Any]) -> Factors | None:
    """Factors in the shape of their layer's weight, at scale 1; None where they do not fit.

    part: empty, or the (axis, start, length) of the weight's rows that they are for.
    """
    up, down = factors.up.detach().float(), factors.down.detach().float()
    rank = factors.rank
    if down[0].numel() != torch.Size(shape[1:]).numel():
        return None
    rows = up.reshape(up.shape[0], rank) * factors.scale
    if part:
        if len(part) != 1 or part[0][0] != 0 or part[0][1] + part[0][2] > shape[0] or part[0][2] != len(rows):
            return None
        all_rows = rows.new_zeros(shape[0], rank)
        all_rows[part[0][1] : part[0][1] + part[0][2]] = rows
        rows = all_rows
    if rows.shape[0] != shape[0]:
        return None
    return Factors(rows.reshape(shape[0], rank, *(1,) * (len(shape) - 2)), down.reshape(rank, *shape[1:]), float(rank))


def _joined(one: Factors, other: Factors) -> Factors:
    """Factors of the sum of two updates of one layer, both at scale 1."""
    up: Tensor = torch.cat([one.up, other.up], dim=1)
    return Factors(up, torch.cat([one.down, other.down]), float(one.rank + other.rank))

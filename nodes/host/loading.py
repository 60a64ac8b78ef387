"""A LoRA onto a model, as the host's own loader does it, but saying what fits and what does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
from torch import Tensor, nn

from ...lora2.errors import LoraError
from ...lora2.family import family_in
from ...lora2.format import LoraDocument
from ...lora2.keys import shown

NAMED = 5
"""How many layers a message names."""


@dataclass(frozen=True)
class Match:
    """Layers of a file that fit the model or the text encoder, those that do not, and those of another size."""

    fitting: list[str]
    unknown: list[str]
    misshapen: list[str]

    def words(self) -> str:
        """One sentence for each kind that is not empty."""
        total = len(self.fitting) + len(self.unknown) + len(self.misshapen)
        said = [f"{len(self.fitting)} of {total} layers loaded"]
        for names, what in (
            (self.unknown, "belong to no layer here"),
            (self.misshapen, "have another size than the layer here"),
        ):
            if names:
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                said.append(f"{len(names)} {what}: {', '.join(shown(n) for n in names[:NAMED])}{more}")
        return "; ".join(said) + "."


def match(document: LoraDocument, model: Any, clip: Any) -> Match:
    """Which layers of a document the host will apply; raises LoraError when none fits."""
    keys: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    modules: list[nn.Module] = [model.model]
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        modules.append(clip.cond_stage_model)
    shapes = {name: tuple(p.shape) for module in modules for name, p in module.named_parameters()}
    converted = comfy.lora_convert.convert_lora(dict(document.state_dict()))
    loaded = comfy.lora.load_lora(converted, keys, log_missing=False)
    targets = {name: target for name, target in keys.items() if _key(target) in {_key(k) for k in loaded}}
    fitting, unknown, misshapen = [], [], []
    for name, factors in document.layers.items():
        target = targets.get(name)
        if target is None:
            unknown.append(name)
        elif isinstance(target, str) and _size(shapes.get(target)) not in (
            None,
            (factors.up.shape[0], factors.down.shape[1:].numel()),
        ):
            misshapen.append(name)
        else:
            fitting.append(name)
    result = Match(fitting, unknown, misshapen)
    rest = any(True for _ in document.other) and len(loaded) > len(fitting) + len(misshapen)
    if not fitting and not rest:
        raise LoraError(
            f"This LoRA was made for {family_in(document)} and does not fit this model, which is {type(model.model).__name__} "
            f"({type(model.model.model_config).__name__}): {result.words()} Connect the model that the LoRA belongs to."
        )
    return result


def _key(target: Any) -> str:
    """The weight's name; slices of fused projections carry it first."""
    return target if isinstance(target, str) else target[0]


def _size(shape: tuple[int, ...] | None) -> tuple[int, int] | None:
    """(d_out, d_in · kernel) of a weight, None for what is unknown."""
    if shape is None or len(shape) < 2:
        return None
    inside = 1
    for n in shape[1:]:
        inside *= n
    return shape[0], inside


def apply(
    model: Any, clip: Any, tensors: dict[str, Tensor], strength_model: float, strength_clip: float
) -> tuple[Any, Any]:
    """The model and text encoder with these tensors applied by the host's own loader."""
    return comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip)

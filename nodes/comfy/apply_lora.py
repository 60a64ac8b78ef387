"""A LoRA onto a model, as the host's own loader does it, but saying what fits and what does not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor, nn

from ...lora2.files.document import LoraDocument, parse
from ...lora2.files.families import describe_family, family_of_width, text_width
from ...lora2.files.keys import KEY_STYLES, stems
from ...lora2.method.factors import Factors
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped

log = logging.getLogger("lora2")

NAMED = 5
"""How many layers a message names."""


_HALVES = tuple(suffix for pair in KEY_STYLES.values() for suffix in pair)


def is_model(value: Any) -> bool:
    """Whether a value is a diffusion model as the host hands them from node to node."""
    return hasattr(getattr(value, "model", None), "diffusion_model") and hasattr(value, "clone")


def is_clip(value: Any) -> bool:
    """Whether a value is a text encoder as the host hands them from node to node."""
    return hasattr(value, "cond_stage_model") and hasattr(value, "clone")


@dataclass(frozen=True)
class Match:
    """Layers of a file that fit the model or the text encoder, and those that do not: by reason, their names.

    keys: the host's names for the weights of the model and the text encoder.
    """

    fitting: list[str]
    others: dict[str, list[str]]
    keys: dict[str, Any] = field(default_factory=dict)

    def words(self) -> str:
        """One sentence: how many fit, and for each reason how many do not, with the first names."""
        total = len(self.fitting) + sum(map(len, self.others.values()))
        said = [f"{len(self.fitting)} of {total} layers loaded"]
        for reason, names in self.others.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            said.append(f"{len(names)} {reason}: {', '.join(escaped(n) for n in names[:NAMED])}{more}")
        return "; ".join(said) + "."


def match(document: LoraDocument, model: Any, clip: Any) -> Match:
    """Which layers of a document the host will apply; raises LoraError when none fits, or for another family of UNets."""
    keys: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    modules: list[nn.Module] = [model.model]
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        modules.append(clip.cond_stage_model)
    shapes = {name: tuple(p.shape) for module in modules for name, p in module.named_parameters()}
    document = with_host_names(document)
    fitting: list[str] = []
    others: dict[str, list[str]] = {}
    for name in (*document.layers, *other_layers(document)):
        reason = mismatch_reason(name, keys, shapes, document.layers.get(name), clip)
        (others.setdefault(reason, []) if reason else fitting).append(name)
    result = Match(fitting, others, keys)
    width = text_width(document.layers)
    own_width = model.model.model_config.unet_config.get("context_dim")
    foreign = width is not None and isinstance(own_width, int) and width != own_width
    if foreign or not fitting:
        raise LoraError(
            f"This LoRA was made for {describe_family(document)} and does not fit this model, which is {_family_of(model)}: "
            f"{result.words()} Connect the model that the LoRA belongs to."
        )
    return result


def with_host_names(document: LoraDocument) -> LoraDocument:
    """The document under the names that the host gives to layers of some trainers."""
    tensors = document.state_dict()
    converted = comfy.lora_convert.convert_lora(dict(tensors))
    return document if converted.keys() == tensors.keys() else parse(converted)


def other_layers(document: LoraDocument) -> list[str]:
    """Layers of other kinds, such as LoKr or pairs of whole numbers, by prefix; tensors that belong to nothing, by key."""
    pairs = {
        prefix + suffix: prefix
        for up, down in KEY_STYLES.values()
        for prefix in (key.removesuffix(up) for key in document.other if key.endswith(up))
        if prefix + down in document.other
        for suffix in (up, down, ".alpha")
    }
    names = [pairs.get(name, name) for name in document.uncut()]
    return [name for name in dict.fromkeys(names) if not any(stem in document.layers for stem in stems(name))]


def mismatch_reason(
    name: str, keys: dict[str, Any], shapes: dict[str, tuple[int, ...]], factors: Factors | None, clip: Any
) -> str:
    """Why the host will not apply a layer; empty when it will."""
    if factors is None and name.endswith(_HALVES):
        return "are half of a pair, which nothing can apply"
    if factors is not None and factors.rank == 0:
        return "have rank 0 and change nothing"
    names = [name] if factors is not None else [name, *stems(name)]
    target = next((keys[n] for n in names if n in keys), None)
    if target is None:
        for_text = name.startswith(("lora_te", "text_encoder"))
        return "need a text encoder (connect clip)" if clip is None and for_text else "belong to no layer here"
    own = _size(shapes.get(target)) if isinstance(target, str) else None  # slices of fused projections are tuples
    if factors is None or own in (None, (factors.up.shape[0], factors.down.shape[1:].numel())):
        return ""
    return "have another size than the layer here"


def _family_of(model: Any) -> str:
    """The model's family in words: as for files where its text width tells, else the host's name for it."""
    config = model.model.model_config
    width = config.unet_config.get("context_dim")
    kind = type(config).__name__
    return f"{family_of_width(width)} ({kind})" if isinstance(width, int) else kind


def _size(shape: tuple[int, ...] | None) -> tuple[int, int] | None:
    """(d_out, d_in · kernel) of a weight, None for what is unknown."""
    if shape is None or len(shape) < 2:
        return None
    inside = 1
    for n in shape[1:]:
        inside *= n
    return shape[0], inside


def apply_lora(
    model: Any,
    clip: Any,
    tensors: dict[str, Tensor],
    strength_model: float,
    strength_clip: float,
    metadata: dict[str, str] | None = None,
    keys: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """The model and text encoder with these tensors applied as the host's own loader does it.

    keys: the host's names, of `match`. Where every tensor belongs to one of them, the host is asked for those alone: its own
    loader makes all names anew and looks for each in ten kinds of layers, which takes longer than all the rest.
    """
    load = comfy.sd.load_lora_for_models
    if "lora_metadata" not in signature(load).parameters:  # older hosts take none
        return load(model, clip, tensors, strength_model, strength_clip)
    converted = comfy.lora_convert.convert_lora(tensors)
    named = None if keys is None else _named(converted, keys)
    if named is None:
        return load(model, clip, tensors, strength_model, strength_clip, lora_metadata=metadata)
    loaded = comfy.lora.load_lora(converted, named)
    new_model, new_clip = model.clone(), None if clip is None else clip.clone()
    known = set(new_model.add_patches(loaded, strength_model))
    if metadata:
        new_model.set_attachments("lora_metadata", metadata)
    if new_clip is not None:
        known |= set(new_clip.add_patches(loaded, strength_clip))
        if metadata:
            new_clip.patcher.set_attachments("lora_metadata", metadata)
    for target in loaded:
        if target not in known:
            log.warning("NOT LOADED %s", target)
    return new_model, new_clip


def _named(tensors: Mapping[str, Tensor], keys: Mapping[str, Any]) -> dict[str, Any] | None:
    """The host's names that tensors' keys begin with, in its own order; None if a tensor belongs to none of them."""
    found: set[str] = set()
    for key in tensors:
        mine = [stem for stem in stems(key) if stem in keys]
        if not mine:
            return None
        found.update(mine)
    return {name: target for name, target in keys.items() if name in found}


def absent(why: str) -> ExecutionBlocker:
    """An output that is not there: a node that is connected to it stops and says why, the others run."""
    return ExecutionBlocker(why)

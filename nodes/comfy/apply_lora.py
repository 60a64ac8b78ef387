"""Applying a LoRA to a model as ComfyUI's loader does, with a report on the layers that do not fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor, nn

from ...lora2.files.document import LoraDocument, parse
from ...lora2.files.families import describe_family, family_of_width, text_width
from ...lora2.files.keys import KEY_STYLES, stems
from ...lora2.method.factors import Factors
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped

log = logging.getLogger("lora2")

MAX_NAMED = 5
"""Layers that a message names."""

_PAIR_SUFFIXES = tuple(suffix for pair in KEY_STYLES.values() for suffix in pair)


def is_model(value: Any) -> bool:
    """Whether a value is a diffusion model (ModelPatcher) of the host."""
    return hasattr(getattr(value, "model", None), "diffusion_model") and hasattr(value, "clone")


def is_clip(value: Any) -> bool:
    """Whether a value is a text encoder (CLIP) of the host."""
    return hasattr(value, "cond_stage_model") and hasattr(value, "clone")


@dataclass(frozen=True)
class LayerMatch:
    """Which layers of a file the host applies.

    applied: their names. skipped: names of the others, by reason. host_names: see `host_layer_names`.
    """

    applied: list[str]
    skipped: dict[str, list[str]]
    host_names: dict[str, Any]

    def describe(self) -> str:
        """One sentence: how many layers are applied, and how many are not for each reason, with the first names."""
        total = len(self.applied) + sum(map(len, self.skipped.values()))
        parts = [f"{len(self.applied)} of {total} layers loaded"]
        for reason, names in self.skipped.items():
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            parts.append(f"{len(names)} {reason}: {', '.join(escaped(n) for n in names[:MAX_NAMED])}{more}")
        return "; ".join(parts) + "."


def match_layers(document: LoraDocument, model: Any, clip: Any) -> LayerMatch:
    """Find the layers of a document that the host will apply.

    Raises LoraError if there are none, or if the document was trained for another family of UNets.
    """
    host_names = host_layer_names(model, clip)
    modules: list[nn.Module] = [model.model, *([] if clip is None else [clip.cond_stage_model])]
    shapes = {name: tuple(p.shape) for module in modules for name, p in module.named_parameters()}
    document = with_host_names(document)
    match = LayerMatch([], {}, host_names)
    for name in (*document.layers, *other_layers(document)):
        reason = mismatch_reason(name, host_names, shapes, document.layers.get(name), clip)
        (match.skipped.setdefault(reason, []) if reason else match.applied).append(name)
    config = model.model.model_config
    width, own_width = text_width(document.layers), config.unet_config.get("context_dim")
    foreign = width is not None and isinstance(own_width, int) and width != own_width
    if foreign or not match.applied:
        kind = type(config).__name__
        family = f"{family_of_width(own_width)} ({kind})" if isinstance(own_width, int) else kind
        raise LoraError(
            f"This LoRA was made for {describe_family(document)} and does not fit this model, which is {family}: "
            f"{match.describe()} Connect the model that the LoRA belongs to."
        )
    return match


def host_layer_names(model: Any, clip: Any) -> dict[str, Any]:
    """Every name that the host knows for a layer in LoRA files, with the key of its weight (and a slice of it)."""
    names: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    return names if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)


def with_host_names(document: LoraDocument) -> LoraDocument:
    """The document with the names to which the host converts the layers of some trainers."""
    tensors = document.state_dict()
    converted = comfy.lora_convert.convert_lora(dict(tensors))
    return document if converted.keys() == tensors.keys() else parse(converted)


def other_layers(document: LoraDocument) -> list[str]:
    """Layers of other kinds, such as LoKr or integer pairs, by prefix; other tensors by key."""
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
    name: str, host_names: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Factors | None, clip: Any
) -> str:
    """Why the host will not apply a layer, as a verb phrase; empty if it will. factors: None for other kinds of layers."""
    if factors is None and name.endswith(_PAIR_SUFFIXES):
        return "are half of a pair, which nothing can apply"
    if factors is not None and factors.rank == 0:
        return "have rank 0 and change nothing"
    candidates = [name] if factors is not None else [name, *stems(name)]
    target = next((host_names[n] for n in candidates if n in host_names), None)
    if target is None:
        for_text = name.startswith(("lora_te", "text_encoder"))
        return "need a text encoder (connect clip)" if clip is None and for_text else "belong to no layer here"
    shape = shapes.get(target, ()) if isinstance(target, str) else ()  # a tuple is a slice of a fused projection
    if factors is None or len(shape) < 2:
        return ""
    same = (shape[0], math.prod(shape[1:])) == (factors.up.shape[0], factors.down.shape[1:].numel())
    return "" if same else "have another size than the layer here"


def apply_lora(
    model: Any,
    clip: Any,
    tensors: dict[str, Tensor],
    strength_model: float,
    strength_clip: float,
    metadata: dict[str, str] | None = None,
    host_names: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Clones of the model and the text encoder with these tensors applied.

    The same as the host's `load_lora_for_models`, except that only the names that occur in the tensors are looked up: the host
    tries all of its names in all kinds of layers, which takes longer than everything else. host_names: of `match_layers`.
    """
    names = host_layer_names(model, clip) if host_names is None else host_names
    tensors = comfy.lora_convert.convert_lora(tensors)
    used = {stem for key in tensors for stem in stems(key)}
    patches = comfy.lora.load_lora(tensors, {name: target for name, target in names.items() if name in used})
    patched_model, patched_clip = model.clone(), None if clip is None else clip.clone()
    applied = set(patched_model.add_patches(patches, strength_model))
    if metadata:
        patched_model.set_attachments("lora_metadata", metadata)
    if patched_clip is not None:
        applied |= set(patched_clip.add_patches(patches, strength_clip))
        if metadata:
            patched_clip.patcher.set_attachments("lora_metadata", metadata)
    for target in patches.keys() - applied:
        log.warning("NOT LOADED %s", target)
    return patched_model, patched_clip


def blocked_output(reason: str) -> ExecutionBlocker:
    """An output that does not exist: connected nodes stop and show the reason, all others run."""
    return ExecutionBlocker(reason)

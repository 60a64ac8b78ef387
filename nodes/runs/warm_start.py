"""The factors of any LoRA file, for the layers that are trained here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.lora
import torch
from torch import Tensor, nn

from ...lora2.adapters.layer import module_shape
from ...lora2.files.document import LoraDocument
from ...lora2.files.families import describe_family, text_width
from ...lora2.method.factors import Factors
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped
from ..comfy.apply_lora import MAX_NAMED, mismatch_reason, other_layers, with_host_names
from ..comfy.layers import PREFIX

_NOT_TRAINED = "not trained here"


@dataclass
class WarmStartFactors:
    """Factors by layer, and names of what is not taken, by reason."""

    factors: dict[str, Factors]
    left: dict[str, list[str]] = field(default_factory=dict)

    def words(self) -> str:
        """What is not taken, in sentences; empty when all is."""
        said = []
        for reason, names in self.left.items():
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            said.append(f"{len(names)} not taken ({reason}): {', '.join(escaped(n) for n in names[:MAX_NAMED])}{more}.")
        return " ".join(said)

    def leave(self, name: str, reason: str) -> None:
        """Note a layer that is not taken."""
        self.left.setdefault(reason, []).append(name)


def factors_for(document: LoraDocument, model: Any, layers: Mapping[str, nn.Module]) -> WarmStartFactors:
    """The plain layers of a file that belong to layers trained here; raises LoraError where none does.

    Parts of a fused projection (q, k and v in files of other trainers) are put together: their ranks add up.
    """
    document = with_host_names(document)
    keys = _with_peft_names(comfy.lora.model_lora_keys_unet(model, {}))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    borrowed = WarmStartFactors({})
    for name in other_layers(document):
        borrowed.leave(name, "no plain LoRA layer")
    for name, factors in document.layers.items():
        if name.startswith(("lora_te", "text_encoder")):
            borrowed.leave(name, "text encoder, which is not trained")
            continue
        reason = mismatch_reason(name, keys, shapes, factors, None)
        if reason:
            borrowed.leave(name, reason)
            continue
        target, *part = keys[name] if isinstance(keys[name], tuple) else (keys[name],)
        layer = target.removeprefix(PREFIX).removesuffix(".weight")
        if layer not in layers:
            borrowed.leave(name, _NOT_TRAINED)
            continue
        placed = _placed(factors, module_shape(layers[layer]), part)
        if placed is None or (not part and layer in borrowed.factors):
            borrowed.leave(name, "given twice, or in a layout that is not known here")
            continue
        before = borrowed.factors.get(layer)
        borrowed.factors[layer] = placed if before is None else _together(before, placed)
    width, own_width = text_width(document.layers), model.model_config.unet_config.get("context_dim")
    foreign = width is not None and isinstance(own_width, int) and width != own_width
    if foreign or not borrowed.factors:
        what = "does not fit this model" if foreign else "holds nothing for the layers that are trained here"
        raise LoraError(
            f"This LoRA was made for {describe_family(document)} and {what}. {borrowed.words()} Choose another file, the model that it "
            "belongs to, or other layers."
        )
    return borrowed


def _with_peft_names(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The host's names of layers, and what diffusers and PEFT call them now: without `processor`, or below a prefix."""
    more: dict[str, Any] = {}
    for name, target in keys.items():
        if ".processor." in name:
            short = name.replace(".processor.", ".")
            for alias in (short, f"{short}.0") if short.endswith("to_out") else (short,):
                more |= {alias: target, f"base_model.model.{alias}": target}
    return {**more, **keys}


def _placed(factors: Factors, shape: tuple[int, ...], part: list[Any]) -> Factors | None:
    """Factors with the shape of their layer's weight; part: (axis, start, length) of the rows that they are for."""
    up, down = factors.up.detach().float(), factors.down.detach().float()
    rank = factors.rank
    if down[0].numel() != torch.Size(shape[1:]).numel():
        return None
    rows = up.reshape(up.shape[0], rank) * factors.scale
    if part:
        if len(part) != 1 or part[0][0] != 0 or part[0][1] + part[0][2] > shape[0] or part[0][2] != len(rows):
            return None
        whole = rows.new_zeros(shape[0], rank)
        whole[part[0][1] : part[0][1] + part[0][2]] = rows
        rows = whole
    if rows.shape[0] != shape[0]:
        return None
    return Factors(rows.reshape(shape[0], rank, *(1,) * (len(shape) - 2)), down.reshape(rank, *shape[1:]), float(rank))


def _together(one: Factors, other: Factors) -> Factors:
    """The sum of two updates of one layer, both at scale 1."""
    up: Tensor = torch.cat([one.up, other.up], dim=1)
    return Factors(up, torch.cat([one.down, other.down]), float(one.rank + other.rank))

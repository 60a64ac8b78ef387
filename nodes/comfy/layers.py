"""Which layers of a host model are adapted, and what they are called in a file."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

import comfy.ops
import comfy.utils
from torch import nn

from ...lora2.adapters.attach import is_plain_linear
from ...lora2.adapters.layer import adaptable
from ...lora2.config import LAYER_CHOICES
from ...lora2.method.losses import V
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped

PREFIX = "diffusion_model."

_ATTENTION = re.compile(r"(^|[._])(attn\d*|attention|self_attn|cross_attn|attentions)([._]|$)")
_FUSED = re.compile(r"(^|\.)single_blocks\.\d+\.linear[12]$")
"""Flux's single blocks: attention and feed-forward in one layer, so both choices include it."""
_FEED_FORWARD = re.compile(r"(^|[._])(ff|mlp|ffn|feed_forward)([._]|$)")


_FAMILIES = {
    "SD15": "sd1",
    "SD20": "sd2",
    "SDXL": "sdxl",
    "SSD1B": "sdxl",
    "Segmind_Vega": "sdxl",
    "KOALA_700M": "koala",
    "KOALA_1B": "koala",
    "Flux": "flux",
    "FluxSchnell": "flux",
}
"""Families of lora2.files.metadata by the name of the host's configuration."""


def family_of(model: nn.Module, prediction: str) -> str:
    """The family's name in a file; the host's own name for one that lora2.files.metadata does not list."""
    kind = type(model.model_config).__name__
    family = _FAMILIES.get(kind, kind)
    return "sd2_v" if family == "sd2" and prediction == V else family


def is_plain(module: nn.Module) -> bool:
    """Whether a layer, as it is loaded now, computes x Wᵀ + bias from its own weight and bias, cast to x's type, and no more.

    Not where the host changes the weight on the way (patches, bypass), pages it, or has a kernel of its own for it.
    """
    own = comfy.ops.disable_weight_init.Linear
    if not isinstance(module, own):
        return is_plain_linear(module)
    kind = type(module)
    usual = kind.forward is own.forward and kind.forward_comfy_cast_weights is own.forward_comfy_cast_weights
    changed = module.weight_function or module.bias_function or hasattr(module, "_v") or "forward" in vars(module)
    return usual and not changed


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of the diffusion model that could carry an adapter, by its path below diffusion_model."""
    return {name: m for name, m in model.diffusion_model.named_modules() if adaptable(m)}  # type: ignore[union-attr]


def select_layers(
    model: nn.Module, target: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The layers that a choice means, narrowed or widened by patterns (shell-style, on the layer's path).

    include: added to the choice. exclude: taken away, last. Raises LoraError when nothing is left or a pattern matches no
    layer at all.
    """
    everything = adaptable_layers(model)
    if not everything:
        raise LoraError("This model has no linear or convolution layer that an adapter could sit on.")
    chosen = {name for name, m in everything.items() if _meant(name, m, target)}
    for patterns, action in ((include, chosen.update), (exclude, chosen.difference_update)):
        for pattern in patterns:
            matching = fnmatch.filter(everything, pattern)
            if not matching:
                raise LoraError(
                    f"The pattern '{escaped(pattern)}' matches no layer. Layer paths look like {next(iter(everything))!r}; "
                    "use * for any part, for example *attn2*."
                )
            action(matching)
    if not chosen:
        raise LoraError(f"No layer is left to adapt: {target!r} with these patterns selects none of {len(everything)}.")
    return {name: everything[name] for name in everything if name in chosen}


def _meant(name: str, module: nn.Module, target: str) -> bool:
    linear = hasattr(module, "in_features")
    if target == LAYER_CHOICES[0]:
        return linear and bool(_ATTENTION.search(name) or _FUSED.search(name))
    if target == LAYER_CHOICES[1]:
        return linear and bool(_ATTENTION.search(name) or _FUSED.search(name) or _FEED_FORWARD.search(name))
    return linear if target == LAYER_CHOICES[2] else True


def file_prefixes(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Each layer's key prefix in the file, and the style of its keys: "kohya" for UNets, "peft" for transformers.

    UNet layers take diffusers' names, which every reader knows; a layer without one keeps the host's.
    """
    config: Mapping[str, object] = model.model_config.unet_config  # type: ignore[union-attr, assignment]
    if "num_res_blocks" not in config:
        return {name: PREFIX + name for name in names}, "peft"
    to_diffusers = {v: k for k, v in comfy.utils.unet_to_diffusers(config).items() if k.endswith(".weight")}
    prefixes = {}
    for name in names:
        diffusers = to_diffusers.get(f"{name}.weight", f"{name}.weight")
        prefixes[name] = "lora_unet_" + diffusers.removesuffix(".weight").replace(".", "_")
    return prefixes, "kohya"


def cross_attention(model: nn.Module) -> list[tuple[nn.Module, nn.Module, int]]:
    """(to_q, to_k, heads) of every cross-attention block; empty for families without such blocks."""
    found = []
    for name, module in model.diffusion_model.named_modules():  # type: ignore[union-attr]
        if name.split(".")[-1] == "attn2" and all(hasattr(module, a) for a in ("to_q", "to_k", "heads")):
            found.append((module.to_q, module.to_k, int(module.heads)))
    return found

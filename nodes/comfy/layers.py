"""Layers of a host model: which are adapted, and how they are named in a LoRA file."""

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
"""Flux's single blocks: attention and feed-forward in one layer, which therefore counts as both."""
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
"""Keys of lora2.files.families.FAMILIES by the name of the host's model configuration."""


def family_of(model: nn.Module, prediction: str) -> str:
    """The family's key in FAMILIES; for another family, the name of the host's model configuration."""
    name = type(model.model_config).__name__
    family = _FAMILIES.get(name, name)
    return "sd2_v" if family == "sd2" and prediction == V else family


def is_plain(module: nn.Module) -> bool:
    """Whether a layer as loaded computes just x Wᵀ + bias from its own weight and bias, cast to x's dtype.

    False if the host patches the weight on the fly, bypasses it, pages it, or has a kernel of its own for it.
    """
    host_linear = comfy.ops.disable_weight_init.Linear
    if not isinstance(module, host_linear):
        return is_plain_linear(module)
    kind = type(module)
    inherited = (
        kind.forward is host_linear.forward
        and kind.forward_comfy_cast_weights is host_linear.forward_comfy_cast_weights
    )
    modified = module.weight_function or module.bias_function or hasattr(module, "_v") or "forward" in vars(module)
    return inherited and not modified


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of the diffusion model that an adapter supports, by its path below diffusion_model."""
    return {name: m for name, m in model.diffusion_model.named_modules() if adaptable(m)}  # type: ignore[union-attr]


def select_layers(
    model: nn.Module, target: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The layers of a choice of LAYER_CHOICES, changed by shell-style patterns on their paths.

    include: adds layers. exclude: removes layers, applied last. Raises LoraError if no layer remains or a pattern matches none.
    """
    layers = adaptable_layers(model)
    if not layers:
        raise LoraError("This model has no linear or convolution layer that can be adapted.")
    selected = {name for name, m in layers.items() if _in_choice(name, m, target)}
    for patterns, action in ((include, selected.update), (exclude, selected.difference_update)):
        for pattern in patterns:
            matching = fnmatch.filter(layers, pattern)
            if not matching:
                raise LoraError(
                    f"The pattern '{escaped(pattern)}' matches no layer. Layer paths look like {next(iter(layers))!r}; "
                    "use * for any part, for example *attn2*."
                )
            action(matching)
    if not selected:
        raise LoraError(f"No layer is left to adapt: {target!r} with these patterns selects none of {len(layers)}.")
    return {name: layers[name] for name in layers if name in selected}


def _in_choice(name: str, module: nn.Module, target: str) -> bool:
    linear = hasattr(module, "in_features")
    if target == LAYER_CHOICES[0]:
        return linear and bool(_ATTENTION.search(name) or _FUSED.search(name))
    if target == LAYER_CHOICES[1]:
        return linear and bool(_ATTENTION.search(name) or _FUSED.search(name) or _FEED_FORWARD.search(name))
    return linear if target == LAYER_CHOICES[2] else True


def file_prefixes(model: nn.Module, names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Key prefix of each layer in the file, and the key style: "kohya" for UNets, "peft" for transformers.

    UNet layers get diffusers' names, which every reader supports; a layer without one keeps the host's.
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

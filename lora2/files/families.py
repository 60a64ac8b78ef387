"""Model families: which one a LoRA file was trained for, and how other tools name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..method.factors import Factors
from ..util.text import clean
from .document import LoraDocument

_BY_TEXT_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
"""UNet families by the width of the text embedding that cross-attention reads."""


def describe_family(document: LoraDocument) -> str:
    """The family for messages: by the layers' shapes and names, else by the metadata, else "unknown"."""
    return _by_layers(document.layers) or _by_metadata(document.metadata) or "unknown"


def text_width(layers: Mapping[str, Factors]) -> int | None:
    """Width of the text embedding that a UNet's cross-attention reads; None without such a layer."""
    for name, factors in layers.items():
        if name.endswith(("attn2_to_k", "attn2.to_k", "attn2.processor.to_k")):
            return factors.down.shape[1:].numel()
    return None


def family_of_width(width: int) -> str:
    """The UNet family with this width of the text embedding, for messages."""
    return _BY_TEXT_WIDTH.get(width, f"a UNet with text of width {width}")


def _by_layers(layers: Mapping[str, Factors]) -> str:
    width = text_width(layers)
    if width is not None:
        return family_of_width(width)
    if any("double_blocks" in name or "single_transformer_blocks" in name for name in layers):
        return "Flux"
    return ""


def _by_metadata(metadata: Mapping[str, str]) -> str:
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if metadata.get(key):
            return clean(metadata[key], 60)
    return ""


@dataclass(frozen=True)
class Family:
    """A model family as other tools name it in metadata.

    base: kohya's `ss_base_model_version`, and v2 its `ss_v2`. architecture, implementation: of ModelSpec.
    """

    base: str
    architecture: str
    implementation: str
    v2: bool = False


_SGM = "https://github.com/Stability-AI/generative-models"

FAMILIES: dict[str, Family] = {
    "sd1": Family("sd_v1", "stable-diffusion-v1", "diffusers"),
    "sd2": Family("sd_v2", "stable-diffusion-v2-512", "diffusers", v2=True),
    "sd2_v": Family("sd_v2_v", "stable-diffusion-v2-768-v", "diffusers", v2=True),
    "sdxl": Family("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", _SGM),
    "koala": Family("sdxl_koala_700m", "koala-700m", _SGM),
    "flux": Family("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux"),
}

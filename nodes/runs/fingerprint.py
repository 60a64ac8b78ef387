"""Fingerprints of ComfyUI's models and datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...lora2.adapters.layer import module_shape
from ...lora2.checkpoints.fingerprint import Fingerprint, digest, samples
from ..comfy.dataset import Caption
from ..comfy.layers import PREFIX, family_of
from ..comfy.model import HostModel
from ..comfy.weights import bypass_adapters

WEIGHT_VALUES = 1024
"""Values of a weight that count: two models that differ do so everywhere."""

PATCH_VALUES = 64
"""Values of each tensor of an applied LoRA that count."""


def data_fingerprint(
    host: HostModel,
    layers: Mapping[str, nn.Module],
    latents: Sequence[Tensor],
    captions: Sequence[Caption],
    empty_caption: Caption | None,
) -> Fingerprint:
    """Fingerprint without weights and patches, of latents as the VAE encoded them. empty_caption: None where none is dropped."""
    return Fingerprint(
        family=f"{family_of(host.model, host.prediction)} ({host.prediction})",
        layers=digest([], "\n".join(f"{name} {module_shape(module)}" for name, module in layers.items())),
        pictures=samples(([latent], "") for latent in latents),
        captions=samples(map(caption_content, captions)),
        empty_caption=samples([] if empty_caption is None else [caption_content(empty_caption)]),
    )


def caption_content(caption: Caption) -> tuple[list[Tensor], str]:
    """A caption's tensors, and a text of its other options; values that are no plain ones count by their type."""
    options = {str(name): value for name, value in sorted(caption[1].items(), key=lambda item: str(item[0]))}
    plain = {name: v if isinstance(v, (bool, int, float, str)) else type(v).__name__ for name, v in options.items()}
    return [caption[0], *(value for value in options.values() if isinstance(value, Tensor))], repr(plain)


def model_digests(patcher: Any, layers: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Digests of a loaded model's weights and patches. Weights count as in the model's file, before patches."""
    digests = []
    for name, module in layers.items():
        backup = patcher.backup.get(f"{PREFIX}{name}.weight")
        weight: Any = module.weight if backup is None else backup.weight
        try:
            digests.append(digest([weight], max_values=WEIGHT_VALUES))
        except (RuntimeError, NotImplementedError, TypeError, AttributeError):  # a quantized type that cannot be read
            digests.append(f"{module_shape(module)} {type(weight).__name__}")
    return digest([], "\n".join(digests)), _patches_digest(patcher)


def _patches_digest(patcher: Any) -> str:
    tensors: list[Tensor] = []
    lines: list[str] = []
    for name, module in patcher.model.named_modules():
        for adapter in bypass_adapters(module):
            tensors.extend(_tensors_in(adapter.weights))
            lines.append(f"{name} {getattr(adapter, 'multiplier', '')}")
    for key in sorted(patcher.patches):
        for strength, patch, strength_model, *_ in patcher.patches[key]:
            tensors.extend(_tensors_in(getattr(patch, "weights", patch)))
            lines.append(f"{key} {strength} {strength_model}")
    return digest(tensors, "\n".join(lines), PATCH_VALUES) if lines else ""


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)

"""What a run is made of, as fingerprints: the model's weights as they lie in its file, and the dataset as it came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...lora2.adapters.layer import module_shape
from ...lora2.checkpoints.fingerprint import SAMPLES, Digests, Fingerprint, digest_of, plain
from ..comfy.dataset import Caption
from ..comfy.layers import PREFIX, family_of
from ..comfy.model import HostModel
from ..comfy.weights import bypass_adapters

TEXT_SAMPLES = 1 << 18
"""Numbers of a caption that are looked at: one word changes them everywhere after it, and there may be thousands of captions."""

PATCH_SAMPLES = 64
"""Numbers of each tensor of an applied LoRA that are looked at."""


def fingerprint_of(
    host: HostModel,
    layers: Mapping[str, nn.Module],
    images: Sequence[Tensor],
    captions: Sequence[Caption],
    empty: Caption | None,
) -> Fingerprint:
    """The origin of a run on these layers, latents as they came and captions. empty: what a dropped caption becomes, if any is.

    Call while the model is loaded. Weights are looked at as they were before other LoRAs were applied; those have a digest.
    """
    pictures, told = digests_of(images, captions)
    weights = {name: _original(host.patcher, name, module) for name, module in layers.items()}
    return Fingerprint(
        family=f"{family_of(host.model, host.prediction)} ({host.prediction})",
        layers=list(layers),
        types=[str(getattr(w, "dtype", "")) for w in weights.values()],
        weights=Digests.of((_readable(weights[name], module) for name, module in layers.items()), SAMPLES),
        patches=_patches(host.patcher),
        pictures=pictures,
        captions=told,
        empty=Digests.of([_caption(empty)] if empty is not None else [], TEXT_SAMPLES),
    )


def digests_of(images: Sequence[Tensor], captions: Sequence[Caption]) -> tuple[Digests, Digests]:
    """Fingerprints of latents as they came, and of captions."""
    return Digests.of(([image], "") for image in images), Digests.of((_caption(c) for c in captions), TEXT_SAMPLES)


def _original(patcher: Any, name: str, module: nn.Module) -> Any:
    """The weight as the model's file has it."""
    kept = patcher.backup.get(f"{PREFIX}{name}.weight")
    return module.weight if kept is None else kept.weight


def _readable(weight: Any, module: nn.Module) -> tuple[list[Tensor], str]:
    """The weight, or only its shape and kind where it is of a kind that cannot be read as numbers."""
    try:
        flat = weight.detach().reshape(-1)[: 2 * SAMPLES]
        flat.to("cpu").contiguous().float()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return [], f"{module_shape(module)} {type(weight).__name__}"
    return [weight], ""


def _patches(patcher: Any) -> str:
    """A digest of all that is applied to the model's weights; empty without any."""
    tensors: list[Tensor] = []
    words: list[str] = []
    for name, module in patcher.model.named_modules():
        for adapter in bypass_adapters(module):
            tensors.extend(_tensors(adapter.weights))
            words.append(f"{name} {getattr(adapter, 'multiplier', '')}")
    for key in sorted(patcher.patches):
        for strength, patch, strength_model, *_ in patcher.patches[key]:
            tensors.extend(_tensors(getattr(patch, "weights", patch)))
            words.append(f"{key} {strength} {strength_model}")
    return digest_of(tensors, "\n".join(words), PATCH_SAMPLES) if words else ""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _caption(caption: Caption) -> tuple[list[Tensor], str]:
    tensors, words = plain(caption[1])
    return [caption[0], *tensors], words

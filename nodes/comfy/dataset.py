"""Pictures and captions from the latents and conditioning of ComfyUI's dataset nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...lora2.util.errors import LoraError

Caption = list[Any]
"""One ComfyUI conditioning entry: [tensor, options]."""


def pictures_and_captions(
    latents: Sequence[dict[str, Any]], conditioning: Sequence[Any]
) -> tuple[list[Tensor], list[Caption]]:
    """Every picture's latent (channels, …) and its caption, from lists, batches, buckets or one shared caption.

    Raises LoraError when there are none, counts do not match, or a latent or a caption is not finite.
    """
    images, per_entry = _latents(latents)
    groups = [caption_entries(c) for c in conditioning]
    if not groups or not all(groups):
        raise LoraError("There is no conditioning to train with. Connect the conditioning of the same dataset node.")
    for number, caption in enumerate((c for group in groups for c in group), 1):
        check_caption(caption, f"Caption {number}")
    if len(groups) == len(per_entry):
        captions: list[Caption] = []
        for number, (count, group) in enumerate(zip(per_entry, groups, strict=True), 1):
            if len(group) not in (1, count):
                raise LoraError(
                    f"Latents entry {number} holds {count} pictures but its conditioning has {len(group)} captions. "
                    "Connect latents and conditioning of the same dataset node."
                )
            captions.extend(group * count if len(group) == 1 else group)
    else:
        captions = [c for group in groups for c in group]
        if len(captions) == 1:
            captions = captions * len(images)
    if len(captions) != len(images):
        raise LoraError(
            f"There are {len(images)} pictures but {len(captions)} captions. Connect latents and conditioning of the same "
            "dataset node, or a single caption for all pictures."
        )
    return images, captions


def _latents(latents: Sequence[dict[str, Any]]) -> tuple[list[Tensor], list[int]]:
    images: list[Tensor] = []
    counts = []
    for number, entry in enumerate(latents, 1):
        samples = entry.get("samples") if isinstance(entry, dict) else None
        if not isinstance(samples, Tensor) or samples.is_nested or samples.layout != torch.strided:
            samples = None
        if samples is None or samples.ndim < 3 or samples.is_complex():
            raise LoraError(f"Latents entry {number} is not a picture latent. Encode the pictures with a VAE first.")
        if not samples[:1].numel() and len(samples):
            raise LoraError(f"Latents entry {number} has the shape {list(samples.shape)}: it holds no pixels.")
        if not torch.isfinite(samples).all():
            raise LoraError(
                f"Latents entry {number} holds NaN or infinity. The VAE may have overflowed: encode again in fp32 or bf16."
            )
        images.extend(s.detach().clone().float().cpu() for s in samples)
        counts.append(samples.shape[0])
    if not images:
        raise LoraError("There are no latents to train on. Connect the latents of a dataset node.")
    return images, counts


def caption_entries(value: Any, name: str = "The conditioning") -> list[Caption]:
    """A conditioning list as its entries; a bare entry counts as a list of one. name: what the message calls it."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], dict):
        return [list(value)]
    if not isinstance(value, (list, tuple)):
        raise LoraError(f"{name} is not a ComfyUI conditioning. Connect a dataset node or a CLIP Text Encode.")
    for entry in value:
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict)):
            raise LoraError(f"{name} is not a ComfyUI conditioning. Connect a dataset node or a CLIP Text Encode.")
    return [list(entry) for entry in value]


def check_caption(caption: Caption, name: str) -> None:
    """Raise LoraError when a caption is not one finite encoded text. name: what the message calls it."""
    text, options = caption
    if not isinstance(text, Tensor) or text.ndim < 2 or text.shape[0] != 1 or text.is_complex():
        raise LoraError(f"{name} is not one encoded text. Encode every caption on its own, as the dataset nodes do.")
    for tensor in (text, *options.values()):
        if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
            raise LoraError(
                f"{name} holds NaN or infinity. The text encoder may have overflowed: encode the captions again in fp32."
            )

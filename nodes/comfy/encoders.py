"""Embedding vectors of pictures and prompts, by the host's encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...lora2.report.similarity import CLIP_I, DINO
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped

BATCH = 16
"""Pictures per encoder call."""

KINDS = {"clip_vision_model": CLIP_I, "dinov2": DINO}
"""The host's encoder types (comfy/clip_vision.py) that give one vector per picture. It also loads DINOv3, but its
`encode_image` fails there (0.30.0): that model has no output of the second to last layer."""

TEXT_ENCODERS = (("l", "clip_l"), ("g", "clip_g"), ("h", "clip_h"))
"""CLIP text encoders inside the host's CLIP objects: token key, attribute."""

SPREAD = 1000.0
"""A matrix whose largest entry exceeds this multiple of its median is uninitialized memory, not weights."""


def metric_of(encoder: Any) -> str:
    """The metric of an encoder: CLIP-I or DINO. Raises LoraError for other kinds."""
    kind = getattr(encoder, "model_type", type(encoder).__name__)
    if kind not in KINDS:
        raise LoraError(
            f"An encoder of kind {escaped(kind)} does not give one vector per picture, which these metrics need. Load a "
            "CLIP vision model (for CLIP-I and CLIP-T) or a DINOv2 model (for DINO) with Load CLIP Vision."
        )
    return KINDS[kind]


def name_of(encoder: Any) -> str:
    """Description of an encoder: type, width, depth and picture size."""
    config = getattr(encoder, "config", {})
    size = getattr(encoder, "image_size", "?")
    width, layers = (config.get(key, "?") for key in ("hidden_size", "num_hidden_layers"))
    return f"{encoder.model_type}, width {width}, {layers} layers, {size} px"


def picture_vectors(encoder: Any, pictures: Sequence[Tensor]) -> Tensor:
    """(pictures, width) float32 on the CPU. pictures: IMAGE batches (count, height, width, channels), of any sizes.

    Pictures are scaled, center-cropped, and normalized as the encoder's configuration says.
    """
    found = []
    for batch in pictures:
        for part in batch.split(BATCH):
            management.throw_exception_if_processing_interrupted()
            vectors = encoder.encode_image(part, crop=True)["image_embeds"]
            if vectors.ndim != 2 or len(vectors) != len(part):
                raise LoraError(
                    f"The encoder ({name_of(encoder)}) does not give one vector per picture. Load another one."
                )
            found.append(vectors.float().cpu())
    return torch.cat(found)


def prompt_vectors(clip: Any, prompts: Sequence[str], width: int) -> Tensor:
    """(prompts, width) float32 on the CPU: the text encoder's vectors in the space that it shares with the vision encoder.

    CLIP's text features: the last layer's state at the end-of-text token, after the final norm, times the text projection.
    Only the first 75 tokens of a prompt count. Raises LoraError if no text encoder fits.
    """
    key, part = _text_encoder(clip, width)
    model = clip.cond_stage_model
    found = []
    try:
        for prompt in prompts:
            tokens = clip.tokenize(prompt)
            model.reset_clip_options()
            clip.load_model(tokens)
            # Without this an SD 1.x text encoder returns the state before the projection.
            model.set_clip_options({"execution_device": clip.patcher.load_device, "projected_pooled": True})
            with management.cuda_device_context(clip.patcher.load_device):
                pooled = part.encode_token_weights(tokens[key])[1]
            found.append(pooled.float().cpu())
    finally:
        model.reset_clip_options()
    return torch.cat(found)


def _text_encoder(clip: Any, width: int) -> tuple[str, Any]:
    """The text encoder whose vectors have this width, with the key of its tokens."""
    widths = []
    for key, name in TEXT_ENCODERS:
        part = getattr(clip.cond_stage_model, name, None)
        projection = getattr(getattr(part, "transformer", None), "text_projection", None)
        weight = getattr(projection, "weight", None)
        if part is None or weight is None:
            continue
        if weight.shape[0] == width:
            _check_projection(weight, name)
            return key, part
        widths.append(f"{name} {weight.shape[0]}")
    raise LoraError(
        f"CLIP-T needs a text encoder of the same CLIP as the vision encoder, whose vectors have {width} numbers; this CLIP has "
        f"{', '.join(widths) or 'no CLIP text encoder'}. Load the text encoder that belongs to the vision encoder: CLIP-L for "
        "ViT-L/14, CLIP-G for ViT-bigG, CLIP-H for ViT-H."
    )


def _check_projection(weight: Tensor, name: str) -> None:
    """Raise LoraError for an uninitialized projection.

    SD 1.x and SDXL checkpoints omit CLIP-L's projection, which image generation does not need.
    """
    sizes = weight.detach().float().abs()
    if not float(sizes.max()) < SPREAD * float(sizes.median()):
        raise LoraError(
            f"The text encoder {name} was loaded without its projection (text_projection), which CLIP-T needs. Checkpoints of SD "
            "1.x and SDXL leave CLIP-L's out: load the complete text encoder from its own file with Load CLIP."
        )

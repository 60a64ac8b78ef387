"""The model as a checkpoint that ComfyUI loads by itself: a small SD3 (MMDiT), CLIP-L with random weights, a TAESD.

The text encoder is not trained: every word has a random vector of its own, and the MMDiT learns what they mean. So its
234 MB are made from a seed, and only the MMDiT's and the TAESD's weights are kept, in weights.xz.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from dev.checkpoint import fill, save
from dev.host import import_comfy

from .packing import unpack

WEIGHTS = Path(__file__).with_name("weights.xz")

DEPTH = 4
"""Blocks, and heads of 64: what ComfyUI takes an SD3's depth for."""

TEXT, PAIRED, WIDE = 768, 2048, 4096
"""Width of CLIP-L's text, of the pooled text (with CLIP-G's), of the context (with T5's): the others are zero here."""

GRID = 16
"""Places along a side that have a position embedding: pictures up to 256 pixels."""

UNET, VAE = "unet.", "vae."
"""What the names of both parts begin with in weights.xz."""

CHANNELS = 16
RESIDUAL = 0.2
"""What CLIP's blocks add, of a usual random network's: words stay recognisable after twelve of them."""

SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609
"""SD3's latents are stored divided by this, and moved."""


def diffusion_model() -> nn.Module:
    """ComfyUI's own MMDiT as it is trained: without the columns that only ever see zeros. Its weights are not yet made."""
    import_comfy()
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    operations = comfy.ops.disable_weight_init
    model: nn.Module = OpenAISignatureMMDITWrapper(
        in_channels=CHANNELS,
        patch_size=2,
        depth=DEPTH,
        adm_in_channels=TEXT,
        num_patches=GRID * GRID,
        pos_embed_max_size=GRID,
        qk_norm="rms",
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": TEXT, "out_features": 64 * DEPTH},
        },
        dtype=torch.float32,
        operations=operations,
    )
    return model


def autoencoder() -> nn.Module:
    """ComfyUI's own TAESD of 16 channels."""
    import_comfy()
    from comfy.taesd.taesd import TAESD

    model: nn.Module = TAESD(latent_channels=CHANNELS)
    return model


def text_encoder(seed: int) -> dict[str, Tensor]:
    """CLIP-L's text model from a seed, float32: ComfyUI fixes its twelve layers."""
    import_comfy()
    import comfy.ops
    import comfy.sd1_clip
    from comfy.clip_model import CLIPTextModel

    config = json.loads(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json").read_text())
    model = CLIPTextModel(config, torch.float32, "meta", comfy.ops.disable_weight_init)
    tensors = {k: v for k, v in fill(model, seed).items() if k.startswith("text_model.")}
    for key, tensor in tensors.items():
        if key.endswith(("out_proj.weight", "fc2.weight")):
            tensor *= RESIDUAL
    return tensors


def position_embedding() -> Tensor:
    """Sines and cosines over the grid, (1, places, channels)."""
    import_comfy()
    from comfy.ldm.modules.diffusionmodules.mmdit import get_2d_sincos_pos_embed_torch

    embedding: Tensor = get_2d_sincos_pos_embed_torch(64 * DEPTH, GRID, GRID, GRID / 2, GRID / 2)
    return embedding[None].float()


def completed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The diffusion model's weights as ComfyUI expects an SD3's: with the columns that only ever see zeros."""
    whole = dict(tensors, pos_embed=position_embedding())
    for key, width in (("context_embedder.weight", WIDE), ("y_embedder.mlp.0.weight", PAIRED)):
        whole[key] = torch.nn.functional.pad(tensors[key], (0, width - TEXT))
    return whole


def write_checkpoint(path: Path, weights: dict[str, Tensor] | None = None, seed: int = 0) -> Path:
    """Writes the checkpoint, 290 MB: MMDiT and TAESD in float32, CLIP-L in float16. weights: instead of the kept ones."""
    weights = weights or unpack(WEIGHTS)
    unet, vae = (_part(weights, name) for name in (UNET, VAE))
    tensors = {f"model.diffusion_model.{k}": v for k, v in completed(unet).items()}
    tensors |= {f"text_encoders.clip_l.transformer.{k}": v.half() for k, v in text_encoder(seed).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae.items()}
    tensors["first_stage_model.vae_scale"] = torch.tensor(SD3_SCALE)
    tensors["first_stage_model.vae_shift"] = torch.tensor(SD3_SHIFT)
    return save(tensors, path)


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

"""Small checkpoints with random weights that ComfyUI's own loaders recognise.

ComfyUI tells the families apart by shapes (comfy/model_detection.py, comfy/supported_models.py), so some
sizes are fixed: 320 channels for every UNet, the context width, the transformer depths on the way down.
The rest is as small as it can be. The structures are ComfyUI's own classes, so the keys are right.
`python -m dev.checkpoint FAMILY PATH` writes one; the family `checkpoint` is a whole SD1.x file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dev.denoiser import wire
from dev.host import import_comfy
from dev.tiny_vae import vae_state_dict

Config = dict[str, Any]


def _unet(context: int, levels: list[int], down: list[int], up: list[int], **more: Any) -> Config:
    """Residual blocks a level, all of 320 channels; transformer depths on the way down and up."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "legacy": False,
        "num_res_blocks": levels,
        "channel_mult": [1] * len(levels),
        "context_dim": context,
        "transformer_depth": down,
        "transformer_depth_output": up,
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "num_head_channels": 64,
        **more,
    }


SIZE_EMBEDDED = {"num_classes": "sequential", "adm_in_channels": 2816}
FAMILIES: dict[str, Config] = {
    "sd15": _unet(
        768, [1, 1], [1, 1], [1, 1, 1, 1], use_linear_in_transformer=False, num_heads=8, num_head_channels=-1
    ),
    # v-prediction is told by the spread of a bias in output_blocks.11: twelve output blocks, no fewer.
    "sd21": _unet(1024, [5, 5], [1] + [0] * 8 + [1], [1] + [0] * 10 + [1]),
    # The depths on the way down must be just these; those on the way up are free.
    "sdxl": _unet(2048, [2, 2, 2], [0, 0, 2, 2, 10, 10], [0, 0, 0, 1, 0, 0, 1, 0, 0], **SIZE_EMBEDDED),
    "koala": _unet(2048, [1, 1, 1], [0, 2, 5], [0, 0, 1, 0, 1, 0], **SIZE_EMBEDDED),
    "flux": {
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 128,
        "mlp_ratio": 4.0,
        "num_heads": 1,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    },
}
V_PREDICTION_BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def write_family(name: str, path: Path, seed: int = 0) -> Path:
    """Writes the diffusion model of a family (a key of FAMILIES) in float32, for UNETLoader."""
    return save(_diffusion_model(name, seed), path)


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    """Writes an SD1.x checkpoint, 430 MB: UNet in float32 (a denoiser, see dev.denoiser), CLIP-L in float16, VAE."""
    unet = _diffusion_model("sd15", seed)
    wire(unet)
    tensors = {f"model.diffusion_model.{k}": v for k, v in unet.items()}
    tensors |= {f"cond_stage_model.transformer.{k}": v.half() for k, v in _clip_l(seed + 1).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae_state_dict().items()}
    return save(tensors, path)


def fill(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random float32 weights: N(0, 1 / fan-in), norms near 1, biases near 0, none zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, like in module.state_dict().items():
        noise = torch.randn(like.shape, generator=generator)
        if like.dim() > 1:
            fan_in = 1.0 if "embedding" in key else float(like[0].numel())
            tensors[key] = noise / fan_in**0.5
        else:
            tensors[key] = 0.02 * noise + (0.0 if key.endswith("bias") else 1.0)
    return tensors


def _diffusion_model(name: str, seed: int) -> dict[str, Tensor]:
    import_comfy()
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    build = Flux if name == "flux" else UNetModel
    operations = comfy.ops.disable_weight_init
    model = build(**FAMILIES[name], dtype=torch.float32, device="meta", operations=operations)
    tensors = fill(model, seed)
    if name == "sd21":
        tensors[V_PREDICTION_BIAS] *= 0.2 / tensors[V_PREDICTION_BIAS].std()
    return tensors


def _clip_l(seed: int) -> dict[str, Tensor]:
    """CLIP-L's text model: ComfyUI fixes its twelve layers."""
    import_comfy()
    import json

    import comfy.ops
    import comfy.sd1_clip
    from comfy.clip_model import CLIPTextModel

    config = json.loads(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json").read_text())
    model = CLIPTextModel(config, torch.float32, "meta", comfy.ops.disable_weight_init)
    return {k: v for k, v in fill(model, seed).items() if k.startswith("text_model.")}


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    """Writes tensors as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    part.replace(path)
    return path


if __name__ == "__main__":
    family, target = sys.argv[1], Path(sys.argv[2])
    print(write_checkpoint(target) if family == "checkpoint" else write_family(family, target))

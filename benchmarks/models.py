"""What is measured: ComfyUI's own models with random weights, and samples of their shapes."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

from dev.packs import pack

__all__ = ["Sample", "flux", "import_comfy", "pack", "sample_for", "sdxl", "small"]


def import_comfy() -> None:
    """ComfyUI first on the import path: the one of COMFYUI_PATH or of the set-up, or one that is importable already."""
    if os.environ.get("COMFYUI_PATH") or importlib.util.find_spec("comfy") is None:
        from dev import host

        host.import_comfy()
    importlib.import_module("comfy.sd")


@dataclass(frozen=True)
class Sample:
    """A batch's latent, what apply_model takes beside it, and a caption as a text encoder node gives it."""

    latent: Any
    conditioning: dict[str, Any]
    caption: list[Any]

    def dataset(self) -> tuple[list[dict[str, Any]], list[Any]]:
        """The same as a dataset node gives it: four batches' worth of pictures."""
        return [{"samples": self.latent}] * 4, [[self.caption] * len(self.latent)] * 4

    def sized(self, height: int, width: int) -> Sample:
        """The same with latents of another size."""
        import torch

        shape = (*self.latent.shape[:2], height, width)
        return replace(self, latent=torch.randn(shape, generator=torch.Generator().manual_seed(0)))


# family: latent channels, width of the text, of the pooled text, of `y` as the model takes it, tokens
FAMILIES = {
    "sd15": (4, 768, 0, 0, 77),
    "sd21": (4, 1024, 0, 0, 77),
    "sdxl": (4, 2048, 1280, 2816, 77),
    "koala": (4, 2048, 1280, 2816, 77),
    "flux": (16, 4096, 768, 768, 64),
}


def sample_for(family: str, height: int, width: int, batch: int = 1, tokens: int | None = None) -> Sample:
    """Random values of a family's shapes; height and width in latent pixels."""
    import torch

    channels, context, pooled, adm, usual = FAMILIES[family]
    g = torch.Generator().manual_seed(0)
    text = torch.randn(1, tokens or usual, context, generator=g)
    conditioning = {"c_crossattn": text.repeat(batch, 1, 1)}
    options = {}
    if pooled:
        options["pooled_output"] = torch.randn(1, pooled, generator=g)
        conditioning["y"] = torch.randn(batch, adm, generator=g)
    if family == "flux":
        conditioning["guidance"] = torch.full((batch,), 3.5)
    return Sample(torch.randn(batch, channels, height, width, generator=g), conditioning, [text, options])


def small(family: str) -> Any:
    """A small model of the tests, as a ModelPatcher."""
    import comfy.sd

    from dev import assets

    return comfy.sd.load_diffusion_model(str(assets.family(family)))


SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_head_channels": 64,
    "use_linear_in_transformer": True, "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential",
    "adm_in_channels": 2816, "use_temporal_attention": False,
}  # fmt: skip

FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip


def sdxl(config: dict[str, Any] = SDXL, device: str = "cuda", disable_dynamic: bool = False) -> Any:
    """SDXL's UNet in bf16 with random weights, as a ModelPatcher that TrainLoraNode can copy too."""
    import comfy.model_base
    import comfy.supported_models
    import torch

    described = comfy.supported_models.SDXL(dict(config, dtype=torch.bfloat16))
    described.set_inference_dtype(torch.bfloat16, None)
    described.custom_operations = None
    model = _filled(comfy.model_base.SDXL(described, device=device))
    return _patcher(model, lambda disable_dynamic=False: sdxl(config, device))


def flux(config: dict[str, Any] = FLUX, device: str = "cuda") -> Any:
    """A Flux of 12 B parameters in fp8 that computes in bf16, with random weights, as a ModelPatcher."""
    import comfy.model_base
    import comfy.supported_models
    import torch

    described = comfy.supported_models.Flux(dict(config, dtype=torch.float8_e4m3fn))
    described.set_inference_dtype(torch.float8_e4m3fn, torch.bfloat16)
    described.custom_operations = None
    return _patcher(_filled(comfy.model_base.Flux(described, device=device)))


def _filled(model: Any) -> Any:
    """ComfyUI's layers leave their weights as they find them in memory."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                std = parameter[0].numel() ** -0.5
                rows = max(1, 2**26 // parameter[0].numel())
                for part in parameter.split(rows):  # fp8 is filled by way of bf16
                    part.copy_(torch.randn(part.shape, device=part.device, dtype=torch.bfloat16) * std)
            else:
                value = 1.0 if name.endswith(("weight", "scale")) else 0.0
                parameter.copy_(torch.full(parameter.shape, value, device=parameter.device))
    return model


def _patcher(model: Any, factory: Any = None) -> Any:
    import comfy.model_management
    import comfy.model_patcher
    import torch

    patcher = comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))
    if factory is not None:
        patcher.cached_patcher_init = (factory, ())
    return patcher

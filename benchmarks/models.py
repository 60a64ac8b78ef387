"""What is measured: ComfyUI's own models with random weights, and samples of their shapes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dev.packs import pack

__all__ = ["Sample", "import_comfy", "pack", "works"]


def import_comfy() -> None:
    """ComfyUI on the import path: the one of the set-up, or one that is importable already."""
    if importlib.util.find_spec("comfy") is None:
        from dev import host

        host.import_comfy()
    importlib.import_module("comfy.sd")


@dataclass(frozen=True)
class Sample:
    """A batch's latent, what apply_model takes beside it, and the rank to train at."""

    latent: Any
    conditioning: dict[str, Any]
    caption: list[Any]
    rank: int

    def dataset(self) -> tuple[list[dict[str, Any]], list[Any]]:
        """The same as a dataset node gives it: four batches' worth of pictures."""
        return [{"samples": self.latent}] * 4, [[self.caption] * len(self.latent)] * 4


def sample(
    channels: int, side: int, context: int, pooled: int, tokens: int, rank: int, batch: int = 1, adm: int = 0
) -> Sample:
    """Random values of these shapes. pooled: width of the pooled text; adm: width of `y` as the model takes it."""
    import torch

    g = torch.Generator().manual_seed(0)
    text = torch.randn(1, tokens, context, generator=g)
    conditioning = {"c_crossattn": text.repeat(batch, 1, 1)}
    options = {}
    if pooled:
        options["pooled_output"] = torch.randn(1, pooled, generator=g)
        conditioning["y"] = torch.randn(batch, adm or pooled, generator=g)
    return Sample(torch.randn(batch, channels, side, side, generator=g), conditioning, [text, options], rank)


def works() -> Iterator[tuple[str, Any, Sample]]:
    """(name, model, sample) of each work for this device."""
    import torch

    if torch.cuda.is_available():
        model = sdxl()
        yield "SDXL 1024², batch 1, attention, rank 64", model, sample(4, 128, 2048, 1280, 77, 64, adm=2816)
        yield "SDXL 1024², batch 4, attention, rank 64", model, sample(4, 128, 2048, 1280, 77, 64, batch=4, adm=2816)
        return
    import comfy.sd

    from dev import assets

    for family, shapes in {"sd15": (4, 8, 768, 0, 77), "flux": (16, 16, 4096, 768, 64)}.items():
        yield (
            f"small {family}, CPU, rank 16",
            comfy.sd.load_diffusion_model(str(assets.family(family))),
            sample(*shapes, 16),
        )


def sdxl() -> Any:
    """SDXL's UNet in bf16 with random weights on the GPU, as a ModelPatcher."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_head_channels": 64,
        "use_linear_in_transformer": True, "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential",
        "adm_in_channels": 2816, "use_temporal_attention": False, "dtype": torch.bfloat16,
    }  # fmt: skip
    described = comfy.supported_models.SDXL(config)
    described.set_inference_dtype(torch.bfloat16, None)
    described.custom_operations = None
    torch.manual_seed(0)
    model = comfy.model_base.SDXL(described, device="cuda")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))

"""The small models are what they claim: ComfyUI recognises the family, and a real forward is finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

# family: (class in comfy.model_base, model type, latent channels, context width, pooled width)
EXPECTED = {
    "sd15": ("BaseModel", "EPS", 4, 768, 0),
    "sd21": ("BaseModel", "V_PREDICTION", 4, 1024, 0),
    "sdxl": ("SDXL", "EPS", 4, 2048, 2816),
    "koala": ("SDXL", "EPS", 4, 2048, 2816),
    "flux": ("Flux", "FLUX", 16, 4096, 768),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_family_is_recognised_and_runs(family: str, small_model: Callable[[str], Any]) -> None:
    """One denoising call through comfy.model_base."""
    name, kind, channels, context, pooled = EXPECTED[family]
    model = small_model(family).model
    assert type(model).__name__ == name
    assert model.model_type.name == kind
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, 8, 8, generator=generator)
    conditioning: dict[str, torch.Tensor] = {"c_crossattn": torch.randn(1, 7, context, generator=generator)}
    if pooled:
        conditioning["y"] = torch.randn(1, pooled, generator=generator)
    if family == "flux":
        conditioning["guidance"] = torch.tensor([3.5])
    with torch.inference_mode():
        out = model.apply_model(x, torch.tensor([0.7]), **conditioning)
    assert out.shape == x.shape
    assert out.isfinite().all()

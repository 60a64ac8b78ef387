"""What other programs read from our files: ComfyUI and diffusers add the same ΔW, at strength 1."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lora_metadata import file_of
from torch import Tensor

from lora2.files.document import parse, read, to_state_dict
from lora2.files.keys import KEY_STYLES
from lora2.files.metadata import build
from lora2.files.rank_info import layer_info
from lora2.files.resize import resize
from lora2.files.writer import write_new
from lora2.method.factors import Factors

# float32: products and folding round at 6e-8. Half types: both factors are rounded once, to eps / 2 each.
BOUNDS = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)} | {torch.float32: 1e-6}


def layer(rank: int, d_out: int, inner: tuple[int, ...], alpha: float | None = None) -> Factors:
    generator = torch.Generator().manual_seed(rank)
    up = torch.randn(d_out, rank, *[1] * (len(inner) - 1), generator=generator)
    return Factors(up, torch.randn(rank, *inner, generator=generator), alpha)


def delta(factors: Factors) -> Tensor:
    scale = 1.0 if factors.alpha is None else factors.alpha / factors.rank
    product = factors.up.double().flatten(1) @ factors.down.double().flatten(1)
    return scale * product.reshape(factors.up.shape[0], *factors.down.shape[1:])


def patched(comfy: ModuleType, tensors: dict[str, Tensor], base: Tensor, prefix: str = "x") -> Tensor:
    """The weight after ComfyUI's own loading and patching at strength 1."""
    patches = comfy.lora.load_lora(dict(tensors), {prefix: f"{prefix}.weight"}, log_missing=False)
    patch = (1.0, patches[f"{prefix}.weight"], 1.0, None, None)
    return comfy.lora.calculate_weight([patch], base.clone(), f"{prefix}.weight")


@pytest.mark.parametrize("style", list(KEY_STYLES))
@pytest.mark.parametrize("inner", [(5,), (4, 3, 3)])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_comfyui_sees_the_layers_that_we_see(
    comfy: ModuleType, style: str, inner: tuple[int, ...], alpha: float | None
) -> None:
    factors = layer(3, 6, inner, alpha)
    up, down = KEY_STYLES[style]
    tensors = {f"x{up}": factors.up, f"x{down}": factors.down}
    if alpha is not None:
        tensors["x.alpha"] = torch.tensor(alpha)
    base = torch.randn(6, *inner)
    got = patched(comfy, tensors, base).double() - base
    assert torch.allclose(got, delta(factors), rtol=1e-6, atol=1e-6)
    assert torch.equal(delta(parse(tensors).layers["x"]), delta(factors))


@pytest.mark.parametrize("style", ["kohya", "peft"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("written", [None, 1.0])
def test_comfyui_adds_delta(
    comfy: ModuleType,
    tmp_path: Path,
    style: str,
    dtype: torch.dtype,
    alpha: float | None,
    written: float | None,
) -> None:
    """Ranks 1 to 32 in one file, with each layer's rank as its alpha and with one alpha folded into all."""
    shapes = [(1, (40,)), (32, (40,)), (5, (4, 3, 3))]
    layers = {f"p{rank}": layer(rank, 48, inner, alpha) for rank, inner in shapes}
    path = write_new(tmp_path, "x", to_state_dict(layers, style, dtype, written), {})
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    for prefix, factors in layers.items():
        expected = delta(factors)
        got = patched(comfy, tensors, torch.zeros(expected.shape), prefix)
        assert (got - expected).norm() <= BOUNDS[dtype] * expected.norm()


@pytest.mark.parametrize("limits", [(0.7, 0, 0.0), (1.0, 3, 0.0), (1.0, 0, 0.004), (0.9, 6, 0.003)])
def test_comfyui_reads_what_a_cut_leaves(comfy: ModuleType, tmp_path: Path, limits: tuple[float, int, float]) -> None:
    layers = {f"p{rank}": layer(rank, 16, (20,)) for rank in (1, 4, 12, 16)}
    tensors = to_state_dict(layers, "kohya", torch.float32)
    entries = {n: layer_info(f, nu=math.log(10) / f.rank, order="importance") for n, f in layers.items()}
    metadata = build(tensors, name="x", family="sd1", layers=entries, training={})
    result = resize(parse(tensors, metadata), *limits)
    assert result.bytes_after < result.bytes_before
    path = write_new(tmp_path, "less", result.document.state_dict(), result.document.metadata)
    file = comfy.utils.load_torch_file(str(path), safe_load=True)
    assert read(path).notes == []
    for prefix, factors in result.document.layers.items():
        if factors.rank:
            got = patched(comfy, file, torch.zeros(16, 20), prefix)
            expected = delta(factors)
            assert (got - expected).norm() <= 1e-6 * expected.norm()  # float32


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_diffusers_adds_delta(tmp_path: Path, dtype: torch.dtype) -> None:
    """Where alphas differ, diffusers loses those of attention layers; with one for all it is exact."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
        sample_size=8,
    )
    names = [name for name, _ in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    before = {name: unet.get_submodule(name).weight.detach().clone() for name in names}
    layers = {
        name: layer(rank, weight.shape[0], (weight.shape[1],)) for rank, (name, weight) in enumerate(before.items(), 1)
    }
    prefixed = {f"lora_unet_{name.replace('.', '_')}": factors for name, factors in layers.items()}
    tensors = to_state_dict(prefixed, "kohya", dtype, alpha=1.0)
    entries = {prefix: layer_info(factors) for prefix, factors in prefixed.items()}
    metadata = build(tensors, name="x", family="sd1", layers=entries, training={})
    path = write_new(tmp_path, "x", tensors, metadata)

    parts = ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    pipeline: Any = StableDiffusionPipeline(**dict.fromkeys(parts), unet=unet, requires_safety_checker=False)
    pipeline.load_lora_weights(str(path))
    unet.fuse_lora()
    assert len(names) == 32
    for name, factors in layers.items():
        expected = delta(factors)
        got = unet.get_submodule(name).base_layer.weight - before[name]
        # The sum with the base weight, of size 0.1 to 0.3, rounds at 6e-8 as well.
        assert (got - expected).norm() <= BOUNDS[dtype] * expected.norm() + 1e-7 * before[name].norm()


def test_comfyui_shows_the_metadata_of_a_file_with_many_layers(comfy: ModuleType, tmp_path: Path) -> None:
    """The call of its /view_metadata, with its limit; the entries of layers are shortened for it."""
    tensors, layers = file_of(2300, rank=1, width=2)
    metadata = build(tensors, name="x", family="sdxl", layers=layers, training={"steps": 10})
    path = write_new(tmp_path, "x", tensors, metadata)
    shown = comfy.utils.safetensors_header(str(path), max_size=1024 * 1024)
    assert json.loads(shown)["__metadata__"] == metadata

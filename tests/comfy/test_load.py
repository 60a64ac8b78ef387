"""Load Adaptive LoRA on real models: exactly what ComfyUI's own loader does, for files of all kinds, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph import (
    assert_same_weights,
    load,
    patched_weights,
    random_lora,
    sample,
    stock,
    train,
    untouched,
    write_lora,
)
from torch import Tensor

from dev import assets
from lora2.files.keys import KEY_STYLES

SmallModel = Callable[[str], Any]


# --- the same as ComfyUI


@pytest.fixture(scope="module")
def checkpoint(comfy: Any) -> tuple[Any, Any]:
    """The small SD1.x checkpoint: its model and its text encoder."""
    with torch.inference_mode():
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(assets.checkpoint()), output_vae=False)
    return model, clip


def text_lora(rank: int = 3) -> dict[str, Tensor]:
    """Layers of SD1.x's text encoder in kohya's keys, without alphas."""
    g = torch.Generator().manual_seed(9)
    prefixes = [f"lora_te_text_model_encoder_layers_{n}_self_attn_{p}_proj" for n in (0, 11) for p in ("q", "out")]
    return {f"{p}.lora_{kind}.weight": 0.1 * torch.randn(*shape, generator=g)
            for p in prefixes for kind, shape in (("up", (768, rank)), ("down", (rank, 768)))}  # fmt: skip


@pytest.mark.parametrize(("strength", "strength_clip"), [(1.0, 1.0), (0.7, -1.3), (1.0, 0.0)])
def test_a_whole_checkpoint_is_patched_as_comfyui_does_it(
    strength: float, strength_clip: float, checkpoint: Any, folders: Path, said: Callable[[], str]
) -> None:
    """U-Net in float32 and text encoder in float16, alphas half the rank and none, linear layers and convolutions."""
    model, clip = checkpoint
    unet = random_lora(model, target="all linear + convolution")
    unet = {k: v.half() for k, v in unet.items() if "down_blocks_0" in k or "mid_block" in k}
    write_lora(folders, "both.safetensors", unet | text_lora(), {"ss_output_name": "both"})
    ours = load(model, "both.safetensors", clip=clip, strength_model=strength, strength_clip=strength_clip)
    theirs = stock(model, "both.safetensors", strength, clip, strength_clip)
    assert len(assert_same_weights(ours[0], theirs[0])) == len([k for k in unet if k.endswith(".alpha")])
    assert len(assert_same_weights(ours[1], theirs[1])) == 4
    attached = theirs[0].get_attachment("lora_metadata") or {"ss_output_name": "both"}  # older hosts attach nothing
    assert ours[0].get_attachment("lora_metadata") == attached
    assert said() == f"{len(ours[0].patches) + 4} of {len(ours[0].patches) + 4} layers loaded."
    assert len(ours[2].layers) == len(ours[0].patches) + 4


def test_without_a_text_encoder_its_layers_are_named(checkpoint: Any, folders: Path, said: Callable[[], str]) -> None:
    model, _ = checkpoint
    write_lora(folders, "both.safetensors", random_lora(model) | text_lora())
    ours = load(model, "both.safetensors")
    assert_same_weights(ours[0], stock(model, "both.safetensors")[0])
    assert ours[1] is None
    count = len(ours[0].patches)
    assert f"{count} of {count + 4} layers loaded; 4 need a text encoder (connect clip): lora_te_text_model" in said()


def test_flux_is_patched_as_comfyui_does_it(model: Any, folders: Path) -> None:
    write_lora(folders, "flux.safetensors", random_lora(model, target="all linear + convolution"))
    for strength in (1.0, -0.5):
        with untouched(model):
            ours = load(model, "flux.safetensors", strength_model=strength)
        assert_same_weights(ours[0], stock(model, "flux.safetensors", strength)[0])


def test_our_own_file_is_patched_as_comfyui_does_it(model: Any, folders: Path, said: Callable[[], str]) -> None:
    """Through the file, through the node's own output, and through ComfyUI's Load LoRA Model and Save nodes."""
    from comfy_extras.nodes_train import LoraModelLoader, SaveLoRA

    lora, applied, _, _, name = train(model, save_dtype="fp32", min_rank=1)
    weights = assert_same_weights(load(model, name)[0], stock(model, name)[0])
    assert said() == "12 of 12 layers loaded."
    assert all(torch.equal(weight, weights[key]) for key, weight in patched_weights(applied).items())
    with torch.inference_mode():
        plain = LoraModelLoader.execute(model, lora, 1.0).result[0]
        SaveLoRA.execute(lora, "loras/stock")
    assert all(torch.equal(weight, weights[key]) for key, weight in patched_weights(plain).items())
    (folders / "output/loras/stock_00001_.safetensors").rename(folders / "loras/stock.safetensors")
    assert_same_weights(stock(model, "stock.safetensors")[0], stock(model, name)[0])


def test_our_lora_in_bypass_mode_is_the_same_picture(model: Any, folders: Path) -> None:
    """For quantised models ComfyUI adds the LoRA's own path to a layer; the sum is rounded elsewhere."""
    from comfy_extras.nodes_train import LoraModelLoader

    lora, applied, *_ = train(model, save_dtype="fp32", learning_rate=3e-2)
    with torch.inference_mode():
        bypassed = LoraModelLoader.execute(model, lora, 1.0, bypass=True).result[0]
    picture = sample(applied)
    assert (picture - sample(model)).norm() > 1e-2 * picture.norm()
    # float32: W x + B A x against (W + B A) x, through all blocks twice.
    assert (picture - sample(bypassed)).norm() < 1e-4 * picture.norm()


# --- the files of others


def as_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD's attention in the keys of diffusers' first format; alphas as they are."""
    names = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_": "attn1",
             "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_": "attn2"}  # fmt: skip
    out = {}
    for start, attention in names.items():
        for p in "qkv":
            prefix = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.{attention}.processor.to_{p}"
            out[f"{prefix}_lora.up.weight"] = tensors[f"{start}{p}.lora_up.weight"]
            out[f"{prefix}_lora.down.weight"] = tensors[f"{start}{p}.lora_down.weight"]
    return out


def as_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flux in the keys of diffusers and peft: q, k, v apart, which ComfyUI puts into slices of one weight."""
    g = torch.Generator().manual_seed(3)
    out = {}
    for block in (0, 1):
        for p in ("to_q", "to_k", "to_v", "to_out.0"):
            prefix = f"transformer.transformer_blocks.{block}.attn.{p}"
            out[f"{prefix}.lora_A.weight"] = torch.randn(4, 128, generator=g) * 0.1
            out[f"{prefix}.lora_B.weight"] = torch.randn(128, 4, generator=g) * 0.1
    return out


def as_lokr(_: dict[str, Tensor]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    prefix = "diffusion_model.double_blocks.0.img_attn.proj"
    return {f"{prefix}.lokr_w1": torch.randn(8, 8, generator=g), f"{prefix}.lokr_w2": torch.randn(16, 16, generator=g),
            f"{prefix}.alpha": torch.tensor(1.0)}  # fmt: skip


def as_dora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every layer a DoRA."""
    ups = {k.removesuffix(".lora_B.weight"): v for k, v in tensors.items() if k.endswith(".lora_B.weight")}
    return tensors | {f"{prefix}.dora_scale": torch.rand(len(up), 1) + 0.5 for prefix, up in ups.items()}


def as_mixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain LoRA, one layer of which is a LoKr and one of which has a bias too."""
    lokr = as_lokr(tensors)
    prefix = "diffusion_model.double_blocks.0.img_attn.proj"
    plain = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    bias = {"diffusion_model.double_blocks.0.img_attn.qkv.diff_b": torch.randn(384)}
    return plain | lokr | bias


@pytest.mark.parametrize(
    ("family", "change", "whole", "cut"),
    [
        ("flux", as_peft, "8 of 8 layers loaded.", "8 of 8 layers loaded. Cut from"),
        ("flux", as_lokr, "1 of 1 layers loaded. 1 part", "1 part cannot be cut and stays whole: LoKr."),
        ("flux", as_dora, "12 of 12 layers loaded. 12 parts", "12 parts cannot be cut and stay whole: DoRA."),
        ("flux", as_mixed, "12 of 12 layers loaded. 2 parts", "2 parts cannot be cut and stay whole: LoKr, bias."),
        ("sd15", as_diffusers, "6 of 6 layers loaded.", "6 of 6 layers loaded. Cut from"),
    ],
    ids=["peft", "LoKr", "DoRA", "mixed", "diffusers"],
)
def test_files_of_others_load_and_say_what_cannot_be_cut(
    family: str, change: Any, whole: str, cut: str, small_model: SmallModel, folders: Path, said: Callable[[], str]
) -> None:
    with torch.inference_mode():
        model = small_model(family)
    write_lora(folders, "theirs.safetensors", change(random_lora(model)))
    ours = load(model, "theirs.safetensors")[0]
    assert whole in said()
    weights = assert_same_weights(ours, stock(model, "theirs.safetensors")[0])
    assert len(weights) > 0
    smaller = load(model, "theirs.safetensors", max_rank=2)[0]
    assert cut in said()
    assert smaller.patches.keys() == ours.patches.keys()
    kinds = {type(p[-1][1]).__name__ for p in smaller.patches.values()}
    if kinds == {"LoRAAdapter"} and change is not as_dora:
        assert {p[1].weights[1].shape[0] for patches in smaller.patches.values() for p in patches} == {2}
    if change in (as_lokr, as_dora):
        assert_same_weights(smaller, ours)


def test_a_file_without_plain_layers_stops_only_what_wants_ranks(model: Any, folders: Path) -> None:
    """ComfyUI's own way to leave one output out: the model goes on, a node behind `ranks` says why it does not run."""
    from comfy_execution.graph_utils import ExecutionBlocker

    write_lora(folders, "lokr.safetensors", as_lokr({}))
    loaded, _, ranks = load(model, "lokr.safetensors")
    assert len(loaded.patches) == 1
    assert isinstance(ranks, ExecutionBlocker)
    assert ranks.message == "lokr holds no plain LoRA layer, so it has no ranks to show."


def test_partial_matches_are_counted_and_named(model: Any, folders: Path, said: Callable[[], str]) -> None:
    """A LoRA for a deeper model of the same family: what fits is loaded, as ComfyUI does."""
    tensors = random_lora(model)
    deeper = {k.replace("double_blocks.1", "double_blocks.9"): v for k, v in tensors.items()}
    write_lora(folders, "deeper.safetensors", deeper | {"lora_unet_x.y": torch.zeros(1)})
    ours = load(model, "deeper.safetensors")[0]
    assert "8 of 13 layers loaded; 5 belong to no layer here: diffusion_model.double_blocks.9." in said()
    assert said().count("double_blocks.9") == 4
    assert "lora_unet_x.y" in said()
    assert_same_weights(ours, stock(model, "deeper.safetensors")[0])


def test_long_lists_of_names_are_shortened(model: Any, folders: Path, said: Callable[[], str]) -> None:
    tensors = random_lora(model)
    for n in range(100):
        tensors |= {f"x{n}.lora_up.weight": torch.zeros(2, 1), f"x{n}.lora_down.weight": torch.zeros(1, 2)}
    write_lora(folders, "more.safetensors", tensors)
    load(model, "more.safetensors")
    assert "12 of 112 layers loaded; 100 belong to no layer here: " in said()
    assert said().endswith("and 95 more.")
    assert len(said()) < 200


def test_keys_that_comfyui_renames_are_found(small_model: SmallModel, folders: Path) -> None:
    """Some trainers' files are renamed by ComfyUI before it looks at them; what it applies counts as fitting."""
    with torch.inference_mode():
        model = small_model("sd15")
    tensors = {k.replace("lora_unet_", "lora_unet__"): v for k, v in random_lora(model).items()}
    tensors["lora_unet__blocks_0_cross_attn_k.lora_down.weight"] = torch.zeros(1, 2)  # tells ComfyUI the trainer
    tensors["lora_unet__blocks_0_cross_attn_k.lora_up.weight"] = torch.zeros(2, 1)
    write_lora(folders, "renamed.safetensors", tensors)
    assert_same_weights(load(model, "renamed.safetensors")[0], stock(model, "renamed.safetensors")[0])


def test_what_nothing_can_apply_is_not_counted_as_loaded(model: Any, folders: Path, said: Callable[[], str]) -> None:
    """Half of a pair, and a layer of rank 0, are named; a pair of whole numbers, which ComfyUI applies, counts once."""
    tensors = random_lora(model)
    up, down = (suffix for suffix in KEY_STYLES["peft"])
    first, second, third, *rest = [key.removesuffix(up) for key in tensors if key.endswith(up)]
    del tensors[first + up], tensors[first + ".alpha"]
    tensors[second + up], tensors[second + down] = tensors[second + up][:, :0], tensors[second + down][:0]
    for suffix in (up, down):
        tensors[third + suffix] = (10 * tensors[third + suffix]).to(torch.int8)
    write_lora(folders, "mixed.safetensors", tensors)
    load(model, "mixed.safetensors")
    assert f"{len(rest) + 1} of {len(rest) + 3} layers loaded" in said()
    assert "1 are half of a pair" in said()
    assert "1 have rank 0" in said()

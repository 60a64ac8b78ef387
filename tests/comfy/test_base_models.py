"""Training on models that are not plain: with a LoRA, in eight bits, with another precision or sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph import (
    assert_same_weights,
    files_in,
    load,
    random_lora,
    sample,
    stock,
    train,
    untouched,
    updates,
    write_lora,
)
from training import captions, latents

from dev import assets

SmallModel = Callable[[str], Any]


def test_training_on_a_model_with_a_lora_learns_only_the_new_part(model: Any, folders: Path) -> None:
    """The base of the training is the model with its patches; the file holds what was added to that."""
    write_lora(folders, "first.safetensors", random_lora(model))
    styled = load(model, "first.safetensors")[0]
    with untouched(styled):
        lora, applied, _, loss, name = train(styled, save_dtype="fp32", learning_rate=3e-2, min_rank=1)
    assert loss["loss"] != train(model, save_dtype="fp32", learning_rate=3e-2)[3]["loss"]
    assert [len(patches) for patches in applied.patches.values()] == [2] * 12
    assert torch.equal(sample(applied), sample(load(styled, name)[0]))
    still = train(styled, learning_rate=1e-8, save_dtype="fp32")[4]
    for key, update in updates(load(model, still)[0]).items():
        assert update.norm() < 1e-4 * updates(styled)[key].norm(), "the first LoRA must not be in the second's file"
    assert lora.keys()


def test_weights_that_training_patches_are_like_those_that_sampling_patches(model: Any, folders: Path) -> None:
    """Training loads the model as every node does; made outside inference mode, they would be another kind of tensor."""
    write_lora(folders, "first.safetensors", random_lora(model))
    styled = load(model, "first.safetensors")[0]
    train(styled, precision="bf16")
    assert all(p.is_inference() and not p.requires_grad for p in styled.model.parameters())


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_training_on_a_lora_in_bypass_mode(checkpointing: str, model: Any, folders: Path) -> None:
    """Its weights are inference tensors outside the model, which autograd would refuse; they come back as they were."""
    from comfy.sd import load_bypass_lora_for_models

    with torch.inference_mode():
        bypassed, _ = load_bypass_lora_for_models(model, None, random_lora(model), 1.0, 0.0)
    with untouched(bypassed):
        losses = train(bypassed, checkpointing=checkpointing, save_dtype="fp32")[3]["loss"]
    write_lora(folders, "first.safetensors", random_lora(model))
    patched = train(load(model, "first.safetensors")[0], save_dtype="fp32")[3]["loss"]
    assert losses == pytest.approx(patched, rel=1e-3), "the same base, its LoRA added in another order"


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_training_on_a_model_in_eight_bits(
    dtype: str, model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As UNETLoader loads it with weight_dtype; the file loads onto that model and onto the one in full precision."""
    import folder_paths

    import nodes

    paths = ([str(assets.family("flux").parent)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", paths)
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    with torch.inference_mode():
        eight = nodes.UNETLoader().load_unet("flux.safetensors", dtype)[0]
    assert {p.element_size() for p in eight.model.diffusion_model.parameters()} == {1}
    with untouched(eight):
        _, applied, _, loss, name = train(eight, learning_rate=3e-2)
    assert all(torch.tensor(loss["loss"]).isfinite())
    plain, moved = sample(eight), sample(applied)
    assert (moved - plain).norm() > 1e-3 * plain.norm()
    assert_same_weights(load(eight, name)[0], stock(eight, name)[0])
    assert_same_weights(load(model, name)[0], stock(model, name)[0])
    assert files_in(folders / "loras") == {name}


def test_a_precision_is_kept_from_run_to_run(model: Any, folders: Path) -> None:
    """ComfyUI leaves the last run's model loaded, with the precision of that run; the next one must not take it for its own."""
    runs = {
        choice: [train(model, precision=choice)[3]["loss"] for _ in range(2)] for choice in ("bf16", "auto", "fp32")
    }
    assert all(first == second for first, second in runs.values())
    assert runs["auto"] == runs["fp32"]
    assert runs["bf16"] != runs["fp32"]


def test_training_takes_the_sampling_of_its_own_branch(small_model: SmallModel, folders: Path) -> None:
    """A node that changes the prediction type holds for its branch of the graph, whatever branch ran before."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    with torch.inference_mode():
        model = small_model("sd15")
        other = ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    short = {"latents": latents("sd15")[:1], "conditioning": captions("sd15", 1), "steps": 1, "exclude": "*output*"}
    kinds = []
    for branch in (other, model, other, model):
        lora = train(branch, "sd15", **short)[0]
        kinds.append(lora.metadata["modelspec.prediction_type"])
    assert kinds == ["v", "epsilon", "v", "epsilon"]

"""Out of memory and bad steps on real models, as the node meets them: the run goes on, or ends with one clear sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph import files_in, train, untouched
from training import captions, latents, pack

SmallModel = Callable[[str], Any]
BATCH = {"batch_size": 4, "steps": 6, "settle_at": 0.5, "save_dtype": "fp32"}
FIVE = ((8, 8),) * 5


def checkpointed(model: Any) -> bool:
    blocks = pack("nodes.comfy.checkpointing").repeated_blocks(model.model.diffusion_model)
    return any("forward" in vars(block) for block in blocks)


def short_of_memory(patch: pytest.MonkeyPatch, model: Any, fits: Callable[[int, bool], bool]) -> list[tuple[int, bool]]:
    """The model runs out of memory unless so many samples fit, with or without checkpointing; returns what was tried."""
    import comfy.model_base

    real, tried = comfy.model_base.BaseModel.apply_model, []

    def apply_model(self: Any, noisy: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, noisy, *args, **kwargs)
        if self is model.model and torch.is_grad_enabled():
            tried.append((len(noisy), checkpointed(model)))
            if not fits(*tried[-1]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return answer

    patch.setattr(comfy.model_base.BaseModel, "apply_model", apply_model)
    return tried


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_the_run_goes_on_with_less_and_learns_the_same(
    family: str, small_model: SmallModel, folders: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    """First checkpointing, then halves, from the step where it happened; the LoRA is the one of a run with enough memory."""
    with torch.inference_mode():
        model = small_model(family)
    data = {"latents": latents(family, FIVE), "conditioning": captions(family, 5)}
    more = BATCH | data | ({"exclude": "*input_blocks*\n*output_blocks*", "steps": 4} if family == "sd15" else {})
    plenty = train(model, family, **more)
    with untouched(model, family), monkeypatch.context() as patch:
        tried = short_of_memory(patch, model, lambda count, saving: count <= 1 or (len(tried) <= 2))
        poor = train(model, family, **more)
    assert tried[:6] == [(4, False), (4, False), (4, False), (4, True), (2, True), (1, True)]
    assert set(tried[6:]) == {(1, True)}
    # float32 rounding, through four steps of Adam.
    assert poor[3]["loss"] == pytest.approx(plenty[3]["loss"], rel=1e-3)
    for key in plenty[0]:
        if key.endswith(("up.weight", "B.weight")):
            down = key.replace("lora_up", "lora_down").replace("lora_B", "lora_A")
            one, other = (t[key].flatten(1) @ t[down].flatten(1) for t in (plenty[0], poor[0]))
            assert torch.linalg.norm(one - other) <= 0.02 * torch.linalg.norm(one), key
    assert said() == (
        "Saved as t/mug_00002.safetensors. Memory ran out on the way: gradient checkpointing is on; 2 of a batch's pictures at a "
        "time, not 4; 1 of a batch's pictures at a time, not 2."
    )


@pytest.mark.parametrize("choice", ["off", "on"])
def test_checkpointing_that_a_person_has_set_is_left_as_it_is(
    choice: str, model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"latents": latents("flux", FIVE), "conditioning": captions("flux", 5), "checkpointing": choice}
    with untouched(model), monkeypatch.context() as patch:
        tried = short_of_memory(patch, model, lambda count, _: count <= 2)
        train(model, **(BATCH | data))
    assert {saving for _, saving in tried} == {choice == "on"}
    assert max(count for count, _ in tried[1:]) == 2


def test_when_nothing_helps_it_stops_once_saves_and_the_host_forgets_its_models(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message with what to change, no second one behind it; then ComfyUI unloads all models, as at its own errors."""
    import comfy.model_management

    with untouched(model), monkeypatch.context() as patch:
        tried = short_of_memory(patch, model, lambda *_: len(tried) <= 4)
        with pytest.raises(pack("lora2.util.memory").OutOfMemory) as error:
            train(model, **(BATCH | {"accumulation": 2}))
        assert comfy.model_management.current_loaded_models == []
    message = str(error.value)
    assert message.startswith(
        "Memory ran out at step 3. Train on smaller pictures, adapt fewer layers, lower initial_rank"
    )
    assert "Stopped after 2 of 6 steps; the LoRA so far is saved as t/mug_00001.safetensors" in message
    assert error.value.__context__ is None
    assert files_in(folders) == {"loras/t/mug_00001.safetensors"}


@pytest.mark.parametrize("where", ["loading the model", "encoding a caption", "laying out the LoRA"])
def test_no_room_to_start_is_said_in_one_sentence(
    where: str, model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management
    import comfy.samplers

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    owner, name = {
        "loading the model": (comfy.model_management, "load_models_gpu"),
        "encoding a caption": (comfy.samplers, "encode_model_conds"),
        "laying out the LoRA": (pack("lora2.adapters.layer").Adapter, "_new_rows"),
    }[where]
    with untouched(model), monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(
            pack("lora2.util.errors").LoraError, match=r"^Memory ran out before the first step, while the model was"
        ):
            train(model)
    assert files_in(folders) == set()


def test_no_room_while_the_picture_of_the_run_is_drawn(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps: the LoRA so far is saved."""

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with untouched(model), monkeypatch.context() as patch:
        patch.setattr(pack("nodes.runs.step_callback"), "preview_picture", fail)
        words = (
            r"^Memory ran out between two steps\. Stopped after 1 of 3 steps; the LoRA so far is saved as t/mug_00001"
        )
        with pytest.raises(pack("lora2.util.memory").OutOfMemory, match=words):
            train(model)
    assert files_in(folders) == {"loras/t/mug_00001.safetensors"}


def test_no_room_while_saving_is_tried_again(model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, calls = pack("nodes.runs.lora_file").LoraFile, []
    real = files.state_dict

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return real(*args, **kwargs)

    with untouched(model), monkeypatch.context() as patch:
        patch.setattr(files, "state_dict", state_dict)
        assert train(model)[4] == "t/mug_00001.safetensors"
    assert len(calls) == 2


# --- steps that are no numbers


def test_bad_steps_are_skipped_when_told_so(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    """The loss for the graph has the steps that were taken; the words name the others."""
    import comfy.model_base

    real, calls = comfy.model_base.BaseModel.apply_model, iter(range(1, 99))

    def apply_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        return answer * math.nan if self is model.model and next(calls) in (2, 5) else answer

    with untouched(model), monkeypatch.context() as patch:
        patch.setattr(comfy.model_base.BaseModel, "apply_model", apply_model)
        lora, _, _, loss, _ = train(model, steps=6, on_bad_step="skip")
    assert len(loss["loss"]) == 4
    assert all(map(math.isfinite, loss["loss"]))
    assert all(bool(t.isfinite().all()) for t in lora.values())
    assert said() == "Saved as t/mug_00001.safetensors. Steps that were skipped: 2 (2, 5)."


def test_the_layers_of_a_bad_step_are_named_by_their_paths(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is spoiled between two blocks: those before it are named, those after it are not."""
    last = model.model.diffusion_model.single_blocks[-1]
    layers = pack("nodes.comfy.layers").select_layers(model.model, "attention")
    after = [
        name
        for name in layers
        if name.startswith(f"single_blocks.{len(model.model.diffusion_model.single_blocks) - 1}.")
    ]

    def spoil(_m: Any, args: Any) -> Any:
        if args[0].requires_grad:
            args[0].register_hook(lambda gradient: gradient * math.nan)

    handle = last.register_forward_pre_hook(spoil)
    try:
        with pytest.raises(pack("lora2.training.monitor").Diverged) as error:
            train(model, checkpointing="off")
    finally:
        handle.remove()
    message = str(error.value)
    assert message.startswith("The gradients are not finite at step 1 (in double_blocks.0.")
    assert f"{len(layers) - len(after) - 3} more of {len(layers)} layers" in message
    assert files_in(folders) == set()

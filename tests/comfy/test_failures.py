"""What goes wrong while training runs or saves: what was learned is kept and said, the model stays as it was."""

from __future__ import annotations

import builtins
import errno
import gc
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph import files_in, refused, train, trouble_at, untouched
from training import pack

SmallModel = Callable[[str], Any]


# --- disks


def full_below(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """From now on writing below a folder fails with this errno, after some bytes went through."""
    writer, real = pack("lora2.files.writer"), builtins.open

    def opened(path: Any, mode: str = "r", *more: Any) -> Any:
        file = real(path, mode, *more)
        if "x" in mode and Path(path).is_relative_to(folder):
            write, left = file.write, [1]

            def limited(data: Any) -> int:
                if left.pop() if left else 0:
                    return write(bytes(data)[:16])
                raise OSError(number, os.strerror(number))

            return _Limited(file, limited)
        return file

    monkeypatch.setattr(writer, "open", opened, raising=False)


class _Limited:
    """A file whose write is another one."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> _Limited:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_no_room_is_seen_before_training(model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    refused(model, r"has 1.0 MB free, but the LoRA may need 0\.\d MB. Free some space", folders)


def test_a_folder_that_cannot_be_written_is_seen_before_training(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of the system, since root, who runs some tests, may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path) != folders / "loras")
    refused(model, r"may not write into its LoRA folder \(loras\). Allow it", folders)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_was_learned_goes_elsewhere_when_the_disk_fails(
    number: int, model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the reason and the place; the file there is the adapter."""
    reason = {errno.ENOSPC: "The disk is full", errno.EIO: "Input/output error"}.get(number, "No permission to write")
    with monkeypatch.context() as patch:
        full_below(patch, folders / "loras", number)
        with untouched(model), pytest.raises(pack("lora2.util.errors").LoraError) as error:
            train(model)
    assert reason in str(error.value)
    assert "saved as output/loras/mug_00001.safetensors instead; move it to your LoRA folder" in str(error.value)
    assert files_in(folders) == {"output/loras/mug_00001.safetensors"}
    shutil.copy(folders / "output" / "loras" / "mug_00001.safetensors", folders / "loras" / "moved.safetensors")
    saved = pack("lora2.files.document").read(folders / "loras" / "moved.safetensors")
    again = train(model)[0]
    assert all(torch.equal(again[k], v) for k, v in saved.state_dict().items())


def test_two_full_disks_are_said_and_nothing_half_is_left(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_below(patch, folders, errno.ENOSPC)
        with (
            untouched(model),
            pytest.raises(pack("lora2.util.errors").LoraError, match=r"The disk is full.*was not saved in"),
        ):
            train(model)
    assert files_in(folders) == set()


# --- what goes wrong while it trains


def raising(error: BaseException) -> Callable[[Any], Any]:
    def trouble(_: Any) -> Any:
        raise error

    return trouble


def cancelled(answer: torch.Tensor) -> torch.Tensor:
    """What ComfyUI's cancel button does, in the middle of a step."""
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    return answer


def stops() -> dict[str, tuple[type[BaseException], str, Callable[[torch.Tensor], Any]]]:
    """What may end a run at its third step: the exception that the graph sees, its words, and the cause."""
    from comfy.model_management import InterruptProcessingException

    wrong = pack("lora2.util.errors").LoraError
    return {
        "NaN": (wrong, r"The loss became nan at step 3.*lower the learning rate.*saved as t/mug_00001", lambda x: x * math.nan),
        "infinity": (wrong, r"The loss became inf at step 3.*saved as t/mug_00001", lambda x: x / 0),
        "out of memory": (
            wrong, r"Memory ran out at step 3.*checkpointing.*saved as t/mug_00001", raising(torch.OutOfMemoryError("no memory"))
        ),
        "an error": (RuntimeError, r"^a kernel failed$", raising(RuntimeError("a kernel failed"))),
        "cancelled": (InterruptProcessingException, "^$", cancelled),
        "Ctrl-C": (KeyboardInterrupt, "^$", raising(KeyboardInterrupt())),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stop", "checkpointing"),
    [
        *((stop, "off") for stop in ("NaN", "infinity", "out of memory", "an error", "cancelled", "Ctrl-C")),
        *((stop, "on") for stop in ("out of memory", "cancelled")),
    ],
)
def test_a_run_that_ends_early_keeps_what_it_learned(
    stop: str,
    checkpointing: str,
    model: Any,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Saved, said, and nothing left behind on the model; the file holds exactly the steps that were good."""
    error, words, trouble = stops()[stop]
    # ComfyUI looks for a cancel wherever it casts weights, which recomputed blocks do once more in the backward pass.
    done = 3 if (stop, checkpointing) == ("cancelled", "off") else 2
    more = {"steps": 5, "checkpointing": checkpointing, "precision": "bf16", "save_dtype": "fp32", "settle_at": 1.0}
    more["on_out_of_memory"] = "stop"
    more |= {"schedule": "constant", "warmup": 0.0, "rank_hold": 0.0, "rank_learning_rate": 0.02, "initial_rank": 12}
    with untouched(model), monkeypatch.context() as patch, caplog.at_level("INFO", "lora2"):
        trouble_at(patch, model, 3, trouble)
        with pytest.raises(error, match=words):
            train(model, **more)
    said = f"Stopped after {done} of 5 steps; the LoRA so far is saved as t/mug_00001.safetensors."
    assert said in caplog.text
    assert files_in(folders) == {"loras/t/mug_00001.safetensors"}
    kept = pack("lora2.files.document").read(folders / "loras/t/mug_00001.safetensors")
    assert kept.info["training"]["steps_done"] == done
    monkeypatch.setattr(pack("lora2.config").TrainingConfig, "rest_step", 5)  # that of five steps
    if (done, checkpointing) not in WHOLE:
        WHOLE[done, checkpointing] = train(model, **(more | {"steps": done}))[0]
    whole = WHOLE[done, checkpointing]
    assert kept.state_dict().keys() == whole.keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in kept.state_dict().items())


WHOLE: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
"""LoRAs of runs that were not stopped, by their steps and checkpointing."""


@pytest.mark.parametrize("stop", ["out of memory", "cancelled"])
def test_a_unet_is_left_as_it_was_too(
    stop: str, small_model: SmallModel, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything on that hangs itself into a model: adapters, checkpointing, the probe of cross-attention."""
    error, words, trouble = stops()[stop]
    with torch.inference_mode():
        unet = small_model("sd15")
    more = {"exclude": "*input_blocks*", "checkpointing": "on", "entropy_weight": 0.1, "on_out_of_memory": "stop"}
    with untouched(unet, "sd15"), monkeypatch.context() as patch:
        trouble_at(patch, unet, 3, trouble)
        with pytest.raises(error, match=words):
            train(unet, "sd15", **more)
    assert files_in(folders) == {"loras/t/mug_00001.safetensors"}


def test_a_run_that_ends_early_leaves_no_memory_behind(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of all tensors that are alive; the first run also fills what Python and torch keep for good."""

    def alive() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_nested]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    held = []
    for call in (2, 3, 2):
        with monkeypatch.context() as patch:
            trouble_at(patch, model, call, raising(RuntimeError("no")))
            with pytest.raises(RuntimeError, match=r"^no$"):
                train(model)
        held.append(alive())
    assert held[1] == held[2] == held[0]


def test_nothing_is_saved_when_the_first_step_fails(model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for trouble, words in (
        (lambda x: x * math.nan, "loss became nan at step 1"),
        (raising(RuntimeError("no")), "^no$"),
    ):
        with untouched(model), monkeypatch.context() as patch:
            trouble_at(patch, model, 1, trouble)
            with pytest.raises((pack("lora2.util.errors").LoraError, RuntimeError), match=words):
                train(model)
        assert files_in(folders) == set()


def test_a_full_disk_after_a_bad_step_is_said_with_the_bad_step(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both troubles and where the adapter lies now."""
    with untouched(model), monkeypatch.context() as patch:
        full_below(patch, folders / "loras", errno.ENOSPC)
        trouble_at(patch, model, 3, lambda x: x * math.nan)
        words = "loss became nan.*Stopped after 2 of 3 steps.*disk is full.*saved as output/loras/mug_00001"
        with pytest.raises(pack("lora2.util.errors").LoraError, match=words):
            train(model)
    assert files_in(folders) == {"output/loras/mug_00001.safetensors"}


def test_a_full_disk_after_a_cancel_is_an_error_and_not_a_silent_cancel(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with untouched(model), monkeypatch.context() as patch:
        full_below(patch, folders, errno.ENOSPC)
        trouble_at(patch, model, 2, cancelled)
        with pytest.raises(pack("lora2.util.errors").LoraError, match=r"Stopped after . of 3 steps\. The disk is full"):
            train(model)
    assert files_in(folders) == set()

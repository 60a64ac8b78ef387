"""Disks, folders and clocks that misbehave, for real where this system can: limits, rights, files in the way, two at once."""

from __future__ import annotations

import errno
import gc
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import graph
import pytest
import torch
from graph import train, trouble_at, untouched
from training import pack

from dev import host

NOBODY = 65534


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    """What no disk took is the next run's; here every test has its own."""
    yield
    pack("nodes.runs.save")._unsaved.clear()


def files_in(folders: Path) -> set[str]:
    """Every file below ComfyUI's LoRA and output folders; a run that ends well also leaves its picture in temp/."""
    return {name for name in graph.files_in(folders) if name.startswith(("loras", "output"))}


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """While inside, the system refuses to make any file longer than that: a write fails in its middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def unprivileged() -> Iterator[None]:
    """While inside, permissions bind: root, for whom they do not, becomes nobody; a user stays what they are."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folders(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ComfyUI's folders where anybody may write, so that permissions can be taken away one by one."""
    import folder_paths

    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        for part in ("loras", "output"):
            (base / part).mkdir()
            (base / part).chmod(0o777)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(base / "loras")], {".safetensors"}))
        monkeypatch.setattr(folder_paths, "output_directory", str(base / "output"))
        yield base
        for path in base.rglob("*"):
            path.chmod(0o777)


def then(action: Callable[[], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Trouble for trouble_at: something happens to the disk in the middle of a step, and the step goes on."""

    def trouble(answer: torch.Tensor) -> torch.Tensor:
        action()
        return answer

    return trouble


# --- full disks


def test_a_write_that_fails_in_its_middle_leaves_nothing_and_the_lora_is_kept(
    model: Any, folders: Path, said: Callable[[], str]
) -> None:
    """Both folders refuse; the next run writes it first, byte for byte what it would have been."""
    expected = train(model, save_name="t/other")[0]
    before = files_in(folders)
    with untouched(model), file_limit(20_000), pytest.raises(pack("lora2.util.errors").LoraError) as error:
        train(model)
    assert "The file is larger than the disk or the system allows" in str(error.value)
    assert "kept in memory until ComfyUI ends: free some space and press Run again" in str(error.value)
    assert files_in(folders) == before
    again = train(model)
    assert files_in(folders) == before | {"loras/t/mug_00001.safetensors", "loras/t/mug_00002.safetensors"}
    assert again[4] == "t/mug_00002.safetensors"
    kept = pack("lora2.files.document").read(folders / "loras/t/mug_00001.safetensors").state_dict()
    assert all(torch.equal(kept[key], tensor) for key, tensor in expected.items())
    assert said() == "Saved as t/mug_00002.safetensors."


def test_what_is_kept_is_said_when_it_is_written_and_when_it_still_cannot_be(
    model: Any, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lora2")
    error = pack("lora2.util.errors").LoraError
    with file_limit(20_000):
        for _ in range(2):
            with pytest.raises(error, match="kept in memory"):
                train(model)
    assert "LoRA²: mug, trained before, could still not be written. The file is larger than" in caplog.text
    train(model, save_name="t/third")
    assert caplog.text.count(": trained before, when it could not be written.") == 2
    assert files_in(folders) == {
        f"loras/t/{name}_0000{n}.safetensors" for name, n in (("mug", 1), ("mug", 2), ("third", 1))
    }
    assert pack("nodes.runs.save")._unsaved == []


def test_a_cancel_with_full_disks_keeps_it_too(model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management

    with file_limit(20_000), monkeypatch.context() as patch:
        trouble_at(patch, model, 2, then(comfy.model_management.interrupt_current_processing))
        with pytest.raises(pack("lora2.util.errors").LoraError, match=r"Stopped after . of 3 steps.*kept in memory"):
            train(model)
    assert len(pack("nodes.runs.save")._unsaved) == 1


# --- folders


def test_a_folder_that_loses_its_permissions_while_training_runs(
    model: Any, open_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LoRA folder turns read-only in step 2: the system says no, and it goes to the output folder."""
    with unprivileged(), monkeypatch.context() as patch:
        (open_folders / "loras" / "t").mkdir()
        trouble_at(patch, model, 2, then(lambda: (open_folders / "loras" / "t").chmod(0o555)))
        with pytest.raises(
            pack("lora2.util.errors").LoraError, match=r"No permission to write.*saved as output/loras/mug_00001"
        ):
            train(model)
    assert files_in(open_folders) == {"output/loras/mug_00001.safetensors"}


def test_a_folder_without_permission_is_refused_before_training(model: Any, open_folders: Path) -> None:
    """Asked for the rights that writing will have: those of the effective user."""
    (open_folders / "loras").chmod(0o555)
    with (
        unprivileged(),
        pytest.raises(pack("lora2.util.errors").LoraError, match=r"may not write into its LoRA folder \(loras\)"),
    ):
        train(model)
    assert files_in(open_folders) == set()


def test_no_folder_with_permission_keeps_it_in_memory(
    model: Any, open_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock() -> None:
        for name in ("loras", "output"):
            (open_folders / name).chmod(0o555)

    if os.geteuid() != 0:
        assert (open_folders / "loras").owner()  # chmod is the owner's, who is this user
    lock_as_owner = then(lambda: as_owner(lock))
    with unprivileged(), monkeypatch.context() as patch:
        trouble_at(patch, model, 2, lock_as_owner)
        with pytest.raises(pack("lora2.util.errors").LoraError, match=r"No permission to write.*kept in memory"):
            train(model)
    assert files_in(open_folders) == set()


def as_owner(action: Callable[[], Any]) -> None:
    """Do something as the user that runs the tests."""
    effective = os.geteuid()
    os.seteuid(os.getuid())
    try:
        action()
    finally:
        os.seteuid(effective)


def test_the_folder_vanishes_while_training_runs(model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, with its parent: it is made anew."""
    (folders / "loras" / "t").mkdir()
    with untouched(model), monkeypatch.context() as patch:
        trouble_at(patch, model, 2, then(lambda: shutil.rmtree(folders / "loras")))
        assert train(model)[4] == "t/mug_00001.safetensors"
    assert files_in(folders) == {"loras/t/mug_00001.safetensors"}


def test_a_file_takes_the_folder_s_place_while_training_runs(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with untouched(model), monkeypatch.context() as patch:
        trouble_at(patch, model, 2, then((folders / "loras" / "t").touch))
        with pytest.raises(pack("lora2.util.errors").LoraError, match=r"Not a folder.*saved as output/loras/mug_00001"):
            train(model)
    assert files_in(folders) == {"loras/t", "output/loras/mug_00001.safetensors"}


def test_a_temporary_file_that_somebody_removes_is_an_error_that_loses_nothing(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cleaner of disks, say, between the last byte and the name."""
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        for path in (folders / "loras" / "t").glob("*.partial"):
            path.unlink()

    with untouched(model), monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(pack("lora2.util.errors").LoraError, match=r"No such file.*saved as output/loras/mug_00001"):
            train(model)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT, errno.ESTALE])
def test_what_this_system_cannot_be_made_to_do_is_simulated_at_the_call(
    number: int, model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk mounted read-only, a quota, a network drive that is gone: at the flush, the last call before the name."""

    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with untouched(model), monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(pack("lora2.util.errors").LoraError, match=r"was not saved in.*kept in memory"):
            train(model)
    assert files_in(folders) == set()


# --- ranks that grow


def test_a_disk_that_ranks_may_outgrow_is_said_before_and_while_they_do(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The paper's own form has no size to end with: it may grow as far as θ's learning rate and the layers let it."""
    caplog.set_level("INFO", "lora2")
    more = {"steps": 60, "initial_rank": 4, "rank_learning_rate": 0.1, "rank_hold": 0.0}
    for module in ("plan", "step_callback"):
        monkeypatch.setattr(pack(f"nodes.runs.{module}"), "free_bytes", lambda _: 1000)
    train(model, settle_at=1.0, **more)
    assert caplog.text.count("LoRA²: Ranks may grow: the LoRA may become up to") == 1
    assert caplog.text.count("LoRA²: The LoRA has grown to") == 1
    caplog.clear()
    train(model, settle_at=0.5, **more)  # the cut half-way meets a size that check_place has asked for
    assert "grow" not in caplog.text


def test_how_far_ranks_may_grow_is_what_they_start_from_times_what_their_learning_rate_allows() -> None:
    plan, config = pack("nodes.runs.plan"), pack("lora2.config").TrainingConfig
    shapes = {"a": (100, 50), "b": (1000, 2000)}
    pure = config(steps=100, settle_at=1.0, target_rank=2, initial_rank=8, rank_learning_rate=0.01, file_overhead=10)
    assert plan.file_size_range(shapes, pure) == (10 + 2 * 8 * 3150, 10 + 2 * 21 * 3150)  # e · 8 = 21.7
    long = config(steps=10_000, settle_at=1.0, target_rank=2, initial_rank=8)
    assert plan.file_size_range(shapes, long)[1] == 2 * (50 * 150 + 1000 * 3000)
    for bounded in (config(target_rank=2), config(settle_at=1.0, budget_mb=0.02)):
        least, most = plan.file_size_range(shapes, bounded)
        assert least == most
        assert least <= max(20_000, 2 * 2 * 3150)


# --- clocks


@pytest.mark.parametrize("jump", [-10 * 365 * 86400.0, 10 * 365 * 86400.0])
def test_a_clock_that_jumps_changes_no_name_and_removes_no_file(
    jump: float, model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wall clock and monotonic clock both, ten years back or ahead, in the middle of the second run."""
    train(model)
    other = folders / "loras" / "t" / ".lora2-0123456789abcdef.partial"
    if jump < 0:  # ahead, it would rightly count as left over from a crash
        other.write_bytes(b"another run's, in writing")
    first = (folders / "loras/t/mug_00001.safetensors").read_bytes()
    real, mono, moved = time.time, time.monotonic, [0.0]
    with untouched(model), monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + moved[0])
        patch.setattr(time, "monotonic", lambda: mono() + moved[0])
        trouble_at(patch, model, 2, then(lambda: moved.__setitem__(0, jump)))
        assert train(model)[4] == "t/mug_00002.safetensors"
        assert train(model)[4] == "t/mug_00003.safetensors"
    assert (folders / "loras/t/mug_00001.safetensors").read_bytes() == first
    assert other.exists() == (jump < 0)
    for number in (2, 3):
        document = pack("lora2.files.document").read(folders / f"loras/t/mug_0000{number}.safetensors")
        assert document.info["training"]["seconds"] >= 0


# --- two at once

WRITER = """
import sys
import torch
from lora2.files.writer import write_new
from pathlib import Path
folder, mark = Path(sys.argv[1]), float(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(25):
    print(write_new(folder, "mug", {"w": torch.full((5000,), mark + number)}, {"by": sys.argv[2]}).name, flush=True)
"""


def test_two_processes_write_the_same_name_at_once(folders: Path) -> None:
    """50 files, 50 names, each whole and its writer's own; started together."""
    from safetensors.torch import load_file

    folder = folders / "loras" / "two"
    command = [sys.executable, "-c", WRITER, str(folder)]
    running = [
        subprocess.Popen([*command, mark], cwd=host.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for mark in ("1000", "2000")
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    names = [process.communicate(timeout=60)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert (
        {p.name for p in folder.iterdir()}
        == {f"mug_{n:05d}.safetensors" for n in range(1, 51)}
        == {*names[0], *names[1]}
    )
    for mark, written in zip((1000.0, 2000.0), names, strict=True):
        assert len(written) == 25
        for number, name in enumerate(written):
            assert torch.equal(load_file(folder / name)["w"], torch.full((5000,), mark + number))
    gc.collect()


def test_a_finished_run_that_no_disk_takes_keeps_its_last_state(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LoRA is still in memory, and what made it is on the disk, up to the last step."""

    def full(*_: Any) -> Path:
        raise pack("lora2.util.errors").LoraError("The disk is full.")

    monkeypatch.setattr(pack("nodes.runs.save"), "write_new", full)
    with pytest.raises(pack("lora2.util.errors").LoraError, match=r"The disk is full.*The training state is saved"):
        graph.train(model, steps=5, state_every=4)
    assert max(graph.files_in(folders, states=True)).endswith("_step_000005.safetensors")

"""States on the disk: names, which is newest, whole or not there, and nobody's files removed but the run's own."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora2.checkpoints.directory import CheckpointDirectory, find_checkpoints, list_checkpoints
from lora2.checkpoints.state import State, read_state
from lora2.files import writer
from lora2.util.errors import LoraError


def at(step: int) -> State:
    """A small state of this step."""
    return State.joined(run=State({"x": torch.full((3000,), float(step))}, {"step": step}))


def steps(folder: Path) -> list[int]:
    """The steps of the states in a folder, newest first."""
    return [s.step for s in list_checkpoints(folder)]


def test_the_last_states_are_kept(tmp_path: Path) -> None:
    keeper = CheckpointDirectory(tmp_path / "new", 2)
    for step in (10, 20, 30):
        path = keeper.save(at(step))
        assert float(read_state(path, 1 << 20).tensors["run.x"][0]) == step
    assert steps(tmp_path / "new") == [30, 20]
    assert {p.name for p in (tmp_path / "new").iterdir()} == {s.path.name for s in list_checkpoints(tmp_path / "new")}
    keeper.prune(1)
    assert steps(tmp_path / "new") == [30]


def test_the_older_state_goes_only_after_the_new_one_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one state kept, there is never a moment without one."""
    keeper = CheckpointDirectory(tmp_path, 1)
    keeper.save(at(1))
    real, seen = os.unlink, []

    def unlink(path: Any, *more: Any, **options: Any) -> None:
        if Path(path).suffix == ".safetensors":
            seen.append(steps(tmp_path))
        real(path, *more, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: unlink(self) if self.exists() else None)
    keeper.save(at(2))
    assert seen == [[2, 1]]
    assert steps(tmp_path) == [2]


def test_two_runs_of_one_name_do_not_touch_each_other(tmp_path: Path) -> None:
    """Side by side, in turns: each keeps its own two, whoever writes more."""
    one, other = CheckpointDirectory(tmp_path, 2), CheckpointDirectory(tmp_path, 2)
    for step in range(1, 9):
        one.save(at(step))
        if step % 3 == 0:
            other.save(at(100 + step))
    found = list_checkpoints(tmp_path)
    assert [s.step for s in found if s.run == one.run] == [8, 7]
    assert [s.step for s in found if s.run == other.run] == [106, 103]
    assert len({s.path.name for s in found}) == 4


def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    """Its states before the stop count among those that are kept, and stay until newer ones are there."""
    first = CheckpointDirectory(tmp_path, 2)
    first.save(at(10))
    newest = first.save(at(20))
    again = CheckpointDirectory(tmp_path, 2, continued=newest)
    assert again.run == first.run
    assert steps(tmp_path) == [20, 10]
    again.save(at(30))
    assert steps(tmp_path) == [30, 20]


def test_going_on_from_an_older_state_is_another_run(tmp_path: Path) -> None:
    """Else the later states, which may be wanted, would be removed for it."""
    first = CheckpointDirectory(tmp_path, 2)
    older = first.save(at(10))
    first.save(at(20))
    branch = CheckpointDirectory(tmp_path, 1, continued=older)
    assert branch.run != first.run
    branch.save(at(11))
    branch.save(at(12))
    assert steps(tmp_path) == [12, 20, 10]
    assert [s.step for s in list_checkpoints(tmp_path) if s.run == first.run] == [20, 10]


def test_newest_is_decided_by_number_and_not_by_the_clock(tmp_path: Path) -> None:
    """The clock jumps back an hour with every state."""
    keeper = CheckpointDirectory(tmp_path, 5)
    for step in (1, 2, 3):
        path = keeper.save(at(step))
        os.utime(path, (time.time() - 3600 * step,) * 2)
    assert steps(tmp_path) == [3, 2, 1]
    CheckpointDirectory(tmp_path, 5).save(at(1))
    assert steps(tmp_path) == [1, 3, 2, 1], "a new run of the name has done fewer steps"


def test_states_are_found_in_folders_below_but_not_through_links(tmp_path: Path) -> None:
    root, outside = tmp_path / "states", tmp_path / "outside"
    for step, folder in ((1, root / "b"), (2, root / "a" / "deep"), (3, outside)):
        path = CheckpointDirectory(folder, 1).save(at(step))
        os.utime(path, (step * 1000,) * 2)
    (root / "link").symlink_to(outside, target_is_directory=True)
    (root / "b" / "00009_abcdef_step_000009.safetensors").symlink_to(list_checkpoints(outside)[0].path)
    assert [s.step for s in find_checkpoints(root)] == [2, 1]
    assert find_checkpoints(tmp_path / "missing") == []


def test_only_whole_states_of_our_naming_are_listed(tmp_path: Path) -> None:
    CheckpointDirectory(tmp_path, 1).save(at(5))
    for name in (".lora2-0123456789abcdef.partial", "x.safetensors", "00002_zzzzzz_step_000001.safetensors"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "00003_abcdef_step_000001.safetensors").touch()  # a claimed name on a disk without hard links
    (tmp_path / "00004_abcdef_step_000001.safetensors").mkdir()
    assert steps(tmp_path) == [5]


def test_what_a_killed_run_left_half_written_goes_with_its_next_state(tmp_path: Path) -> None:
    """That of other runs stays: they may be writing it."""
    first = CheckpointDirectory(tmp_path, 2)
    newest = first.save(at(1))
    mine, others = tmp_path / f".lora2-{first.run}0123456789.partial", tmp_path / ".lora2-0123456789abcdef.partial"
    for path in (mine, others):
        path.write_bytes(b"half")
    second = CheckpointDirectory(tmp_path, 2, continued=newest)
    second.save(at(2))
    assert mine.exists(), "written just now: another may still be at it"
    for path in (mine, others):
        os.utime(path, (time.time() - 61,) * 2)
    second.save(at(3))
    assert not mine.exists()
    assert others.exists()


def test_a_full_disk_keeps_the_states_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = CheckpointDirectory(tmp_path, 1, reserve=50_000_000)
    keeper.save(at(1))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no")

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "fsync", full)
        with pytest.raises(LoraError, match="The disk is full: the training state was not saved"):
            keeper.save(at(2))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=60_000_000))
        with pytest.raises(
            LoraError, match=r"has 60.0 MB free, the state needs 0.0 MB, and 50.0 MB are reserved for the LoRA"
        ):
            keeper.save(at(2))
    assert [p.name for p in tmp_path.iterdir()] == [list_checkpoints(tmp_path)[0].path.name]
    assert steps(tmp_path) == [1]


def test_a_state_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushed under a name that nothing lists, then given its own in one step: a kill at any moment leaves whole states."""
    happened: list[str] = []
    fsync, link = os.fsync, os.link

    def flushed(handle: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"
        happened.append(f"flushed {kind}, {len(list_checkpoints(tmp_path))} listed")
        fsync(handle)

    def linked(source: Any, target: Any) -> None:
        assert Path(source).name.startswith(".lora2-")
        assert read_state(Path(source), 1 << 20).tensors["run.x"].numel() == 3000
        happened.append("named")
        link(source, target)

    monkeypatch.setattr(writer.os, "fsync", flushed)
    monkeypatch.setattr(writer.os, "link", linked)
    CheckpointDirectory(tmp_path, 1).save(at(1))
    assert happened == ["flushed file, 0 listed", "named", "flushed folder, 1 listed"]

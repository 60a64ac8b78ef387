"""Writing a file whole or not at all, and never over another."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import lora2.files.writer
from lora2.files.document import read, to_state_dict
from lora2.files.writer import data, header, write_new
from lora2.method.factors import Factors
from lora2.util.errors import LoraError


def some_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = Factors(torch.randn(6, 3, generator=generator), torch.randn(3, 5, generator=generator))
    conv = Factors(torch.randn(6, 2, 1, 1, generator=generator), torch.randn(2, 4, 3, 3, generator=generator))
    return to_state_dict({"lora_unet_x": linear, "lora_te_y": conv}, "kohya", dtype)


def test_bytes_are_those_of_safetensors() -> None:
    tensors = some_tensors()
    tensors |= {
        "flag": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "wide": torch.ones(3).double(),
    }
    tensors["turned"] = torch.arange(6.0).reshape(2, 3)
    for metadata in ({}, {"key": 'ä "quoted"\n\t\x01\x7f \u2028 😀'}):
        written = header(tensors, metadata) + b"".join(bytes(piece) for piece in data(tensors))
        assert written == safetensors.torch.save(tensors, metadata or None)


def test_tensors_that_are_not_contiguous_are_written_right(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    path = write_new(tmp_path, "turned", {"t": turned}, {})
    assert torch.equal(safetensors.torch.load_file(path)["t"], turned)


def test_writing_and_reading(tmp_path: Path) -> None:
    tensors = some_tensors(torch.float16)
    metadata = {"ss_output_name": "käse", "empty": ""}
    path = write_new(tmp_path / "new" / "folder", "my.lora", tensors, metadata)
    assert path == tmp_path / "new" / "folder" / "my.lora_00001.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        keys = set(file.keys())
        assert keys == set(tensors)
        assert all(torch.equal(file.get_tensor(key), tensors[key]) for key in keys)
    document = read(path)
    assert document.state_dict().keys() == tensors.keys()
    assert document.state_dict().metadata == metadata
    assert set(document.layers) == {"lora_unet_x", "lora_te_y"}
    assert not document.other
    assert document.info is None


def test_numbers_go_on_and_nothing_is_overwritten(tmp_path: Path) -> None:
    tensors = {"t": torch.ones(2)}
    (tmp_path / "x_00007.safetensors").write_bytes(b"mine")
    (tmp_path / "X_00009.SAFETENSORS").write_bytes(b"mine")
    (tmp_path / "x_00012.safetensors.bak").write_bytes(b"mine")
    (tmp_path / "x_y_00020.safetensors").write_bytes(b"mine")
    assert write_new(tmp_path, "x", tensors, {}).name == "x_00010.safetensors"
    assert write_new(tmp_path, "x", tensors, {}).name == "x_00011.safetensors"
    assert (tmp_path / "x_00007.safetensors").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("links", [True, False])
def test_many_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    start = threading.Barrier(8)
    paths: dict[int, Path] = {}

    def write(value: int) -> None:
        start.wait()
        paths[value] = write_new(tmp_path, "x", {"t": torch.full((1000,), value)}, {})

    threads = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths.values())) == 8 == len(list(tmp_path.iterdir()))
    for value, path in paths.items():
        assert torch.equal(safetensors.torch.load_file(path)["t"], torch.full((1000,), value))


def _no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "no hard links on this drive")


def test_a_name_taken_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir_of_an_empty_folder(folder: Path) -> list[os.DirEntry[str]]:
        return []

    (tmp_path / "x_00001.safetensors").write_bytes(b"mine")
    monkeypatch.setattr(os, "scandir", scandir_of_an_empty_folder)
    assert write_new(tmp_path, "x", {"t": torch.ones(1)}, {}).name == "x_00002.safetensors"
    monkeypatch.setattr(os, "link", _no_links)
    assert write_new(tmp_path, "x", {"t": torch.ones(1)}, {}).name == "x_00003.safetensors"
    assert (tmp_path / "x_00001.safetensors").read_bytes() == b"mine"


class _CrashError(BaseException):
    """Something that is no Exception, as the host's interruption."""


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_crash_before_the_name_is_given_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    seen: list[str] = []

    def crash(*_: object) -> None:
        seen.extend(p.name for p in tmp_path.iterdir())
        raise _CrashError

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(_CrashError):
        write_new(tmp_path, "x", {"t": torch.ones(3)}, {})
    assert not list(tmp_path.iterdir())
    # While it was there, no list of ComfyUI's would have shown it.
    assert len(seen) == 1
    assert lora2.files.writer.TEMPORARY.fullmatch(seen[0])


def test_what_a_killed_run_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, fresh = tmp_path / f".lora2-{'a' * 16}.partial", tmp_path / f".lora2-{'b' * 16}.partial"
    foreign, folder = tmp_path / ".lora2-notes.partial", tmp_path / f".lora2-{'c' * 16}.partial"
    for path in (old, fresh, foreign):
        path.write_bytes(b"half")
    folder.mkdir()
    for path in (old, foreign, folder):
        os.utime(path, (0, 0))
    write_new(tmp_path, "x", {"t": torch.ones(1)}, {})
    assert not old.exists()
    assert fresh.exists()
    assert foreign.exists()
    assert folder.exists()


def test_a_file_too_large_for_the_system_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(LoraError, match=r"not saved in .*\(4\.0 MB to write\)"):
            write_new(tmp_path, "x", {"t": torch.ones(10**6)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    assert write_new(tmp_path, "x", {"t": torch.ones(10**6)}, {}).exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EDQUOT, "The disk is full"),
        (errno.EROFS, "No permission"),
        (errno.EACCES, "No permission"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("step", ["open", "fsync"])
def test_troubles_of_the_disk_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(LoraError, match=words):
        write_new(tmp_path, "x", {"t": torch.ones(3)}, {})
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_found_when_the_name_is_held_leaves_no_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", _no_links)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LoraError, match="The disk is full"):
        write_new(tmp_path, "x", {"t": torch.ones(3)}, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LoraError, match="Not a folder"):
            write_new(folder, "x", {"t": torch.ones(3)}, {})
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("stem", ["", "a/b", "../a", "a\\b", "..", ".", "/etc/x", "a\0b", "c:x"])
def test_names_that_are_no_plain_names(tmp_path: Path, stem: str) -> None:
    with pytest.raises(LoraError, match="not a file name"):
        write_new(tmp_path / "folder", stem, {"t": torch.ones(3)}, {})
    assert not list(tmp_path.iterdir())


def test_a_name_too_long_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="too long"):
        write_new(tmp_path, "x" * 300, {"t": torch.ones(3)}, {})
    assert not list(tmp_path.iterdir())

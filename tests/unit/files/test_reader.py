"""Damaged and hostile files are refused in one sentence that names the file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lora2.files import reader
from lora2.files.document import read
from lora2.util.errors import LoraError


def build(header: object, size: int = 0, length: int | None = None) -> bytes:
    """A file with this header, `size` zero bytes of data, and the given length of the header instead of the true one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)


def entry(shape: Any = (2, 2), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = build({"__metadata__": {"a": "b"}, "t": entry(), "u": entry((3,), (16, 22), "BF16")}, 22)

INVALID = "is truncated or not a valid safetensors file"
ENTRY = json.dumps(entry()).encode()
DUPLICATE = build(b'{"t":%s,"t":%s}' % (ENTRY, ENTRY), 16)
STRANGE = build(DUPLICATE[8:-16].replace(b'"t"', json.dumps("\x1b[31m\u202e").encode()), 16)

BROKEN: dict[str, tuple[bytes, str]] = {
    # refused by safetensors
    "empty": (b"", INVALID),
    "seven bytes": (b"\0" * 7, INVALID),
    "no header": (b"\0" * 8, INVALID),
    "cut in the header": (GOOD[:50], INVALID),
    "cut in the data": (GOOD[:-1], INVALID),
    "too long": (GOOD + b"\0", INVALID),
    "not UTF-8": (build(b'{"\xff": 1}'), "invalid UTF-8"),
    "not JSON": (build(b'{"t": '), "invalid JSON"),
    "deep": (build(b"[" * 100_001), "invalid JSON"),
    "deep objects": (build(b'{"a":' * 100_001), "invalid JSON"),
    "endless number": (
        build(b'{"t":{"x":%s,%s' % (b"1" * 5000, json.dumps(entry()).encode()[1:] + b"}"), 16),
        "invalid JSON",
    ),
    "a list": (build([1]), "invalid JSON"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "expected a string"),
    "entry a number": (build({"t": 1}), INVALID),
    "entry without shape": (build({"t": {"dtype": "F32", "data_offsets": [0, 4]}}), "missing field `shape`"),
    "unknown type": (build({"t": entry(dtype="F7")}, 16), "unknown variant `F7`"),
    "negative shape": (build({"t": entry((-2, -2))}, 16), "integer `-2`"),
    "shape that overflows": (build({"t": entry((1 << 32, 1 << 32))}, 0), "overflow"),
    "offsets turned": (build({"t": entry(offsets=(16, 0))}, 16), "invalid offset for tensor `t`"),
    "size and shape differ": (build({"t": entry(offsets=(0, 12))}, 12), INVALID),
    "overlap": (build({"a": entry(), "b": entry(offsets=(8, 24))}, 24), "invalid offset for tensor `b`"),
    "gap": (build({"a": entry(), "b": entry(offsets=(20, 36))}, 36), "invalid offset for tensor `b`"),
    "outside": (build({"a": entry(offsets=(0, 16))}, 8), INVALID),
    "lone surrogate": (build(b'{"\\ud800": 1}'), INVALID),
    # by torch
    "a size beyond 63 bits": (build({"t": entry((0, (1 << 64) - 1), (0, 0))}), "a dimension exceeds 63 bits"),
    # here
    "gigantic header": (build(b"x" * 10, length=1 << 40), "its header claims 1099511627776 bytes"),
    "header over the limit": (build(b"x" * 10, length=reader.MAX_HEADER_BYTES + 1), "its header claims"),
    "largest length": (b"\xff" * 8 + b"{}", "its header claims"),
    "the same name twice": (DUPLICATE, "t occurs twice"),
    "metadata twice": (build(b'{"__metadata__": {"a": "b", "a": "c"}}'), "a occurs twice"),
    "many dimensions": (
        build({"t": entry([1] * 9, (0, 4))}, 4),
        r"tensor t \(9 dimensions, float32\) is not supported",
    ),
    "a type of four bits": (build({"t": entry((2, 4), (0, 4), "F4")}, 4), "float4_e2m1fn_x2.*not supported"),
    "web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is text.*Download"),
    "JSON error page": (b'{"error":"not found, sorry, please sign in"}', "is text"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is text.*Git LFS"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(16), "GGUF file"),
    "strange name": (STRANGE, r"\\x1b\[31m\\u202e occurs twice"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files_are_refused(tmp_path: Path, case: str) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraError, match=words) as caught:
        read(path)
    message = str(caught.value)
    assert "broken.safetensors" in message
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_named(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"t": torch.ones(3)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(LoraError, match="old PyTorch file"):
        read(path)


def test_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(LoraError, match="not a safetensors file"):
        read(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: os.mkfifo(path), "is not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
)
def test_paths_that_are_not_files(tmp_path: Path, make: Callable[[Path], Any], words: str) -> None:
    make(tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match=words):
        read(tmp_path / "x.safetensors")


def test_good_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    tensors, metadata = reader.read_file(path)
    assert metadata == {"a": "b"}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "t": (torch.float32, (2, 2)),
        "u": (torch.bfloat16, (3,)),
    }
    path.write_bytes(build({}))
    assert reader.read_file(path) == ({}, {})
    path.write_bytes(build({"e": entry((0, 7), (0, 0)), "s": entry((), (0, 4))}, 4))
    assert reader.read_file(path)[0]["e"].shape == (0, 7)


@pytest.mark.parametrize("length", [128, 19280, 16444, 31548])
def test_no_header_length_looks_like_another_format(tmp_path: Path, length: int) -> None:
    """The low bytes of these lengths are those that pickles, archives, pages and JSON begin with."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(b"{}".ljust(length)))
    assert reader.read_file(path) == ({}, {})


@pytest.mark.parametrize("dtype", list(reader.DTYPE_NAMES))
def test_every_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.zeros(3, 2).to(dtype)
    safetensors.torch.save_file({"t": tensor}, path)
    assert reader.read_file(path)[0]["t"].dtype == dtype


def test_any_single_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Every byte of a small file's header set to other values: a LoraError or a result, nothing else."""
    path = tmp_path / "x.safetensors"
    refused = 0
    for position in range(len(GOOD) - 22):
        for value in (0, 0x22, 0x2D, 0x39, 0x7B, 0xFF):
            damaged = bytearray(GOOD)
            damaged[position] = value
            path.write_bytes(damaged)
            try:
                read(path)
            except LoraError:
                refused += 1
    assert refused > 500

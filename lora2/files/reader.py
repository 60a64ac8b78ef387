"""Reading a safetensors file that may be broken or hostile: its header is checked before it is used."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from ..util.errors import LoraError
from ..util.text import escaped
from .writer import DTYPE_NAMES

HEADER_LIMIT = 16 << 20
DIMENSION_LIMIT = 8
TENSOR_LIMIT = 32_768
"""More than any LoRA has (the largest have some 10,000), and few enough to be read and shown within seconds."""

_SIZES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises LoraError, naming the file and what is wrong with it, where it is missing, truncated, no
    safetensors file, or where its header contradicts itself.
    """
    with _explained(path):
        metadata = _checked_header(path)
        return dict(load_file(path)), metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone; the header is checked, and errors are raised, as by `read_file`."""
    with _explained(path):
        return _checked_header(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the system or safetensors raises inside, as a LoraError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise LoraError(f"{escaped(path.name)} does not exist.") from error
    except OSError as error:  # whose own words hold the whole path
        raise LoraError(f"{escaped(path.name)} cannot be read: {error.strerror or type(error).__name__}.") from error
    except safetensors.SafetensorError as error:
        raise LoraError(f"{escaped(path.name)} cannot be read: {escaped(error)}") from error


def _checked_header(path: Path) -> dict[str, str]:
    """Check the whole header against the file; returns its metadata."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise LoraError(f"{escaped(path.name)} is not a file.")
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            _truncated(path, f"it has {len(start)} bytes")
        length = int.from_bytes(start, "little")
        if length > HEADER_LIMIT:
            _refuse_other_kinds(path, start)
            _broken(path, f"its header claims {length} bytes, the most that is read is {HEADER_LIMIT}")
        if length > status.st_size - 8:
            _truncated(path, f"its header needs {length} bytes, {status.st_size - 8} are there")
        text = file.read(length)
    entries = _json_object(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _broken(path, "its metadata is not a table of texts")
    if len(entries) > TENSOR_LIMIT:
        raise LoraError(
            f"{escaped(path.name)} holds {len(entries)} tensors; at most {TENSOR_LIMIT} are read. It is no LoRA."
        )
    _check_layout(path, entries, status.st_size - 8 - length)
    return metadata


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    """Name the formats that people try instead; their first bytes, read as a length, are always enormous."""
    if start[:2] == b"PK" or start[0] == 0x80:
        raise LoraError(
            f"{escaped(path.name)} is an old PyTorch file (.pt, .ckpt), not a safetensors file. Such files can"
            " run code when opened, so they are not read here: convert it to safetensors first."
        )
    if start[:4] == b"GGUF":
        raise LoraError(f"{escaped(path.name)} is a GGUF file, not a LoRA in a safetensors file.")
    if start[:1] in b"<{" or start.startswith(b"version "):
        raise LoraError(
            f"{escaped(path.name)} is text, not a safetensors file: perhaps a web page or a Git LFS pointer was"
            " saved in its place. Download the file itself again."
        )


def _json_object(path: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON; names that occur twice are an error, since readers would disagree."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                _broken(path, f"{escaped(name)} is there twice")
            table[name] = value
        return table

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, LoraError):
            raise
        _broken(path, f"its header is not JSON ({escaped(error)})")
    if not isinstance(entries, dict):
        _broken(path, "its header is not a JSON object")
    return entries


def _check_layout(path: Path, entries: dict[str, Any], available: int) -> None:
    """Every tensor lies inside the data, right behind the one before, with the size its shape says."""
    spans = sorted((*_span(path, name, entry), name) for name, entry in entries.items())
    position = 0
    for begin, end, name in spans:
        if begin < position:
            _broken(path, f"tensor {escaped(name)} overlaps another")
        if begin > position:
            _broken(path, f"there is a gap before tensor {escaped(name)}")
        position = end
    if position > available:
        _truncated(path, f"its tensors need {position} bytes, {available} are there")
    if position < available:
        _broken(path, f"{available - position} bytes follow the last tensor")


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _broken(path, f"the entry of tensor {escaped(name)} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        _broken(path, f"tensor {escaped(name)} has the unknown type {escaped(dtype)}")
    if not _counts(shape) or len(shape) > DIMENSION_LIMIT:
        _broken(path, f"tensor {escaped(name)} has the impossible shape {escaped(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _broken(path, f"tensor {escaped(name)} has the impossible offsets {escaped(offsets)}")
    size = math.prod(shape) * _SIZES[dtype]
    if offsets[1] - offsets[0] != size:
        held = offsets[1] - offsets[0]
        _broken(path, f"tensor {escaped(name)} of shape {shape} needs {size} bytes, its offsets hold {held}")
    return offsets[0], offsets[1]


def _counts(value: Any) -> bool:
    """Whether a JSON value is a list of whole numbers from 0 up."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _broken(path: Path, what: str) -> NoReturn:
    raise LoraError(f"{escaped(path.name)} is not a valid safetensors file: {what}. Download or save it again.")


def _truncated(path: Path, what: str) -> NoReturn:
    raise LoraError(f"{escaped(path.name)} is truncated: {what}. Download or copy it again.")

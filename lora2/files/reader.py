"""Reading safetensors files that may be damaged or hostile.

safetensors itself validates the header against the file. Added here: limits that protect the process, duplicate names, which
readers resolve differently, dtypes and shapes that torch cannot compute with, and messages that tell a user the remedy.
"""

from __future__ import annotations

import json
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

MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 8
MAX_TENSORS = 32_768
"""More than any LoRA has (the largest have some 10,000), and few enough to read and show within seconds."""


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises LoraError with the file's name and the problem if it is missing, truncated, invalid, or no safetensors file.
    """
    with _readable_errors(path):
        metadata = _checked_header(path)
        tensors = dict(load_file(path))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.ndim > MAX_DIMENSIONS:
            kind = f"{tensor.ndim} dimensions, {str(tensor.dtype).removeprefix('torch.')}"
            raise LoraError(f"{escaped(path.name)} is not a LoRA: tensor {escaped(name)} ({kind}) is not supported.")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone, with the header validated as by `read_file`."""
    with _readable_errors(path):
        return _checked_header(path)


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Convert errors of the system and of safetensors to a LoraError with the file's name and without its folder."""
    try:
        yield
    except FileNotFoundError as error:
        raise LoraError(f"{escaped(path.name)} does not exist.") from error
    except OSError as error:  # its message contains the whole path
        raise LoraError(f"{escaped(path.name)} cannot be read: {error.strerror or type(error).__name__}.") from error
    except safetensors.SafetensorError as error:
        _raise_invalid(path, escaped(error), error)
    except TypeError as error:  # from torch, of an empty tensor
        _raise_invalid(path, "a dimension exceeds 63 bits", error)


def _checked_header(path: Path) -> dict[str, str]:
    """Validate the header; return its metadata."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise LoraError(f"{escaped(path.name)} is not a file.")
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_BYTES:
            _refuse_other_formats(path, start)
            _raise_invalid(path, f"its header claims {length} bytes, the limit is {MAX_HEADER_BYTES}")
        with safetensors.safe_open(path, "pt"):
            text = file.read(length)
    entries = _parsed_header(path, text)
    metadata: dict[str, str] = entries.pop("__metadata__", None) or {}
    if len(entries) > MAX_TENSORS:
        raise LoraError(
            f"{escaped(path.name)} contains {len(entries)} tensors, the limit is {MAX_TENSORS}. It is not a LoRA."
        )
    return metadata


def _refuse_other_formats(path: Path, start: bytes) -> None:
    """Name formats that people try instead; their first bytes, as a length, always exceed the limit."""
    if start[:2] == b"PK" or start[0] == 0x80:
        raise LoraError(
            f"{escaped(path.name)} is an old PyTorch file (.pt, .ckpt), not a safetensors file. Such files can run code when "
            "opened, so they are not read: convert it to safetensors first."
        )
    if start[:4] == b"GGUF":
        raise LoraError(f"{escaped(path.name)} is a GGUF file, not a LoRA in a safetensors file.")
    if start[:1] in b"<{" or start.startswith(b"version "):
        raise LoraError(
            f"{escaped(path.name)} is text, not a safetensors file: perhaps a web page or a Git LFS pointer was saved in its "
            "place. Download the file itself again."
        )


def _parsed_header(path: Path, text: bytes) -> dict[str, Any]:
    """Parse the header, which safetensors has accepted; refuse names that occur twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                _raise_invalid(path, f"{escaped(name)} occurs twice in its header")
            table[name] = value
        return table

    entries: dict[str, Any] = json.loads(text, object_pairs_hook=unique)
    return entries


def _raise_invalid(path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    raise LoraError(
        f"{escaped(path.name)} is truncated or not a valid safetensors file: {reason}. Download or copy it again."
    ) from cause

"""ComfyUI's LoRA files: their names, paths, and whether they changed."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import folder_paths

from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped

_SUFFIXES = (".safetensors", ".sft")


def lora_names() -> list[str]:
    """Names in ComfyUI's list of all LoRA files that can be read here."""
    return [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(_SUFFIXES)]


def lora_path(name: str) -> Path:
    """Path of a LoRA in one of ComfyUI's LoRA folders. Links in them are followed, as ComfyUI does.

    Raises LoraError for a name that points out of the folders, is no safetensors file, or does not exist.
    """
    parts = PureWindowsPath(name).parts  # knows both slashes and drive letters on every system
    if not name or "\0" in name or ".." in parts or PureWindowsPath(name).anchor or PurePosixPath(name).is_absolute():
        raise LoraError(
            f"{escaped(name)!r} is not the name of a file inside ComfyUI's LoRA folders. Choose one from the list."
        )
    if not name.lower().endswith(_SUFFIXES):
        raise LoraError(f"{escaped(name)} is not a safetensors file, and only those are read. Convert it first.")
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise LoraError(
            f"{escaped(name)} is not in ComfyUI's LoRA folders any more. Refresh the page (R) and choose again."
        )
    return Path(path)


def lora_title(name: str) -> str:
    """The name without folders and suffix."""
    return PureWindowsPath(name).stem


def lora_fingerprint(name: Any) -> str | float:
    """Changes with the file: modification time in nanoseconds, and size in bytes.

    NaN, which differs from itself, for a name that comes through a link of the graph and is not known yet.
    """
    if not isinstance(name, str):
        return math.nan
    try:
        status = lora_path(name).stat()
    except (LoraError, OSError):
        return "missing"
    return f"{status.st_mtime_ns}:{status.st_size}"

"""Where a LoRA is saved: the save name, checked, and the disk's free space."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import folder_paths

from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped

MAX_NAME_BYTES = 200
"""Most disks allow 255 for a name; a number and the suffix follow the save name."""

MIN_FREE_BYTES = 1 << 20
"""Bytes that stay free on the disk beside the LoRA."""

_RESERVED = '<>"|?*'
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\s*(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class SaveTarget:
    """A folder inside ComfyUI's LoRA folder (`root`), and a file name without number and suffix."""

    folder: Path
    stem: str
    root: Path

    def name_of(self, path: Path) -> str:
        """Name of a file in ComfyUI's list of LoRAs."""
        return path.relative_to(self.root).as_posix()


def save_target(name: str) -> SaveTarget:
    """The target of a save name such as "subjects/mug". Raises LoraError where it leaves the LoRA folder or is no portable name."""
    root = Path(folder_paths.get_folder_paths("loras")[0])
    path = Path(name.replace("\\", "/").removesuffix(".safetensors"))
    stem = path.name.strip()
    folder = root / path.parent
    invisible = any(unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" for c in name)
    if not stem or stem.startswith(".") or path.is_absolute() or ".." in path.parts or ":" in name or invisible:
        _refuse(name, "points outside ComfyUI's LoRA folder or names no file")
    if any(c in _RESERVED for c in name):
        _refuse(name, f"contains one of {' '.join(_RESERVED)}, which Windows does not allow in names")
    if any(_WINDOWS_DEVICE.match(part) for part in path.parts):
        _refuse(name, "is the name of a device on Windows")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in path.parts) or len(name.encode()) > 5 * MAX_NAME_BYTES:
        _refuse(name, f"is too long: at most {MAX_NAME_BYTES} bytes fit between slashes")
    if not inside(folder, root):
        _refuse(name, "leads through a link to a folder outside ComfyUI's LoRA folder")
    return SaveTarget(folder, stem, root)


def inside(folder: Path, root: Path) -> bool:
    """Whether a folder lies in another with all links followed; False where links lead in a circle."""
    try:
        return folder.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        return False


def _refuse(name: str, problem: str) -> NoReturn:
    raise LoraError(
        f"save_name '{escaped(name)}' {problem}. Use a plain name, with a subfolder if you like: subjects/mug."
    )


def check_target(target: SaveTarget, size: int) -> None:
    """Raise LoraError where a file of `size` bytes could not be written there, or would not fit on the disk."""
    existing = _existing_folder(target)
    if not existing.is_dir():
        raise LoraError(
            f"{escaped(existing.name)} in ComfyUI's LoRA folder is a file, not a folder. Choose another save_name."
        )
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise LoraError(
            f"ComfyUI may not write into its LoRA folder ({escaped(existing.name)}). Allow it, or choose a save_name with "
            "another subfolder."
        )
    free = free_bytes(target)
    if free < size + MIN_FREE_BYTES:
        raise LoraError(
            f"The disk of ComfyUI's LoRA folder has {free / 1e6:.1f} MB free, but the LoRA may need {size / 1e6:.1f} MB. "
            "Free some space, or choose a smaller target rank or budget."
        )


def free_bytes(target: SaveTarget) -> int:
    """Free bytes on the target's disk."""
    return shutil.disk_usage(_existing_folder(target)).free


def _existing_folder(target: SaveTarget) -> Path:
    return next(path for path in (target.folder, *target.folder.parents) if path.exists())

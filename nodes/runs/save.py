"""Saving a LoRA: in its folder, else in ComfyUI's output folder, else in memory until a later run can write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...lora2.files.document import LoraStateDict
from ...lora2.files.writer import write_new
from ...lora2.util.errors import LoraError
from .target import SaveTarget

_IN_MEMORY = "It is kept in memory until ComfyUI ends: free some space and press Run again, and it is written before anything else."

_unsaved: list[tuple[SaveTarget, LoraStateDict]] = []


def save_lora(target: SaveTarget, lora: LoraStateDict) -> Path:
    """Write a LoRA under a new name; returns its path.

    Raises LoraError where that fails; the LoRA is then in ComfyUI's output folder, or in memory where that fails too.
    """
    try:
        return write_new(target.folder, target.stem, lora, lora.metadata)
    except LoraError as error:
        spare_folder = Path(folder_paths.get_output_directory()) / "loras"
        try:
            path = write_new(spare_folder, target.stem, lora, lora.metadata)
        except LoraError:
            _unsaved.append((target, lora))
            raise LoraError(f"{error} {_IN_MEMORY}") from None
        raise LoraError(
            f"{error} It was saved as output/loras/{path.name} instead; move it to your LoRA folder."
        ) from None


def write_unsaved(say: Callable[[str], None]) -> None:
    """Write the LoRAs in memory, the oldest first; those that still cannot be written stay."""
    for item in list(_unsaved):
        target, lora = item
        try:
            path = write_new(target.folder, target.stem, lora, lora.metadata)
        except LoraError as error:
            say(f"{target.stem}, trained before, could still not be written. {error} {_IN_MEMORY}")
            return
        _unsaved.remove(item)
        say(f"Saved as {target.name_of(path)}: trained before, when it could not be written.")

"""Saving an adapter, come what may: under its name, in the output folder, or in memory until a disk takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...lora2.files.document import LoraStateDict, write_new
from ...lora2.util.errors import LoraError
from .save import Place

_kept: list[tuple[Place, LoraStateDict]] = []

PROMISE = (
    "It is kept in memory until ComfyUI ends: free some space and press Run again, and it is written before anything else."
)


def keep(place: Place, lora: LoraStateDict) -> None:
    """Hold an adapter that could not be written."""
    _kept.append((place, lora))


def write_kept(say: Callable[[str], None]) -> None:
    """Write what is held, in the order in which it was trained; what cannot be written yet stays."""
    for item in list(_kept):
        place, lora = item
        try:
            path = write_new(place.folder, place.stem, lora, lora.metadata)
        except LoraError as error:
            say(f"{place.stem}, trained before, could still not be written. {error} {PROMISE}")
            return
        _kept.remove(item)
        say(f"Saved as {place.name_of(path)}: trained before, when the disk did not take it.")


def save(place: Place, lora: LoraStateDict) -> Path:
    """Write the adapter under a new name in its place, or, where that fails, in the host's output folder.

    Raises LoraError in the second case, and where that fails too: then the adapter is held.
    """
    try:
        return write_new(place.folder, place.stem, lora, lora.metadata)
    except LoraError as error:
        spare = Path(folder_paths.get_output_directory()) / "loras"
        try:
            path = write_new(spare, place.stem, lora, lora.metadata)
        except LoraError:
            keep(place, lora)
            raise LoraError(f"{error} {PROMISE}") from None
        raise LoraError(
            f"{error} It was saved as output/loras/{path.name} instead; move it to your LoRA folder."
        ) from None

"""Sources that a run can continue from: training states in ComfyUI's output folder, and LoRA files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...lora2.checkpoints.directory import find_checkpoints, list_checkpoints
from ...lora2.files.document import LoraDocument, read
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped
from ..comfy.lora_paths import lora_names, lora_path
from .target import SaveTarget, inside

NOTHING, NEWEST = "nothing", "newest state"
STATE, LORA = "state: ", "LoRA: "
"""Prefixes of the choices in continue_from; the name of a file follows."""

FOLDER = "lora2_states"


@dataclass(frozen=True)
class CheckpointSource:
    """A training state to resume, and its name in messages."""

    path: Path
    name: str


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file to start from, and its name in messages."""

    document: LoraDocument
    name: str


def states_root() -> Path:
    """Folder of all training states, in the output folder: LoRA loaders do not look there."""
    return Path(folder_paths.get_output_directory()) / FOLDER


def states_folder(target: SaveTarget) -> Path:
    """Folder of the training states of a save name. Raises LoraError where a link leads out of the folder of all states."""
    root = states_root()
    folder = root / target.folder.relative_to(target.root) / target.stem
    if not inside(folder, root):
        raise LoraError(
            f"output/{FOLDER} has a link that leads to another folder. Remove it, or choose another save_name."
        )
    return folder


def choices() -> list[str]:
    """Choices of continue_from: nothing, the newest state of the save name, all states newest first, all LoRA files."""
    states = [STATE + name_of(file.path) for file in find_checkpoints(states_root())]
    return [NOTHING, NEWEST, *states, *(LORA + name for name in lora_names())]


def name_of(path: Path) -> str:
    """Name of a training state in the choices."""
    return path.relative_to(states_root()).as_posix()


def why_unavailable(choice: object) -> str:
    """The reason why a choice cannot be continued from, as a sentence; empty where it can."""
    if choice in (NOTHING, NEWEST):
        return ""
    try:
        if isinstance(choice, str) and choice.startswith(STATE):
            _state_path(choice.removeprefix(STATE))
            return ""
        if isinstance(choice, str) and choice.startswith(LORA):
            lora_path(choice.removeprefix(LORA))
            return ""
    except LoraError as error:
        return str(error)
    return f"continue_from = {escaped(choice)} must be one of '{NOTHING}', '{NEWEST}', '{STATE}…' and '{LORA}…' from the list."


def resolve_source(choice: str, target: SaveTarget) -> CheckpointSource | LoraSource | None:
    """The source behind a choice, None for nothing. Raises LoraError where it does not exist or cannot be read."""
    if reason := why_unavailable(choice):
        raise LoraError(reason)
    if choice == NOTHING:
        return None
    if choice.startswith(LORA):
        name = choice.removeprefix(LORA)
        return LoraSource(read(lora_path(name)), name)
    if choice == NEWEST:
        files = list_checkpoints(states_folder(target))
        if not files:
            raise LoraError(
                f"There is no training state of save_name '{escaped(target.stem)}' yet. Choose '{NOTHING}' in continue_from."
            )
        path = files[0].path
    else:
        path = _state_path(choice.removeprefix(STATE))
    return CheckpointSource(path, name_of(path))


def _state_path(name: str) -> Path:
    """Path of an existing training state. Names are looked up in the list, so that no path outside it is ever opened."""
    path = next((file.path for file in find_checkpoints(states_root()) if name_of(file.path) == name), None)
    if path is None:
        raise LoraError(
            f"The training state {escaped(name)} does not exist any more: a run keeps only its last states. Refresh the page (R) "
            f"and choose again, or choose '{NEWEST}'."
        )
    return path

"""Training states in ComfyUI's output folder, and what Train Adaptive LoRA offers to continue from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...lora2.checkpoints.directory import states_below, states_in
from ...lora2.files.document import LoraDocument, read
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped
from ..comfy.lora_paths import lora_names, lora_path
from .save import SaveTarget, inside

NOTHING, NEWEST = "nothing", "newest state"
STATE, LORA = "state: ", "LoRA: "
"""How the choices of a state and of a LoRA file begin; names of files follow."""

FOLDER = "lora2_states"


@dataclass(frozen=True)
class CheckpointSource:
    """A training state to continue: its file, what to call it."""

    path: Path
    name: str


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file to start from, and what to call it."""

    document: LoraDocument
    name: str


def states_root() -> Path:
    """The folder of all states: in the output folder, where no LoRA loader looks."""
    return Path(folder_paths.get_output_directory()) / FOLDER


def states_folder(place: SaveTarget) -> Path:
    """Where the states of a save name lie; raises LoraError where a link leads out of the folder of states."""
    root = states_root()
    folder = root / place.folder.relative_to(place.root) / place.stem
    if not inside(folder, root):
        raise LoraError(
            f"output/{FOLDER} has a link that leads to another folder. Remove it, or choose another save_name."
        )
    return folder


def choices() -> list[str]:
    """What `continue_from` offers now: nothing, the newest state of the save name, all states newest first, all LoRA files."""
    states = [STATE + name_of(s.path) for s in states_below(states_root())]
    return [NOTHING, NEWEST, *states, *(LORA + name for name in lora_names())]


def name_of(path: Path) -> str:
    """A state's name in the list of choices."""
    return path.relative_to(states_root()).as_posix()


def why_unavailable(choice: object) -> str:
    """Why nothing can be continued from a choice, in a sentence; empty when it can."""
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


def resolve_source(choice: str, place: SaveTarget) -> CheckpointSource | LoraSource | None:
    """What a choice means now, None for nothing; raises LoraError where it is not there or cannot be read."""
    trouble = why_unavailable(choice)
    if trouble:
        raise LoraError(trouble)
    if choice == NOTHING:
        return None
    if choice.startswith(LORA):
        name = choice.removeprefix(LORA)
        return LoraSource(read(lora_path(name)), name)
    if choice == NEWEST:
        states = states_in(states_folder(place))
        if not states:
            raise LoraError(
                f"There is no training state of save_name '{escaped(place.stem)}' yet. Choose '{NOTHING}' in continue_from."
            )
        path = states[0].path
    else:
        path = _state_path(choice.removeprefix(STATE))
    return CheckpointSource(path, name_of(path))


def _state_path(name: str) -> Path:
    """The state of this name among those that are there: no other path is ever opened."""
    path = next((s.path for s in states_below(states_root()) if name_of(s.path) == name), None)
    if path is None:
        raise LoraError(
            f"The training state {escaped(name)} is not there any more: a run keeps its last states only. Refresh the page (R) "
            f"and choose again, or choose '{NEWEST}'."
        )
    return path

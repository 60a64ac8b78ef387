"""The training states of a run on the disk: how they are named, which is the newest, which are kept."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..files.writer import TEMPORARY, claim, header, write_whole
from ..util.errors import LoraError
from .state import State

DEPTH = 12
"""How many folders deep states are looked for."""

QUIET = 60.0
"""Seconds after which a half file that nobody touched is nobody's."""

SPARE = 1 << 24
"""Bytes that a state leaves free on the disk beside what is reserved."""

_NAME = re.compile(r"(\d{5,18})_([0-9a-f]{6})_step_(\d{6,9})\.safetensors")
_LARGEST = 999_999_999


@dataclass(frozen=True)
class CheckpointFile:
    """A training state's file. number: counts the states of a folder. run: six digits that all states of a run share."""

    path: Path
    number: int
    run: str
    step: int


def states_in(folder: Path) -> list[CheckpointFile]:
    """The states in a folder, newest first: by number, which no clock decides. None where the folder is missing."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return []
    found = []
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match is not None and _is_file(entry):
            found.append(CheckpointFile(Path(entry.path), int(match[1]), match[2], int(match[3])))
    return sorted(found, key=lambda s: (s.number, s.step, s.run), reverse=True)


def states_below(root: Path) -> list[CheckpointFile]:
    """The states in a folder and those inside it, newest first: folders by their newest file, then as `states_in`."""
    groups: list[tuple[float, list[CheckpointFile]]] = []
    level = [root]
    for _ in range(DEPTH):
        below: list[Path] = []
        for folder in level:
            states = states_in(folder)
            if states:
                groups.append((max(_changed(s.path) for s in states), states))
            below.extend(_folders(folder))
        level = below
    groups.sort(key=lambda group: (-group[0], str(group[1][0].path)))
    return [state for _, states in groups for state in states]


class CheckpointDirectory:
    """Writes a run's states into a folder, each under a name of its own, and keeps the last ones of this run.

    Only files that this run has written are ever removed: those of `continued`, the newest state of the run that goes on
    here, and what this object wrote. Others may write into the same folder at the same time.
    """

    def __init__(self, folder: Path, keep: int, reserve: int = 0, continued: Path | None = None) -> None:
        self.folder, self.keep, self.reserve = folder, keep, reserve
        self.run = secrets.token_hex(3)
        self.own: list[Path] = []
        mine = next((s for s in states_in(folder) if s.path == continued), None)
        if mine is not None:
            same = [s for s in states_in(folder) if s.run == mine.run]
            if same[0] == mine:  # else something else went on from there: that is another run now
                self.run = mine.run
                self.own = [s.path for s in reversed(same)]

    def save(self, state: State) -> Path:
        """Write a state whole or not at all, then drop the oldest of this run; raises LoraError where it cannot be written."""
        step = state.part("run").whole("step", 1, _LARGEST)
        metadata = state.metadata()
        size = len(header(state.tensors, metadata)) + sum(t.numel() * t.element_size() for t in state.tensors.values())
        self._check_room(size)
        self._clear_broken()
        path = write_whole(self.folder, state.tensors, metadata, self._publisher(step), "training state", self.run)
        self.own.append(path)
        self.prune(self.keep)
        return path

    def prune(self, keep: int) -> None:
        """Remove this run's own states but for the last `hold_unsaved`."""
        while len(self.own) > keep:
            try:
                self.own.pop(0).unlink(missing_ok=True)
            except OSError:
                continue  # held open or protected: it stays

    def _publisher(self, step: int) -> Callable[[Path], Path]:
        def publish(temporary: Path) -> Path:
            number = max((s.number for s in states_in(self.folder)), default=0)
            while True:
                number += 1
                path = self.folder / f"{number:05d}_{self.run}_step_{step:06d}.safetensors"
                try:
                    claim(temporary, path)
                except FileExistsError:
                    continue
                return path

        return publish

    def _check_room(self, size: int) -> None:
        """Leave the disk to what matters more: the LoRA that is saved at the end."""
        existing = next((p for p in (self.folder, *self.folder.parents) if os.path.exists(p)), None)
        free = shutil.disk_usage(existing).free if existing is not None else 0
        if free < size + self.reserve + SPARE:
            raise LoraError(
                f"The training state was not saved: the disk has {free / 1e6:.1f} MB free, the state needs {size / 1e6:.1f} MB, "
                f"and {self.reserve / 1e6:.1f} MB are kept for the LoRA. Free some space."
            )

    def _clear_broken(self) -> None:
        """Remove what this run left when it was killed while it wrote, as it may be large; not what another still writes."""
        try:
            for entry in os.scandir(self.folder):
                ours = TEMPORARY.fullmatch(entry.name) and entry.name.startswith(f".lora2-{self.run}")
                if ours and time.time() - entry.stat(follow_symlinks=False).st_mtime > QUIET:
                    os.unlink(entry.path)
        except OSError:
            return


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size > 0
    except OSError:
        return False


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(
            Path(e.path) for e in os.scandir(folder) if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")
        )
    except OSError:
        return []

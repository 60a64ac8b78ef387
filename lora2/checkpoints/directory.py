"""Training states on the disk: their file names, which is the newest, which are removed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ..files.writer import TEMPORARY, claim, header, write_whole
from ..util.errors import LoraError
from .state import State

MAX_DEPTH = 12
"""Levels of folders that are searched for training states."""

STALE_SECONDS = 60.0
"""Age from which an unfinished file of a killed run is removed."""

MIN_FREE_BYTES = 1 << 24
"""Bytes that stay free on the disk, beside those reserved for the LoRA."""

MAX_STEP = 999_999_999

_NAME = re.compile(r"(\d{5,18})_([0-9a-f]{6})_step_(\d{6,9})\.safetensors")


@dataclass(frozen=True)
class CheckpointFile:
    """File of a training state. number: counts up within a folder. run: six hexadecimal digits that a run's states share."""

    path: Path
    number: int
    run: str
    step: int


def list_checkpoints(folder: Path) -> list[CheckpointFile]:
    """Training states in a folder, newest first by number, independently of the clock. Empty where the folder is missing."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return []
    files = []
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match is not None and _has_content(entry):
            files.append(CheckpointFile(Path(entry.path), int(match[1]), match[2], int(match[3])))
    return sorted(files, key=lambda file: (file.number, file.step, file.run), reverse=True)


def find_checkpoints(root: Path) -> list[CheckpointFile]:
    """Training states in a folder and below: folders by their latest file, within a folder as `list_checkpoints`."""
    groups: list[tuple[float, list[CheckpointFile]]] = []
    level = [root]
    for _ in range(MAX_DEPTH):
        below: list[Path] = []
        for folder in level:
            files = list_checkpoints(folder)
            if files:
                groups.append((max(_modified(file.path) for file in files), files))
            below.extend(_subfolders(folder))
        level = below
    groups.sort(key=lambda group: (-group[0], str(group[1][0].path)))
    return [file for _, files in groups for file in files]


class CheckpointDirectory:
    """Saves the training states of one run in a folder, which other runs may use at the same time; keeps the last `keep`.

    reserve: bytes of the disk that are left for the LoRA. continued: the state that the run resumes. If it is the newest of its
    run, this is the same run, and the older states are its own. Only the run's own files are ever removed.
    """

    def __init__(self, folder: Path, keep: int, reserve: int = 0, continued: Path | None = None) -> None:
        self.folder, self.keep, self.reserve = folder, keep, reserve
        self.run = secrets.token_hex(3)
        self.own: list[Path] = []
        files = list_checkpoints(folder)
        resumed = next((file for file in files if file.path == continued), None)
        if resumed is not None:
            same_run = [file for file in files if file.run == resumed.run]
            if same_run[0] == resumed:
                self.run = resumed.run
                self.own = [file.path for file in reversed(same_run)]

    def save(self, state: State) -> Path:
        """Write a state completely or not at all, then remove the run's oldest. Raises LoraError where it cannot be written."""
        step = state.part("run").integer("step", 1, MAX_STEP)
        metadata = state.metadata()
        size = len(header(state.tensors, metadata)) + sum(t.numel() * t.element_size() for t in state.tensors.values())
        self._check_free_space(size)
        self._remove_unfinished()
        path = write_whole(
            self.folder,
            state.tensors,
            metadata,
            lambda temporary: self._publish(temporary, step),
            "training state",
            self.run,
        )
        self.own.append(path)
        self.prune(self.keep)
        return path

    def prune(self, keep: int) -> None:
        """Remove this run's own states except the last `keep`."""
        while len(self.own) > keep:
            try:
                self.own.pop(0).unlink(missing_ok=True)
            except OSError:
                continue  # open elsewhere, or protected

    def _publish(self, temporary: Path, step: int) -> Path:
        """Rename a complete temporary file to the folder's next free number."""
        number = max((file.number for file in list_checkpoints(self.folder)), default=0)
        while True:
            number += 1
            path = self.folder / f"{number:05d}_{self.run}_step_{step:06d}.safetensors"
            try:
                claim(temporary, path)
            except FileExistsError:
                continue
            return path

    def _check_free_space(self, size: int) -> None:
        existing = next((p for p in (self.folder, *self.folder.parents) if os.path.exists(p)), None)
        free = shutil.disk_usage(existing).free if existing is not None else 0
        if free < size + self.reserve + MIN_FREE_BYTES:
            raise LoraError(
                f"The training state was not saved: the disk has {free / 1e6:.1f} MB free, the state needs {size / 1e6:.1f} MB, "
                f"and {self.reserve / 1e6:.1f} MB are reserved for the LoRA. Free some space."
            )

    def _remove_unfinished(self) -> None:
        """Remove what this run left when it was killed while it wrote; it may be large."""
        try:
            for entry in os.scandir(self.folder):
                own = TEMPORARY.fullmatch(entry.name) and entry.name.startswith(f".lora2-{self.run}")
                if own and time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                    os.unlink(entry.path)
        except OSError:
            return


def _has_content(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size > 0
    except OSError:
        return False


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(
            Path(e.path) for e in os.scandir(folder) if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")
        )
    except OSError:
        return []

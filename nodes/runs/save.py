"""Where a trained adapter goes, and what its file says."""

from __future__ import annotations

import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import folder_paths
import torch
from comfy.cli_args import args

from ...lora2.config import LAYER_CHOICES
from ...lora2.files.document import LoraStateDict, to_state_dict
from ...lora2.files.metadata import build, with_info
from ...lora2.files.rank_info import LayerInfo, Order, layer_info
from ...lora2.files.writer import header, write_new
from ...lora2.method.factors import Factors, full_rank
from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped

log = logging.getLogger("lora2")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

MAX_NAME_BYTES = 200
"""Disks allow 255 for one name; a number and an ending come after ours."""

LONG_NUMBER = 12345.678901234567
"""As many digits as JSON ever needs; what it stands for is a rank, a rate or a time."""

_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\s*(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class SaveTarget:
    """A folder inside the host's LoRA folder, and the file's name without number and ending."""

    folder: Path
    stem: str
    root: Path

    def name_of(self, path: Path) -> str:
        """The file as the host's LoRA lists name it."""
        return path.relative_to(self.root).as_posix()


_RESERVED = '<>"|?*'


def save_target(name: str) -> SaveTarget:
    """The place that a save name such as "subjects/mug" means; raises LoraError when it leaves the LoRA folder."""
    root = Path(folder_paths.get_folder_paths("loras")[0])
    parts = Path(name.replace("\\", "/").removesuffix(".safetensors"))
    stem = parts.name.strip()
    folder = root / parts.parent
    hidden = any(unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" for c in name)
    if not stem or stem.startswith(".") or parts.is_absolute() or ".." in parts.parts or ":" in name or hidden:
        _refuse(name, "points outside ComfyUI's LoRA folder or names no file")
    if any(c in _RESERVED for c in name):
        _refuse(name, f"holds one of {' '.join(_RESERVED)}, which Windows does not allow in names")
    if any(_DEVICE.match(part) for part in parts.parts):
        _refuse(name, "is the name of a device on Windows")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts.parts) or len(name.encode()) > 5 * MAX_NAME_BYTES:
        _refuse(name, f"is too long: at most {MAX_NAME_BYTES} bytes fit between slashes")
    if not inside(folder, root):
        _refuse(name, "leads through a link to a folder outside ComfyUI's LoRA folder")
    return SaveTarget(folder, stem, root)


def inside(folder: Path, root: Path) -> bool:
    """Whether a folder lies in another, links followed; False where links lead in a circle."""
    try:
        return folder.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        return False


def _refuse(name: str, why: str) -> NoReturn:
    raise LoraError(f"save_name '{escaped(name)}' {why}. Use a plain name, with a subfolder if you like: subjects/mug.")


def free_bytes(place: SaveTarget) -> int:
    """Bytes that are free on the disk of a place."""
    return shutil.disk_usage(_existing(place)).free


def _existing(place: SaveTarget) -> Path:
    return next(p for p in (place.folder, *place.folder.parents) if p.exists())


def check_target(place: SaveTarget, most_bytes: int) -> None:
    """Raise LoraError before training when the file could not be written in its place, or would not fit on the disk."""
    existing = _existing(place)
    if not existing.is_dir():
        raise LoraError(
            f"{escaped(existing.name)} in ComfyUI's LoRA folder is a file, not a folder. Choose another save_name."
        )
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise LoraError(
            f"ComfyUI may not write into its LoRA folder ({escaped(existing.name)}). Allow it, or choose a save_name with "
            "another subfolder."
        )
    free = free_bytes(place)
    if free < most_bytes + (1 << 20):
        raise LoraError(
            f"The disk of ComfyUI's LoRA folder has {free / 1e6:.1f} MB free, but the LoRA may need {most_bytes / 1e6:.1f} MB. "
            "Free some space, or choose a smaller target rank or budget."
        )


ALIGNMENT = 16
"""Bytes that a header may be filled up by, twice."""


@dataclass(frozen=True)
class LoraFile:
    """What stays the same about a run's file: its names, keys and origin."""

    prefixes: Mapping[str, str]
    style: str
    family: str
    prediction: str
    resolution: tuple[int, int] | None
    dtype: torch.dtype

    def overhead(self, shapes: Mapping[str, tuple[int, ...]], stem: str, training: Mapping[str, Any]) -> int:
        """An upper bound of the file's bytes that are not factors: header, metadata and alphas.

        A file that has to meet a budget is always in singular order (adapters/prune.py), and then no ν is in it.
        """
        nu = None if training.get("budget_mb") else LONG_NUMBER
        order: Order = "importance" if nu else "singular"
        tensors: dict[str, torch.Tensor] = {}
        info: dict[str, LayerInfo] = {}
        for name, shape in shapes.items():
            full, prefix = full_rank(shape), self.prefixes[name]
            rank_rows = torch.empty(0, dtype=self.dtype, device="meta")
            factors = Factors(rank_rows.new_empty(shape[0], full), rank_rows.new_empty(full, *shape[1:]))
            tensors[prefix + ".lora_down.weight"] = factors.down
            tensors[prefix + ".lora_up.weight"] = factors.up
            tensors[prefix + ".alpha"] = torch.empty((), device="meta")
            info[prefix] = layer_info(factors, nu=nu, target=LONG_NUMBER, order=order)
        fixed = build(
            {}, name=stem, family=self.family, layers={}, training={}, resolution=(99999, 99999), prediction="epsilon"
        )
        counts = dict.fromkeys(
            ("file_overhead", "layer_overhead", "bytes_per_parameter", "pictures", "steps_done"), 10**9
        )
        extra = dict(
            training, **counts, layers=max(LAYER_CHOICES, key=len), last_loss=-LONG_NUMBER / 1e300, seconds=LONG_NUMBER
        )
        full_metadata = with_info(tensors, fixed, {"format": 1, "layers": info, "training": extra})
        return len(header(tensors, full_metadata)) + 4 * len(shapes) + 64

    def layer_overhead(self, shapes: Mapping[str, tuple[int, ...]], stem: str, training: Mapping[str, Any]) -> int:
        """How many of these bytes a file without one of the layers does not have at least, whichever it is."""
        nothing = self.overhead({}, stem, training)
        least = min(self.overhead({name: shape}, stem, training) for name, shape in shapes.items()) - nothing
        return max(0, least - ALIGNMENT)

    def state_dict(
        self,
        factors: Mapping[str, Factors],
        stem: str,
        training: Mapping[str, Any],
        rates: Mapping[str, float | None],
        target: float,
    ) -> LoraStateDict:
        """The adapter as the file's tensors and metadata; float32 where the chosen type cannot hold the values.

        rates: ν of layers in the order of Λ, None for layers in singular order. UNet files have one alpha for all layers,
        with the scales folded in, so that every reader is exact: diffusers loses the alphas of attention layers where
        they differ (0.39.0 and 0.42.1, measured; tests/test_readers.py). Others have each layer's own rank. Where ComfyUI was
        started with --disable-metadata, nothing in the file tells of the run.
        """
        named = {self.prefixes[name]: f for name, f in factors.items()}
        alpha = float(max(1, round(target))) if self.style == "kohya" else None
        try:
            tensors = to_state_dict(named, self.style, self.dtype, alpha)
        except LoraError:
            log.warning("LoRA²: values too large for %s; saving as float32 instead.", self.dtype)
            tensors = to_state_dict(named, self.style, torch.float32, alpha)
        layers = {
            self.prefixes[name]: layer_info(
                f, nu=rates[name], target=target, order="singular" if rates[name] is None else "importance"
            )
            for name, f in factors.items()
            if f.rank
        }
        metadata = build(
            tensors,
            name=stem,
            family=self.family,
            layers=layers,
            training=training,
            prediction=self.prediction,
            resolution=self.resolution,
            about_run=not args.disable_metadata,
        )
        return LoraStateDict(tensors, metadata)


_kept: list[tuple[SaveTarget, LoraStateDict]] = []


PROMISE = "It is kept in memory until ComfyUI ends: free some space and press Run again, and it is written before anything else."


def hold_unsaved(place: SaveTarget, lora: LoraStateDict) -> None:
    """Hold an adapter that could not be written."""
    _kept.append((place, lora))


def write_unsaved(say: Callable[[str], None]) -> None:
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


def save_lora(place: SaveTarget, lora: LoraStateDict) -> Path:
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
            hold_unsaved(place, lora)
            raise LoraError(f"{error} {PROMISE}") from None
        raise LoraError(
            f"{error} It was saved as output/loras/{path.name} instead; move it to your LoRA folder."
        ) from None

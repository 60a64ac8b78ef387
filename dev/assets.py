"""Small models and pictures, made once and kept in .host/assets until the code that makes them changes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dev.host import HOST, ROOT

MAKERS = ("checkpoint.py", "denoiser.py", "tiny_vae.py", "painter/model.py", "painter/weights.xz")
CHECKPOINT = "lora2_demo_sd15.safetensors"
PAINTER = "lora2_painter.safetensors"
MUG = 2
"""Of the subjects: a mug whose surface no caption describes."""


def folder() -> Path:
    """The cache for this version of the makers; older ones are removed."""
    digest = hashlib.sha256(b"".join((ROOT / "dev" / name).read_bytes() for name in MAKERS)).hexdigest()[:12]
    path = HOST / "assets" / digest
    if not path.exists():
        path.mkdir(parents=True, exist_ok=True)
        for other in set(path.parent.iterdir()) - {path}:
            shutil.rmtree(other, ignore_errors=True)
    return path


def checkpoint() -> Path:
    """The small SD1.x checkpoint."""

    def write(path: Path) -> None:
        from dev.checkpoint import write_checkpoint

        write_checkpoint(path)

    return _cached(CHECKPOINT, write)


def painter() -> Path:
    """The small SD3 that draws."""

    def write(path: Path) -> None:
        from dev.painter.model import write_checkpoint

        write_checkpoint(path)

    return _cached(PAINTER, write)


def family(name: str) -> Path:
    """The small diffusion model of a family: sd15, sd21, sdxl, koala or flux."""

    def write(path: Path) -> None:
        from dev.checkpoint import write_family

        write_family(name, path)

    return _cached(f"{name}.safetensors", write)


def _cached(name: str, write: Callable[[Path], None]) -> Path:
    """The file of this name; written under another name first: several processes may write it."""
    path = folder() / name
    if not path.exists():
        partial = path.with_name(f"{os.getpid()}_{name}")
        write(partial)
        os.replace(partial, path)
    return path


def fill_base(base: Path, pictures: int = 12) -> Path:
    """Links the checkpoints into a base directory and draws the subject into input/mug, with captions beside it."""
    for file in (checkpoint(), painter()):
        link = base / "models" / "checkpoints" / file.name
        if link.is_symlink() and link.resolve() != file.resolve():
            link.unlink()
        if not link.exists():
            link.symlink_to(file)
    from dev.painter.subjects import SUBJECTS

    target = base / "input" / "mug"
    target.mkdir(parents=True, exist_ok=True)
    for index, (image, caption) in enumerate(SUBJECTS[MUG].pictures(pictures)):
        path = target / f"mug_{index:02d}.png"
        image.save(path)
        path.with_suffix(".txt").write_text(caption + "\n")
    return base

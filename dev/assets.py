"""Small models and pictures, made once and kept in .host/assets until the code that makes them changes."""

from __future__ import annotations

import hashlib
import shutil
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
        shutil.rmtree(path.parent, ignore_errors=True)
        path.mkdir(parents=True)
    return path


def checkpoint() -> Path:
    """The small SD1.x checkpoint."""
    path = folder() / CHECKPOINT
    if not path.exists():
        from dev.checkpoint import write_checkpoint

        write_checkpoint(path)
    return path


def painter() -> Path:
    """The small SD3 that draws."""
    path = folder() / PAINTER
    if not path.exists():
        from dev.painter.model import write_checkpoint

        write_checkpoint(path)
    return path


def family(name: str) -> Path:
    """The small diffusion model of a family: sd15, sd21, sdxl, koala or flux."""
    path = folder() / f"{name}.safetensors"
    if not path.exists():
        from dev.checkpoint import write_family

        write_family(name, path)
    return path


def fill_base(base: Path) -> Path:
    """Links the checkpoints into a base directory and draws the subject into input/mug, with captions beside it."""
    for target in (checkpoint(), painter()):
        link = base / "models" / "checkpoints" / target.name
        if link.is_symlink() and link.resolve() != target.resolve():
            link.unlink()
        if not link.exists():
            link.symlink_to(target)
    from dev.painter.subjects import SUBJECTS

    pictures = base / "input" / "mug"
    pictures.mkdir(parents=True, exist_ok=True)
    for index, (image, caption) in enumerate(SUBJECTS[MUG].pictures(12)):
        path = pictures / f"mug_{index:02d}.png"
        image.save(path)
        path.with_suffix(".txt").write_text(caption + "\n")
    return base

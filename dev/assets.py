"""Small models and pictures, made once and kept in .host/assets until the code that makes them changes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from dev.host import HOST, ROOT

MAKERS = ("checkpoint.py", "denoiser.py", "tiny_vae.py", "world.py")
CHECKPOINT = "lora2_demo_sd15.safetensors"


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


def family(name: str) -> Path:
    """The small diffusion model of a family: sd15, sd21, sdxl, koala or flux."""
    path = folder() / f"{name}.safetensors"
    if not path.exists():
        from dev.checkpoint import write_family

        write_family(name, path)
    return path


def fill_base(base: Path) -> Path:
    """Links the checkpoint into a base directory and draws the pictures into input/mug."""
    link = base / "models" / "checkpoints" / CHECKPOINT
    target = checkpoint()
    if link.is_symlink() and link.resolve() != target.resolve():
        link.unlink()
    if not link.exists():
        link.symlink_to(target)
    from dev.world import draw_world

    draw_world(base / "input" / "mug")
    return base

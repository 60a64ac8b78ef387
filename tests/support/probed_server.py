"""A test server that can be looked into: tests/support/probe is one of its node packs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dev import assets
from dev.server import ComfyServer, make_base

SUPPORT = Path(__file__).resolve().parent
PICTURES = 4


@contextmanager
def probed(base: Path, *arguments: str) -> Iterator[ComfyServer]:
    """A running ComfyUI with the pack, the small checkpoints, a few pictures in input/mug, and the nodes of packs/anything.py."""
    make_base(base)
    (base / "custom_nodes" / "lora2-probe").symlink_to(SUPPORT / "probe", target_is_directory=True)
    shutil.copy(SUPPORT / "packs" / "anything.py", base / "custom_nodes" / "anything.py")
    assets.fill_base(base, PICTURES)
    with ComfyServer(base, extra_args=arguments) as server:
        yield server

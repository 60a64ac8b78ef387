"""A test server that can be looked into: tests/support/probe is one of its node packs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dev import assets
from dev.host import ROOT
from dev.server import ComfyServer


@contextmanager
def probed(base: Path, *arguments: str) -> Iterator[ComfyServer]:
    """A running ComfyUI with the pack, the small SD1.x checkpoint and the pictures in input/mug."""
    server = ComfyServer(base, extra_args=arguments)
    (base / "custom_nodes" / "lora2-probe").symlink_to(ROOT / "tests" / "support" / "probe", target_is_directory=True)
    with server:
        assets.fill_base(base)
        yield server

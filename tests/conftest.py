"""What tests share: the real ComfyUI in this process, a running server, small models of every family."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: the pack's folder `nodes` must not hide ComfyUI's nodes.py
sys.path.append(str(ROOT / "tests"))

import torch  # noqa: E402

from dev import assets, host  # noqa: E402
from dev.server import ComfyServer  # noqa: E402

host.import_comfy()
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def comfy() -> ModuleType:
    """The package `comfy` with `comfy.sd` loaded, on the CPU unless torch has CUDA."""
    import comfy.sd

    return comfy


@pytest.fixture(scope="session")
def small_model(comfy: ModuleType) -> Callable[[str], Any]:
    """A fresh ModelPatcher of a family's small random model, as UNETLoader gives it."""
    return lambda family: comfy.sd.load_diffusion_model(str(assets.family(family)))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with the pack, the small SD1.x checkpoint and the pictures in input/mug."""
    base = tmp_path_factory.mktemp("comfy")
    with ComfyServer(base) as running:
        assets.fill_base(base)
        yield running

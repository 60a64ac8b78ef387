"""The pack's modules, imported below a package as ComfyUI does it, whatever the folder is called."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACK = "lora2_pack"


def pack(module: str) -> Any:
    """A module of the pack, such as "nodes.runs.run"."""
    if PACK not in sys.modules:
        package = types.ModuleType(PACK)
        package.__path__ = [str(ROOT)]
        sys.modules[PACK] = package
    return importlib.import_module(f"{PACK}.{module}")

"""Version of ComfyUI, and the message for a ComfyUI that is incompatible with the pack.

Imports nothing of ComfyUI but its version: it must work when nothing else does.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

PACK_VERSION = "0.1.0"
OLDEST, NEWEST = "0.16.3", "0.30.0"
"""The oldest and the newest tested ComfyUI."""

_INCOMPATIBLE = (ImportError, AttributeError, TypeError, NotImplementedError)
"""Errors that Python raises for a removed name or a changed signature."""

_PATH = re.compile(r" \([^()]*[/\\][^()]*\)")
"""The local path that Python adds to import errors."""

_NODES = Path(__file__).resolve().parent.parent


def host_version() -> str:
    """ComfyUI's version, such as "0.30.0"."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "of an unknown version"
    return str(__version__)


def incompatibility(error: BaseException) -> str | None:
    """The message for an error that a changed ComfyUI caused in nodes/; None for any other error."""
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, _INCOMPATIBLE) or not frames or not _is_ours(frames[-1].filename):
        return None
    return incompatibility_message(error)


def incompatibility_message(error: BaseException) -> str:
    """One sentence with both versions, what is wrong, and what to do."""
    what = _PATH.sub("", str(error)).rstrip(".")
    return (
        f"LoRA² {PACK_VERSION} is incompatible with this ComfyUI ({host_version()}): {what}. LoRA² is tested with ComfyUI "
        f"{OLDEST} to {NEWEST}: update LoRA², or ComfyUI if it is older. If both are up to date, please report this."
    )


def _is_ours(file: str) -> bool:
    return Path(file).resolve().is_relative_to(_NODES)

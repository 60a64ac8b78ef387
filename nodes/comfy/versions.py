"""Which ComfyUI this is, and what to say where it and the pack do not fit together.

Imports nothing of ComfyUI's but its version: it must work where nothing else does.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

PACK_VERSION = "0.1.0"
OLDEST, NEWEST = "0.16.3", "0.30.0"
"""The oldest and the newest ComfyUI that the tests have run on."""

_MISFITS = (ImportError, AttributeError, TypeError, NotImplementedError)
"""What Python raises where a name is gone, or takes other arguments than it did."""

_PATH = re.compile(r" \([^()]*[/\\][^()]*\)")
"""Where a module lies, which Python adds to what it could not import."""

_BRIDGE = Path(__file__).resolve().parent.parent


def host_version() -> str:
    """ComfyUI's version, such as "0.30.0"."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "of an unknown version"
    return str(__version__)


def incompatibility(error: BaseException) -> str | None:
    """What to say where a node met a ComfyUI that is not as it was; None for any other error.

    Only where the error arose in the nodes themselves or in their bridge: what comes from deeper inside speaks for itself.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, _MISFITS) or not frames or not _is_ours(frames[-1].filename):
        return None
    return incompatibility_message(error)


def incompatibility_message(error: BaseException) -> str:
    """One sentence with both versions, what is wrong, and what to do."""
    what = _PATH.sub("", str(error)).rstrip(".")
    return (
        f"LoRA² {PACK_VERSION} and this ComfyUI ({host_version()}) do not fit together: {what}. LoRA² is tested with ComfyUI "
        f"{OLDEST} to {NEWEST}: update LoRA², or ComfyUI if it is older. If both are up to date, please report this."
    )


def _is_ours(file: str) -> bool:
    return Path(file).resolve().is_relative_to(_BRIDGE)

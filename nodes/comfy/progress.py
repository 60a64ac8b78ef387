"""Messages and previews of a running node."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from PIL import Image
from server import PromptServer

_LINKS = re.compile(r"\[(?=\[)|www(?=\.)|__(?=LNK)", re.IGNORECASE)
"""Starts of links in the frontend: [[label|address]], www., and its own placeholder."""

log = logging.getLogger("lora2")


def status_sender(node_id: str | None) -> Callable[[str], None]:
    """A function that shows a message on the node and writes it to the log."""

    def say(message: str) -> None:
        log.info("LoRA²: %s", message)
        server = getattr(PromptServer, "instance", None)
        if server is not None and node_id is not None:
            server.send_progress_text(inert(message), node_id)

    return say


def stop_if_cancelled() -> None:
    """Raise ComfyUI's exception if its cancel button was pressed."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def inert(message: str) -> str:
    """The message without HTML and links, which the frontend would render: names in it come from files."""
    for sign, replacement in (("<", "‹"), (">", "›"), ("&", "＆"), ("://", ":/ /")):
        message = message.replace(sign, replacement)
    return _LINKS.sub(r"\g<0> ", message)


def send_preview(picture: Image.Image) -> None:
    """Replace the last preview of the running node: the frontend shows it over the node's output when the run has ended."""
    comfy.utils.ProgressBar(1).update_absolute(1, 1, ("JPEG", picture, max(picture.size)))

"""Status texts and pictures from a running node to the page."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from PIL import Image
from server import PromptServer

_LINKS = re.compile(r"\[(?=\[)|www(?=\.)|__(?=LNK)", re.IGNORECASE)
"""Starts of links in the frontend: [[label|address]], www., and its internal markers."""

log = logging.getLogger("lora2")


def status_sender(node_id: str | None) -> Callable[[str], None]:
    """A function that writes a text to the log and to the node."""

    def send(text: str) -> None:
        log.info("LoRA²: %s", text)
        server = getattr(PromptServer, "instance", None)
        if server is not None and node_id is not None:
            server.send_progress_text(inert(text), node_id)

    return send


def stop_if_cancelled() -> None:
    """Raise the host's interrupt exception if the user pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def inert(text: str) -> str:
    """The text without HTML and links, which the frontend would render: names in it come from files."""
    for sign, other in (("<", "‹"), (">", "›"), ("&", "＆"), ("://", ":/ /")):
        text = text.replace(sign, other)
    return _LINKS.sub(r"\g<0> ", text)


def send_preview(picture: Image.Image) -> None:
    """Send a picture to the running node: the frontend keeps showing the last live picture over the node's output."""
    comfy.utils.ProgressBar(1).update_absolute(1, 1, ("JPEG", picture, max(picture.size)))

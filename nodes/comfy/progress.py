"""Words and pictures from a running node to the person at the graph."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from PIL import Image
from server import PromptServer

_LINKS = re.compile(r"\[(?=\[)|www(?=\.)|__(?=LNK)", re.IGNORECASE)
"""Where the frontend sees a link begin: [[label|address]], www., and the marks that it works with itself."""

log = logging.getLogger("lora2")


def status_sender(node_id: str | None) -> Callable[[str], None]:
    """A function that writes into the log and onto the node."""

    def say(words: str) -> None:
        log.info("LoRA²: %s", words)
        server = getattr(PromptServer, "instance", None)
        if server is not None and node_id is not None:
            server.send_progress_text(inert(words), node_id)

    return say


def stop_if_cancelled() -> None:
    """Raise what the host raises where its cancel button was pressed."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def inert(words: str) -> str:
    """Words that the frontend shows as they are: it renders what nodes say as HTML and links, and names come from files."""
    for sign, other in (("<", "‹"), (">", "›"), ("&", "＆"), ("://", ":/ /")):
        words = words.replace(sign, other)
    return _LINKS.sub(r"\g<0> ", words)


def send_preview(picture: Image.Image) -> None:
    """Leave a picture in the node that runs: the frontend goes on showing the last live one, over the node's output."""
    comfy.utils.ProgressBar(1).update_absolute(1, 1, ("JPEG", picture, max(picture.size)))

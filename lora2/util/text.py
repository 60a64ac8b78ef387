"""Text for display: escaping of untrusted text (names and metadata of files), sizes, numbers."""

from __future__ import annotations

import re
import unicodedata

MAX_ESCAPED_LENGTH = 160

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"[\\`*_\[\]|~$]")  # () # ! + - are harmless inside a line once these are escaped
_LINKS = re.compile(r"(?i)(www)\.|:(?=//)|(mailto|xmpp):|@")


def clean(text: object, limit: int = 120) -> str:
    """One line of at most `limit` characters without control, direction or invisible characters."""
    # Truncated first: a header may hold megabytes under one key.
    visible = str(text)[: 4 * limit]
    if not (visible.isascii() and visible.isprintable()):
        visible = "".join(
            " " if c.isspace() else c for c in visible if c.isspace() or unicodedata.category(c)[0] not in "CZ"
        )
    line = " ".join(visible.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def escape_markdown(text: object, limit: int = 120) -> str:
    """`clean` text, escaped so that Markdown and HTML render it literally: no markup, no link, no table break."""
    line = "".join(_ENTITIES.get(c, c) for c in clean(text, limit))
    line = _MARKUP.sub(r"\\\g<0>", line)
    return _LINKS.sub(_break_link, line)


def _break_link(match: re.Match[str]) -> str:
    if match.group(1):
        return f"{match.group(1)}&#46;"
    if match.group(2):
        return f"{match.group(2)}&#58;"
    return "&#64;" if match.group() == "@" else "&#58;"


def format_size(number_of_bytes: float) -> str:
    """Format a size in bytes: '940 B', '61.3 KB', '4.2 MB', '1.38 GB' (decimal units, three digits)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        # 0.9995 of a unit would round up to '1000' of the smaller one.
        if number_of_bytes >= 0.9995 * factor:
            return f"{three_digits(number_of_bytes / factor)} {unit}"
    return f"{number_of_bytes:.0f} B"


def three_digits(value: float) -> str:
    """Format a positive number with three digits and no trailing zeros: 1.38, 14.8, 415, 2000."""
    if value >= 99.95:
        return f"{value:.0f}"
    text = f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".")


def escaped(name: object) -> str:
    """An untrusted name, safe for a message: invisible characters escaped, long names shortened in the middle."""
    text = str(name)
    if len(text) > MAX_ESCAPED_LENGTH:
        text = f"{text[: MAX_ESCAPED_LENGTH // 2]}…{text[-MAX_ESCAPED_LENGTH // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

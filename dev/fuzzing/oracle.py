"""What must hold for any bytes that somebody calls a LoRA: a result or our error, in bounds, and nothing else happens."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dev.packs import pack

LORA_ERROR: type[Exception] = pack("lora2.util.errors").LoraError
MESSAGE_LIMIT = 2000
"""Characters of a message, a note or a title at most."""

_FORBIDDEN = (
    "exec", "compile", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "socket.", "pickle.",
    "ctypes.dlopen", "shutil.", "os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate",
)  # fmt: skip
"""Audit events that reading a file must not cause."""

_MARKUP = {
    "link_open", "image", "html_inline", "html_block", "code_inline", "fence", "code_block", "em_open", "strong_open", "s_open",
}  # fmt: skip
"""What a report has none of."""

_TAG = re.compile(r"<[A-Za-z/!]")


class Broken(AssertionError):
    """A promise that an input broke."""


class _Guard(threading.local):
    """While armed in a thread, it must run nothing and open nothing for writing."""

    armed = False


_GUARD = _Guard()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _GUARD.armed:
        return
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise Broken(f"reading a file opened {arguments[0]!r} for writing")
    if event.startswith(_FORBIDDEN):
        raise Broken(f"reading a file did {event} {arguments[:1]!r}")


"".encode("unicode_escape")  # Python imports a codec when it is used first
sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """While inside, anything that runs code, writes, or calls out is an error."""
    _GUARD.armed = True
    try:
        yield
    finally:
        _GUARD.armed = False


def exercise(path: Path, picture: bool = True) -> str:
    """Read, report, cut, draw; returns what came of it: "read", or the beginning of our error.

    Raises Broken, or whatever went wrong.
    """
    form, report, truncate = pack("lora2.files.document"), pack("lora2.report.ranks"), pack("lora2.files.resize")
    try:
        with guarded():
            document = form.read(path)
    except LORA_ERROR as error:
        return _message(error, path)
    for words in document.notes:
        _plain(words)
    _words(document.uncut().values())
    _reported(report, document, path, picture)
    for share, max_rank, megabytes in ((0.5, 0, 0.0), (1.0, 1, 0.0), (0.99, 3, 0.001), (1.0, 0, 1e-5)):
        try:
            with guarded():
                result = truncate.resize(document, share, max_rank, megabytes)
                again = form.parse(result.document.state_dict())
        except LORA_ERROR as error:
            _message(error, path)
            continue
        _cut_holds(result, again, megabytes)
    return "read"


def _reported(report: Any, document: Any, path: Path, picture: bool) -> None:
    markdown = pack("lora2.report.markdown").markdown  # an import is code that runs
    for energy in (False, True):
        try:
            with guarded():
                made = report.build_report(document, document.metadata.get("ss_output_name", path.stem), energy=energy)
                data, text = made.to_json(), markdown(made)
        except LORA_ERROR as error:
            _message(error, path)
            continue
        _plain(made.title, 80)
        _finite(json.loads(data, parse_constant=lambda name: _broken(f"the data holds {name}")))
        _markdown(text)
        if picture:
            chart = pack("lora2.report.summary")
            image = chart.rank_picture(made, width=256, in_use=energy)
            if image.height > 4 * 1024:
                _broken(f"the picture is {image.height} pixels high")


def _cut_holds(result: Any, again: Any, megabytes: float) -> None:
    before, after = result.ranks_before, result.ranks_after
    if before.keys() != after.keys() or any(after[name] > before[name] for name in after):
        _broken(f"a cut raised a rank: {before} -> {after}")
    kept = {name for name, rank in after.items() if rank}
    if set(again.layers) - kept:
        _broken("a cut file holds layers that the cut did not leave")
    for words in again.notes:
        _plain(words)


def _message(error: Exception, path: Path) -> str:
    words = str(error)
    _plain(words)
    if str(path.parent) in words:
        _broken(f"a message tells where the file lies: {words}")
    return words[:160]


def _plain(text: str, limit: int = MESSAGE_LIMIT) -> None:
    """One printable line of bounded length."""
    if not text.isprintable():
        _broken(f"unprintable: {text[:200]!r}")
    if len(text) > limit:
        _broken(f"{len(text)} characters: {text[:200]}")


def _words(reasons: Any) -> None:
    for reason in reasons:
        _plain(reason)


def _finite(value: Any) -> None:
    level = [value]
    while level:
        item = level.pop()
        if isinstance(item, dict):
            level += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            level += item
        elif isinstance(item, float) and not math.isfinite(item):
            _broken("the data holds a number that is not finite")
        elif isinstance(item, str) and not item.isprintable():
            _broken(f"the data holds {item[:80]!r}")


def _markdown(text: str) -> None:
    """No tag, no link, no picture, no row that breaks its table: words of a file stay words."""
    from markdown_it import MarkdownIt

    for line in text.split("\n"):
        if not line.isprintable():
            _broken(f"markdown: {line[:200]!r}")
    if _TAG.search(text):
        _broken(f"markdown: {_TAG.search(text)}")
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    wrong = {inline.type for token in tokens for inline in [token, *(token.children or [])]} & _MARKUP
    if wrong:
        _broken(f"markdown shows {wrong}")
    widths = {
        line.replace("\\|", "").count("|") for line in text.split("\n") if line.startswith("| ") and " --- " not in line
    }
    if min(widths, default=3) < 3:
        _broken("a table's row is broken")


def _broken(what: str) -> Any:
    raise Broken(what)

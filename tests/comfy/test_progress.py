"""What nodes say reaches the page as words only."""

from __future__ import annotations

from typing import Any

import pytest
from training import pack


@pytest.mark.parametrize(
    "hostile",
    [
        "<img src=x onerror=alert(1)>",
        '<a href="https://x.y">mug</a>',
        "[[mug|https://x.y]]",
        "see www.x.y",
        "a &lt;b&gt;",
        "[[[mug|https://x.y]]]",
        "WWW.x.y",
        "wWw.x.y",
        "wwwwww.x.y",
        "mug __LNK7__",
        "hthttp://tp://x.y",
        ":::////x.y",
    ],
)
def test_names_from_files_are_inert(hostile: str, comfy: Any) -> None:
    """The frontend renders what a node says: tags, entities, bare addresses and [[label|address]]."""
    words = pack("nodes.comfy.progress").inert(f"1 belongs to no layer here: {hostile}.")
    assert not any(sign in words for sign in ("<", ">", "&", "[[", "://", "__LNK"))
    assert "www." not in words.lower()
    assert "mug" in words or "x.y" in words or "alert" in words or "lt;" in words, "the person still sees the name"

"""Translations: the texts of every node in every language, no more and no less, and served by ComfyUI.

tests/repo/english.json is the English that they were made from. The nodes' own may be ahead of it: `python -m dev.docs` lists the
difference.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dev import docs
from dev.docs import leaves
from dev.server import ComfyServer

LANGUAGES = sorted(path.name for path in docs.LOCALES.iterdir())
ENGLISH: dict[str, Any] = json.loads(docs.ENGLISH.read_text(encoding="utf-8"))
COMPILED = ("display_name", "description", "name")
"""Texts that the frontend compiles (vue-i18n), where @, {}, and | are syntax. Tooltips are shown as they are."""


@cache
def translation(language: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((docs.LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    return found


def pairs(language: str) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Path, English and translation of every text."""
    other = dict(leaves(translation(language)))
    for path, english in leaves(ENGLISH):
        yield path, english, other[path]


def test_english_has_the_keys_of_the_nodes() -> None:
    """If this fails, translate what `python -m dev.docs` lists, then run `python -m dev.docs --translated`."""
    assert [path for path, _ in leaves(ENGLISH)] == [path for path, _ in leaves(docs.english())]
    names = {path: text for path, text in leaves(docs.english()) if path[-1] == "name"}
    assert names == {path: text for path, text in leaves(ENGLISH) if path[-1] == "name"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated_and_none_is_stale(language: str) -> None:
    assert {path.name for path in (docs.LOCALES / language).iterdir()} == {"nodeDefs.json"}
    assert [path for path, _ in leaves(translation(language))] == [path for path, _ in leaves(ENGLISH)]
    assert all(value.strip() == value != "" for _, value in leaves(translation(language)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_in_the_language(language: str) -> None:
    same = [path for path, english, other in pairs(language) if english == other and path[-1] != "name"]
    assert same == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_terms_numbers_and_choices_are_kept(language: str) -> None:
    choices = {
        (node, "inputs", name, "tooltip"): options["options"]
        for node, info in docs.schemas().items()
        for name, type_, options, _ in docs.inputs(info)
        if type_ == "COMBO" and name not in docs.FILES
    }
    for path, english, other in pairs(language):
        for term in ("rank", "LoRA", "CLIP"):
            if re.search(rf"(?<![a-z]){term}", english) and path[-1] != "description":
                assert term in other, path
        assert numbers(english) <= numbers(other), path
        for choice in choices.get(path, []):
            assert choice not in english or choice in other, (path, choice)


def numbers(text: str) -> set[str]:
    """Numbers without their separators, which differ between languages."""
    found = re.findall(r"\d+(?:[.,\s]\d{3}(?!\d))+|\d+[.,]\d+|\d+", text)
    return {re.sub(r"\D", "", number) for number in found}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_frontend_can_compile_the_texts(language: str) -> None:
    for path, text in leaves(translation(language)):
        assert path[-1] not in COMPILED or not set("@{}|") & set(text), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_frontend_speaks_the_language(language: str) -> None:
    """It takes no language but its own: German, say, would never be shown."""
    spec = importlib.util.find_spec("comfyui_frontend_package")
    assert spec is not None
    assert spec.origin is not None
    assets = Path(spec.origin).parent / "static" / "assets"
    assert any(f'"./{language}/nodeDefs.json"' in path.read_text(encoding="utf-8") for path in assets.glob("i18n-*.js"))


def test_the_server_gives_every_language(server: ComfyServer) -> None:
    served = server.get("/i18n")
    assert LANGUAGES == ["es", "fr", "ja", "ko", "zh", "zh-TW"]
    for language in LANGUAGES:
        assert {node: served[language]["nodeDefs"][node] for node in docs.NODES} == translation(language)

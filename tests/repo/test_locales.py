"""Translations: the words of every node in every language, no more and no less, and served by ComfyUI."""

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
from dev.server import ComfyServer

LANGUAGES = sorted(path.name for path in docs.LOCALES.iterdir())
ENGLISH: dict[str, Any] = json.loads(docs.ENGLISH.read_text(encoding="utf-8"))
COMPILED = ("display_name", "description", "name")
"""Texts that the frontend compiles (vue-i18n): in them @, {}, and | mean something. Tooltips are shown as they are."""


@cache
def words(language: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((docs.LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    return found


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def pairs(language: str) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Where, in English, in the language."""
    other = dict(leaves(words(language)))
    for path, english in leaves(ENGLISH):
        yield path, english, other[path]


def test_english_is_what_the_nodes_say() -> None:
    """Where this fails, a node's words have changed: translate them in locales/, then run python -m dev.docs."""
    now = {node: docs.texts(info) for node, info in docs.schemas().items()}
    assert dict(leaves(ENGLISH)) == dict(leaves(now))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated_and_none_is_stale(language: str) -> None:
    assert {path.name for path in (docs.LOCALES / language).iterdir()} == {"nodeDefs.json"}
    assert [path for path, _ in leaves(words(language))] == [path for path, _ in leaves(ENGLISH)]
    assert all(value.strip() == value != "" for _, value in leaves(words(language)))


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
    for path, text in leaves(words(language)):
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
        assert {node: served[language]["nodeDefs"][node] for node in docs.NODES} == words(language)

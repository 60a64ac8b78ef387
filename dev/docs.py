"""Help pages of the nodes (web/docs) and docs/nodes.md, from the nodes' schemas: `python -m dev.docs` writes them.

The text of a help page that no schema holds is in dev/help. It also lists the texts whose English has changed since they were
translated; `python -m dev.docs --translated` takes the English of now into tests/repo/english.json, once locales/ is up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dev.host import ROOT, import_comfy
from dev.packs import pack

Info = dict[str, Any]
"""A node as ComfyUI's /object_info describes it."""

NODES = {
    "LoRA2_TrainAdaptiveLora": "nodes.train",
    "LoRA2_LoadAdaptiveLora": "nodes.load",
    "LoRA2_InspectRanks": "nodes.inspect_ranks",
    "LoRA2_ScorePictures": "nodes.score",
}
HELP = ROOT / "web" / "docs"
HELP_TEXTS = ROOT / "dev" / "help"
REFERENCE = ROOT / "docs" / "nodes.md"
LOCALES = ROOT / "locales"
ENGLISH = ROOT / "tests" / "repo" / "english.json"
FILES = ("lora_name", "continue_from")
"""Inputs whose choices are the files of the machine."""

INTRODUCTION = """# Nodes

Inputs and outputs of every node, generated from their schemas by `python -m dev.docs`. In ComfyUI, a node's help shows the same
tables with an explanation.
"""
HEADINGS = {"inputs": "Inputs", "advanced": "Advanced inputs", "outputs": "Outputs"}


@cache
def schemas() -> dict[str, Info]:
    """Descriptions of the nodes, as /object_info gives them, without a server."""
    import_comfy()
    return {node: pack(module).NODES[0].GET_NODE_INFO_V1() for node, module in NODES.items()}


def inputs(info: Info) -> Iterator[tuple[str, str, Info, bool]]:
    """Name, type, options and whether it is optional, of every input in the order of the node."""
    for kind in ("required", "optional"):
        for name, (type_, *options) in info["input"].get(kind, {}).items():
            yield name, type_, options[0] if options else {}, kind == "optional"


def texts(info: Info) -> Info:
    """Texts of a node in the form of locales/<language>/nodeDefs.json."""
    found: dict[str, Info] = {}
    for name, _, options, _ in inputs(info):
        found[name] = {"name": name, "tooltip": options["tooltip"]}
        if options.get("control_after_generate"):
            found["control_after_generate"] = {"name": "control after generate"}
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": found,
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


def tables(info: Info, level: str) -> str:
    """Sections for inputs, advanced inputs and outputs, with headings of this level; an empty one is left out."""
    sections = []
    for kind, heading in HEADINGS.items():
        if kind == "outputs":
            outputs = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
            head: tuple[str, ...] = ("output", "type", "description")
            rows: list[tuple[str, ...]] = [(f"`{name}`", f"`{type_}`", tooltip) for name, type_, tooltip in outputs]
        else:
            head = ("input", "default", "values", "description")
            rows = [_input_row(*i) for i in inputs(info) if bool(i[2].get("advanced")) == (kind == "advanced")]
        if rows:
            sections.append(f"{level} {heading}\n\n{_table(head, rows)}")
    return "\n".join(sections)


def help_page(node: str) -> str:
    """Help that ComfyUI's frontend shows for a node, in Markdown."""
    info = schemas()[node]
    text = (HELP_TEXTS / f"{node}.md").read_text(encoding="utf-8")
    return f"# {info['display_name']}\n\n{info['description']}\n\n{text}\n{tables(info, '##')}"


def reference() -> str:
    """docs/nodes.md: the tables of all nodes."""
    nodes = [f"## {i['display_name']}\n\n{i['description']}\n\n{tables(i, '###')}" for i in schemas().values()]
    return "\n".join([INTRODUCTION, *nodes])


def pages() -> dict[Path, str]:
    """Every generated page with its content."""
    return {REFERENCE: reference(), **{HELP / f"{node}.md": help_page(node) for node in NODES}}


def english() -> dict[str, Info]:
    """English texts of all nodes."""
    return {node: texts(info) for node, info in schemas().items()}


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a tree with its path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def _input_row(name: str, type_: str, options: Info, optional: bool) -> tuple[str, ...]:
    return f"`{name}`", _default(name, options, optional), _values(name, type_, options), str(options["tooltip"])


def _default(name: str, options: Info, optional: bool) -> str:
    if "default" not in options:
        return "optional" if optional else "required"
    value = options["default"]
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    return _number(value)


def _values(name: str, type_: str, options: Info) -> str:
    if name in FILES:
        return "files"
    if type_ == "COMBO":
        return ", ".join(f"`{option}`" for option in options["options"])
    if "max" in options:
        return f"{_number(options['min'])} to {_number(options['max'])}"
    return "text" if type_ == "STRING" else f"`{type_}`"


def _number(value: float) -> str:
    if value == 2**64 - 1:
        return "2⁶⁴ − 1"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10f}".rstrip("0").rstrip(".")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(c.replace("|", r"\|").replace("*", r"\*") for c in r) for r in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Writes the pages; lists what is to be translated, or marks it as translated."""
    for page, content in pages().items():
        page.write_text(content, encoding="utf-8")
    if "--translated" in sys.argv[1:]:
        ENGLISH.write_text(json.dumps(english(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    translated = dict(leaves(json.loads(ENGLISH.read_text(encoding="utf-8"))))
    for path, text in leaves(english()):
        if translated.get(path) != text:
            print(f"to translate: {'.'.join(path)}: {text}")


if __name__ == "__main__":
    main()

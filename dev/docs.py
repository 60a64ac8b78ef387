"""The node tables of README.md and the help pages, from the nodes' own words: `python -m dev.docs` writes them anew.

Also keeps tests/repo/english.json, the English that the translations in locales/ were made from. A changed tooltip shows up
there as a difference: translate it in every language, then run this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dev.host import ROOT, import_comfy
from dev.packs import pack

Info = dict[str, Any]

NODES = {
    "LoRA2_TrainAdaptiveLora": "nodes.train",
    "LoRA2_LoadAdaptiveLora": "nodes.load",
    "LoRA2_InspectRanks": "nodes.inspect_ranks",
    "LoRA2_ScorePictures": "nodes.score",
}
HELP = ROOT / "web" / "docs"
LOCALES = ROOT / "locales"
ENGLISH = ROOT / "tests" / "repo" / "english.json"
BLOCK = re.compile(r"(<!-- (inputs|advanced|outputs) (LoRA2_\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FILES = ("lora_name", "continue_from")
"""Lists that depend on the machine."""


def documents() -> list[Path]:
    """Every page that has tables."""
    return [ROOT / "README.md", *(HELP / f"{node}.md" for node in NODES)]


@cache
def schemas() -> dict[str, Info]:
    """What ComfyUI's /object_info says of the nodes, without a server."""
    import_comfy()
    return {node: pack(module).NODES[0].GET_NODE_INFO_V1() for node, module in NODES.items()}


def inputs(info: Info) -> Iterator[tuple[str, str, Info, bool]]:
    """Name, type, options and whether it is optional, of every input in the order of the node."""
    for kind in ("required", "optional"):
        for name, (type_, *options) in info["input"].get(kind, {}).items():
            yield name, type_, options[0] if options else {}, kind == "optional"


def texts(info: Info) -> Info:
    """A node's words in the form of locales/<language>/nodeDefs.json."""
    words: dict[str, Info] = {}
    for name, _, options, _ in inputs(info):
        words[name] = {"name": name, "tooltip": options["tooltip"]}
        if options.get("control_after_generate"):
            words["control_after_generate"] = {"name": "control after generate"}
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": words,
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


def table(info: Info, kind: str) -> str:
    """One Markdown table: the inputs, the advanced inputs, or the outputs."""
    if kind == "outputs":
        rows = zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)
        return _table(("output", "type", "what it is"), [(f"`{n}`", f"`{t}`", w) for n, t, w in rows])
    found = [i for i in inputs(info) if bool(i[2].get("advanced")) == (kind == "advanced")]
    rows_in = [(f"`{n}`", _default(n, t, o, optional), _words(n, t, o)) for n, t, o, optional in found]
    return _table(("input", "default", "what it does"), rows_in)


def _default(name: str, type_: str, options: Info, optional: bool) -> str:
    if "default" not in options:
        return "a file" if name in FILES else f"`{type_}`{', may be left open' * optional}"
    value = options["default"]
    if value == "":
        return "empty"
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0").rstrip(".")
    return f"`{value}`" if isinstance(value, str) else str(value)


def _words(name: str, type_: str, options: Info) -> str:
    if type_ != "COMBO" or name in FILES:
        return str(options["tooltip"])
    return f"{options['tooltip']} One of {', '.join(f'`{o}`' for o in options['options'])}."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(c.replace("|", r"\|").replace("*", r"\*") for c in r) for r in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def render(text: str, infos: dict[str, Info]) -> str:
    """The page with its tables as the nodes say now."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{table(infos[m[3]], m[2])}\n{m[4]}", text)


def english(infos: dict[str, Info]) -> str:
    """All words of all nodes, as JSON."""
    return json.dumps({node: texts(info) for node, info in infos.items()}, ensure_ascii=False, indent=2) + "\n"


def main() -> None:
    """Writes every page and the English words anew."""
    infos = schemas()
    for path in documents():
        path.write_text(render(path.read_text(encoding="utf-8"), infos), encoding="utf-8")
    ENGLISH.write_text(english(infos), encoding="utf-8")


if __name__ == "__main__":
    main()

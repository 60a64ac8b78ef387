"""The nodes' permanent shape, which saved workflows rely on: `python -m dev.schema` writes it anew.

Saved workflows hold widget values by position and links by slot. So inputs and outputs are appended, never
reordered, renamed or removed, and node ids stay for ever.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from dev import host
from dev.convert import widgets
from dev.server import ComfyServer

SNAPSHOT = host.ROOT / "tests" / "repo" / "nodes.json"
PREFIX = "LoRA2_"


def shapes(object_info: dict[str, Any]) -> dict[str, Any]:
    """Our nodes by id: inputs [name, type, section, positions among the saved values], outputs [name, type], in order."""
    return {node: _shape(info) for node, info in sorted(object_info.items()) if node.startswith(PREFIX)}


def _shape(info: dict[str, Any]) -> dict[str, Any]:
    positions = {widget.name: widget.positions for widget in widgets(info)}
    inputs = [
        [name, "COMBO" if isinstance(spec[0], list) else spec[0], section, positions.get(name, 0)]
        for section in ("required", "optional")
        for name, spec in info["input"].get(section, {}).items()
    ]
    outputs = [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs}


def text(found: dict[str, Any]) -> str:
    """The snapshot as JSON, an input or output a line."""
    nodes = []
    for node, parts in found.items():
        lists = [
            f'  "{key}": [\n' + ",\n".join(f"   {json.dumps(entry)}" for entry in entries) + "\n  ]"
            for key, entries in parts.items()
        ]
        nodes.append(f' "{node}": {{\n' + ",\n".join(lists) + "\n }")
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def main() -> None:
    """Asks a real server."""
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(text(shapes(server.object_info())))


if __name__ == "__main__":
    main()

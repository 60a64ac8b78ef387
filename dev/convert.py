"""A workflow as the frontend saves it, turned into a prompt for the server's API.

The saved form keeps a node's widget values by position; which position is which input is known only from the
server's /object_info. The frontend adds positions of its own: after a seed (what to do with it after a run) and
after an upload combo (its button). Muted nodes are left out, bypassed nodes and reroutes are passed through.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Json = dict[str, Any]
Prompt = dict[str, Json]

MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
UPLOADS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload")
SEEDS = ("seed", "noise_seed")


class Widget(NamedTuple):
    """One widget of a node: its input, its type, how many saved positions it takes, its default."""

    name: str
    kind: str
    positions: int
    default: Any


class ConversionError(ValueError):
    """The workflow does not fit the server: a node is missing, or values do not match its inputs."""


def widgets(info: Json) -> list[Widget]:
    """The widgets of a node type, in the order in which the frontend saves their values."""
    found = []
    for section in ("required", "optional"):
        for name, spec in info["input"].get(section, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            choices = options.get("options")
            if isinstance(kind, list):
                kind, choices = "COMBO", kind
            if kind not in WIDGETS or options.get("forceInput"):
                continue
            default = options.get("default", choices[0] if choices else None)
            found.append(Widget(name, kind, 1 + _own_positions(name, kind, options), default))
    return found


def _own_positions(name: str, kind: str, options: Json) -> int:
    """Positions that the frontend adds after a widget for itself."""
    if any(options.get(key) for key in UPLOADS):
        return 1
    if kind == "INT":
        return int(bool(options.get("control_after_generate", name in SEEDS)))
    return 2 * bool(options.get("control_after_generate"))


def values(node: Json, info: Json) -> Json:
    """A node's widget values by input name; what a newer node has and the file does not, at its default."""
    found = widgets(info)
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return {w.name: saved.get(w.name, w.default) for w in found}
    result, position = {}, 0
    for widget in found:
        result[widget.name] = saved[position] if position < len(saved) else widget.default
        position += widget.positions
    return result


def change(workflow: Json, object_info: Json, wanted: dict[str, Json]) -> list[str]:
    """Sets widgets of all nodes of the given types, in place; returns what changed, a line a widget.

    wanted: {node type: {input: value}}. Types that the workflow does not hold are passed over.
    """
    changed = []
    for node in workflow["nodes"]:
        position = 0
        for widget in widgets(object_info[node["type"]]) if node["type"] in wanted else ():
            saved, new = node["widgets_values"], wanted[node["type"]].get(widget.name)
            if new is not None and saved[position] != new:
                changed.append(f"{node['type']}.{widget.name}: {saved[position]} -> {new}")
                saved[position] = new
            position += widget.positions
    return changed


def to_prompt(workflow: Json, object_info: Json) -> Prompt:
    """The API form of a UI-form workflow. Raises ConversionError for what the server does not know."""
    graph = _Graph(workflow)
    prompt: Prompt = {}
    for node in sorted(graph.nodes.values(), key=lambda n: n.get("order", 0)):
        if not graph.runs(node):
            continue
        if node["type"] not in object_info:
            raise ConversionError(f"node {node['id']}: the server has no {node['type']!r}")
        info = object_info[node["type"]]
        inputs = values(node, info)
        for socket in node.get("inputs", []):
            source = graph.source(socket.get("link"))
            if source is not None:
                inputs[socket["name"]] = source
        title = node.get("title") or info.get("display_name") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


class _Graph:
    """Nodes by id and links by id."""

    def __init__(self, workflow: Json) -> None:
        if workflow.get("definitions", {}).get("subgraphs"):
            raise ConversionError("subgraphs are not supported; unpack them first")
        self.nodes: dict[int, Json] = {node["id"]: node for node in workflow["nodes"]}
        self.links = {link[0]: (link[1], link[2]) for link in workflow["links"]}

    def runs(self, node: Json) -> bool:
        """Whether the server sees this node."""
        return node["type"] not in (*NOTES, "Reroute", "PrimitiveNode") and node.get("mode", 0) not in (MUTED, BYPASSED)

    def source(self, link: int | None) -> list[Any] | None:
        """[node id, output number] that a link brings, through reroutes and bypassed nodes; None for nothing."""
        while link is not None:
            origin, slot = self.links[link]
            node = self.nodes[origin]
            if self.runs(node):
                return [str(origin), slot]
            if node["type"] == "Reroute":
                link = node["inputs"][0].get("link")
            elif node.get("mode") == BYPASSED:
                link = _passed(node, slot)
            else:
                return None
        return None


def _passed(node: Json, slot: int) -> int | None:
    """The link that a bypassed node hands on at an output: an input of the same type, the same number first."""
    wanted = node["outputs"][slot]["type"]
    sockets = node.get("inputs", [])
    for socket in [*sockets[slot : slot + 1], *sockets]:
        if socket["type"] == wanted:
            link: int | None = socket.get("link")
            return link
    return None

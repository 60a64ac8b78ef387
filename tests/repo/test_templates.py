"""The shipped templates against a real server's node descriptions, and what saved workflows rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomllib
from PIL import Image

from dev import convert, graphs, schema
from dev.demo import WORKFLOWS, adapt, template
from dev.server import PACK, ComfyServer

ROOT = Path(__file__).resolve().parents[2]
NAMES = [t.name for t in graphs.TEMPLATES]
FILES = ("ckpt_name", "folder", "lora_name")  # choices that differ from machine to machine


@pytest.fixture(scope="module")
def info(server: ComfyServer) -> dict[str, Any]:
    return server.object_info()


def test_the_folder_holds_the_templates_and_their_pictures_only() -> None:
    """ComfyUI lists every JSON in it, and shows the picture of the same name."""
    assert sorted(p.name for p in WORKFLOWS.iterdir()) == sorted(f"{n}.{s}" for n in NAMES for s in ("jpg", "json"))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_square(name: str) -> None:
    """The template browser's cards are."""
    with Image.open(WORKFLOWS / f"{name}.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height >= 512


@pytest.mark.parametrize("name", NAMES)
def test_every_node_is_known_and_says_where_it_comes_from(name: str, info: dict[str, Any]) -> None:
    """Manager finds missing packs by cnr_id and ver."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for node in template(name)["nodes"]:
        ours = node["type"].startswith(schema.PREFIX)
        assert node["type"] in info or node["type"] in convert.NOTES
        assert node["properties"]["cnr_id"] == (PACK if ours else "comfy-core")
        assert not ours or node["properties"]["ver"] == version
        assert node["properties"]["ver"]


def test_the_pack_is_named_as_the_registry_knows_it() -> None:
    """cnr_id is the project's name."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == PACK


@pytest.mark.parametrize("name", NAMES)
def test_saved_values_match_the_widgets(name: str, info: dict[str, Any]) -> None:
    """As many as the widgets take, of the right kind, in range, among the choices."""
    for node in template(name)["nodes"]:
        if node["type"] in convert.NOTES:
            continue
        description, saved = info[node["type"]], node.get("widgets_values") or []
        assert len(saved) == sum(w.positions for w in convert.widgets(description)), node["type"]
        specs = description["input"].get("required", {}) | description["input"].get("optional", {})
        for key, value in convert.values(node, description).items():
            assert fits(value, specs[key]) or key in FILES, f"{node['type']}.{key} = {value!r}"


def fits(value: Any, spec: list[Any]) -> bool:
    """Whether a widget may hold this value."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list) or kind == "COMBO":
        return value in (kind if isinstance(kind, list) else options["options"])
    if kind == "BOOLEAN":
        return isinstance(value, bool)
    if kind == "STRING":
        return isinstance(value, str)
    number = isinstance(value, int if kind == "INT" else (int, float)) and not isinstance(value, bool)
    return number and options["min"] <= value <= options["max"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_graphs_are_those_described(name: str) -> None:
    """dev/graphs.py changed without `python -m dev.templates` would go unnoticed otherwise."""
    described = next(t for t in graphs.TEMPLATES if t.name == name)
    saved = template(name)
    links = {link[0]: link for link in saved["links"]}
    assert [n["type"] for n in saved["nodes"]] == [n.type for n in described.nodes.values()]
    assert [g["title"] for g in saved["groups"]] == [g[0] for g in described.groups]
    for (key, wanted), node in zip(described.nodes.items(), saved["nodes"], strict=True):
        assert (node["pos"], node["size"]) == ([wanted.x, wanted.y], [wanted.width, wanted.height]), key
        sources = {i["name"]: links[i["link"]][1:3] for i in node.get("inputs", []) if i.get("link") is not None}
        assert set(sources) == set(wanted.inputs), key
        for name_, (origin, slot) in sources.items():
            source = saved["nodes"][origin - 1]
            assert wanted.inputs[name_] == f"{list(described.nodes)[origin - 1]}.{source['outputs'][slot]['name']}"


@pytest.mark.parametrize("name", NAMES)
def test_training_values_are_the_node_s_own_defaults(name: str, info: dict[str, Any]) -> None:
    """A person who changes nothing gets what the node recommends."""
    for node in template(name)["nodes"]:
        if node["type"] == "LoRA2_TrainAdaptiveLora":
            description = info[node["type"]]
            expected = {w.name: w.default for w in convert.widgets(description)}
            assert convert.values(node, description) == expected


@pytest.mark.parametrize("name", NAMES)
def test_templates_become_whole_prompts(name: str, info: dict[str, Any]) -> None:
    """Every required input has a value or a link to a node that is in the prompt."""
    prompt = convert.to_prompt(template(name), info)
    for node in prompt.values():
        for key in info[node["class_type"]]["input"].get("required", {}):
            assert key in node["inputs"], f"{node['class_type']}.{key}"
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in prompt


def test_the_demo_changes_values_only(info: dict[str, Any]) -> None:
    """The demo runs the shipped graph: same nodes, same links."""
    for name in NAMES:
        before = template(name)
        after, changed = adapt(before, info, lora_name="x.safetensors")
        assert changed
        assert after["links"] == before["links"]
        for old, new in zip(before["nodes"], after["nodes"], strict=True):
            assert {k: v for k, v in old.items() if k != "widgets_values"} == {
                k: v for k, v in new.items() if k != "widgets_values"
            }


def test_ids_inputs_and_outputs_never_change(info: dict[str, Any]) -> None:
    """Appending at the end is fine: run `python -m dev.schema`. Anything else breaks saved workflows."""
    assert json.loads(schema.SNAPSHOT.read_text()) == schema.shapes(info)
    assert schema.SNAPSHOT.read_text() == schema.text(schema.shapes(info))


# dev.convert by itself, on made-up nodes


INFO: dict[str, Any] = {
    "Source": {"input": {"required": {"name": [["a", "b"], {"image_upload": True}], "size": ["INT", {"default": 4}]}}},
    "Filter": {"input": {"required": {"image": ["IMAGE"], "seed": ["INT", {"default": 0}], "text": ["STRING", {}]}}},
    "Seeds": {
        "input": {
            "required": {"first": ["INT", {"control_after_generate": "fixed"}], "seed": ["FLOAT", {}]},
            "optional": {"pick": ["COMBO", {"options": ["x"], "control_after_generate": True}], "on": ["BOOLEAN", {}]},
        }
    },
    "Sink": {"input": {"optional": {"image": ["IMAGE"], "words": ["STRING", {"forceInput": True}], "n": ["INT", {}]}}},
}


def node(number: int, kind: str, values: Any = None, link: int | None = None, **more: Any) -> dict[str, Any]:
    """A node with one image input and one image output."""
    sockets = [{"name": "image", "type": "IMAGE", "link": link}]
    return {
        "id": number,
        "type": kind,
        "inputs": sockets,
        "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
        "widgets_values": values,
        "order": number,
        **more,
    }


def chain(*middle: dict[str, Any]) -> dict[str, Any]:
    """Source 1, the given nodes, sink 9, each linked to the one before."""
    nodes = [node(1, "Source", ["b", "image", 8]), *middle, node(9, "Sink", [3])]
    links = [[k, nodes[k - 1]["id"], 0, nodes[k]["id"], 0, "IMAGE"] for k in range(1, len(nodes))]
    for link in links:
        nodes[link[0]]["inputs"][0]["link"] = link[0]
    return {"nodes": nodes, "links": links}


def test_values_are_read_by_position() -> None:
    """An upload button and a seed take a position of their own."""
    prompt = convert.to_prompt(chain(node(2, "Filter", [7, "randomize", "hello"])), INFO)
    assert prompt["1"] == {"class_type": "Source", "inputs": {"name": "b", "size": 8}, "_meta": {"title": "Source"}}
    assert prompt["2"]["inputs"] == {"image": ["1", 0], "seed": 7, "text": "hello"}
    assert prompt["9"]["inputs"] == {"image": ["2", 0], "n": 3}


def test_positions_of_the_frontend_itself() -> None:
    """Any form of control_after_generate counts; a FLOAT named seed has none; missing values take defaults."""
    assert [w.positions for w in convert.widgets(INFO["Seeds"])] == [2, 1, 3, 1]
    assert convert.values(node(1, "Source", ["a"]), INFO["Source"]) == {"name": "a", "size": 4}
    assert convert.values(node(1, "Source", {"size": 5}), INFO["Source"]) == {"name": "a", "size": 5}


def test_bypassed_nodes_and_reroutes_are_passed_through() -> None:
    """The sink gets the source itself."""
    for passed in (node(2, "Filter", [7, "fixed", ""], mode=4), node(2, "Reroute")):
        prompt = convert.to_prompt(chain(passed), INFO)
        assert list(prompt) == ["1", "9"]
        assert prompt["9"]["inputs"]["image"] == ["1", 0]


def test_muted_nodes_and_notes_are_left_out() -> None:
    """What hangs on a muted node has no input."""
    prompt = convert.to_prompt(chain(node(2, "Filter", [7, "fixed", ""], mode=2)), INFO)
    assert prompt["9"]["inputs"] == {"n": 3}
    workflow = chain()
    workflow["nodes"].append({"id": 5, "type": "MarkdownNote", "widgets_values": ["# hello"]})
    assert "5" not in convert.to_prompt(workflow, INFO)


def test_unknown_nodes_and_subgraphs_are_refused() -> None:
    """With the node's number and type."""
    with pytest.raises(convert.ConversionError, match="node 2: the server has no 'Nothing'"):
        convert.to_prompt(chain(node(2, "Nothing")), INFO)
    with pytest.raises(convert.ConversionError, match="subgraphs"):
        convert.to_prompt({**chain(), "definitions": {"subgraphs": [{}]}}, INFO)


def test_change_sets_values_where_they_are() -> None:
    """And tells of those that were different."""
    workflow = chain(node(2, "Filter", [7, "fixed", "hello"]))
    wanted = {"Filter": {"seed": 7, "text": "bye"}, "Source": {"size": 16}, "Absent": {"x": 1}}
    assert convert.change(workflow, INFO, wanted) == ["Source.size: 8 -> 16", "Filter.text: hello -> bye"]
    assert [n["widgets_values"] for n in workflow["nodes"]] == [["b", "image", 16], [7, "fixed", "bye"], [3]]

"""Makes workflows/*.json and their pictures, in the real frontend: `python -m dev.templates [--no-pictures]`.

The graphs are described in dev/graphs.py and built through the frontend's own API; what is written is what the
frontend saves. The pictures come from a run of each template on the demo's small model.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomllib
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Page

from dev import assets, host
from dev.browser import frontend
from dev.demo import INSPECT, LOAD, TRAIN, Demo, side_by_side
from dev.graphs import TEMPLATES, Template
from dev.server import PACK, ComfyServer

FOLDER = host.ROOT / "workflows"
SIDE = 768  # of the pictures: the template browser's cards are square
BACKGROUND = (20, 21, 26)
# Where the frontend stands when a template is opened: the top left corner, all columns on a common screen.
VIEW = {"scale": 0.72, "offset": [140, 200]}

BUILD = """async ([template, pack, versions, view]) => {
    const graph = app.graph, made = {};
    graph.clear();
    graph.id = template.id;
    for (const [key, spec] of Object.entries(template.nodes)) {
        const node = window.LiteGraph.createNode(spec.type);
        graph.add(node);
        made[key] = node;
        node.pos = [spec.x, spec.y];
        node.size = [spec.width, spec.height];
        if (spec.title) node.title = spec.title;
        const ours = spec.type.startsWith('LoRA2_');
        node.properties.cnr_id = ours ? pack : 'comfy-core';
        node.properties.ver = ours ? versions.pack : versions.core;
        Object.assign(node.properties, spec.properties);
        for (const [name, value] of Object.entries(spec.values)) {
            const widget = node.widgets.find(w => w.name === name);
            if (!widget) throw Error(`${spec.type} has no widget ${name}`);
            widget.value = value;
        }
    }
    for (const [key, spec] of Object.entries(template.nodes))
        for (const [name, from] of Object.entries(spec.inputs)) {
            const [source, output] = from.split('.');
            const slot = made[source].outputs.findIndex(o => o.name === output);
            const target = made[key].inputs.findIndex(i => i.name === name);
            if (slot < 0 || target < 0) throw Error(`no ${from} or no ${name} on ${key}`);
            made[source].connect(slot, made[key], target);
        }
    for (const [title, x, y, width, height, colour] of template.groups) {
        const group = new window.LGraphGroup(title);
        group.pos = [x, y];
        group.size = [width, height];
        group.color = colour;
        graph.add(group);
    }
    const wide = {};
    for (const [key, node] of Object.entries(made)) {
        const least = node.computeSize();
        if (least[0] > node.size[0] || least[1] > node.size[1]) wide[key] = [...least];
    }
    const workflow = (await app.graphToPrompt()).workflow;
    workflow.extra = {ds: view};
    return [JSON.stringify(workflow), wide];
}"""


def build(page: Page, template: Template, versions: dict[str, str]) -> dict[str, Any]:
    """The workflow as the frontend saves it. Raises ValueError for nodes that are too small for their widgets."""
    workflow, wide = page.evaluate(BUILD, [asdict(template), PACK, versions, VIEW])
    if wide:
        raise ValueError(f"{template.name}: these nodes need at least this size: {wide}")
    return dict(json.loads(workflow))


def write(template: Template, workflow: dict[str, Any]) -> Path:
    """The workflow as a file in workflows/."""
    path = FOLDER / f"{template.name}.json"
    path.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")
    return path


def versions(server: ComfyServer) -> dict[str, str]:
    """What properties.ver says of stock nodes and of ours."""
    project = tomllib.loads((host.ROOT / "pyproject.toml").read_text())["project"]
    return {"core": server.get("/system_stats")["system"]["comfyui_version"], "pack": project["version"]}


def pictures(server: ComfyServer) -> dict[str, Image.Image]:
    """The templates' pictures, from a run of each on the demo's small model."""
    demo = Demo(server)
    demo.run(TRAIN)
    name = demo.trained_name()
    live = Image.open(io.BytesIO(server.previews[-2]))  # the last one shows the ranks alone
    shown = sorted((server.base / "input" / "mug").glob("*.png"))[:4]
    compared = demo.run(LOAD, lora_name=name)
    ranks = Image.open(demo.run(INSPECT, lora_name=name)[INSPECT][0])
    pair = side_by_side([*compared["Without the LoRA"], *compared["With the LoRA"]])
    mugs = side_by_side(shown)
    return {
        TRAIN: stacked(mugs, live),
        LOAD: stacked(mugs, words("without", "with the LoRA"), pair),
        INSPECT: stacked(ranks),
    }


def words(*columns: str) -> Image.Image:
    """Words in a row, each in the middle of its column."""
    row = Image.new("RGB", (SIDE, 56), BACKGROUND)
    for index, column in enumerate(columns):
        place = (SIDE * (index + 0.5) / len(columns), 28)
        ImageDraw.Draw(row).text(place, column, (235, 235, 240), ImageFont.load_default(26), anchor="mm")
    return row


def stacked(*parts: Image.Image) -> Image.Image:
    """Pictures, made equally wide, one below the other, as large as fits into a square."""
    width = min(SIDE, round(SIDE / sum(part.height / part.width for part in parts)))
    scaled = [part.convert("RGB").resize((width, round(part.height * width / part.width))) for part in parts]
    square = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    top = (SIDE - sum(part.height for part in scaled)) // 2
    for part in scaled:
        square.paste(part, ((SIDE - width) // 2, top))
        top += part.height
    return square


def main() -> None:
    """Writes every template and its picture."""
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        assets.fill_base(server.base)
        with frontend(server.url) as page:
            for template in TEMPLATES:
                write(template, build(page, template, versions(server)))
        if "--no-pictures" in sys.argv[1:]:
            return
        for name, picture in pictures(server).items():
            picture.save(FOLDER / f"{name}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()

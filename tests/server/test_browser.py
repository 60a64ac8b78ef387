"""The pack in ComfyUI's real frontend, in a real Chromium: templates, a run, its pictures, a cancelled run."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page
from safetensors.torch import save_file

from dev import assets, graphs
from dev.browser import frontend, open_workflow, queue, quiet_settings, set_values, wait_for_end
from dev.convert import to_prompt
from dev.demo import INSPECT, LOAD, SMALL, TRAIN, adapt, template
from dev.server import PACK, ComfyServer

NODE = "LoRA2_TrainAdaptiveLora"
SHORT = {"steps": 8, "learning_rate": 0.01, "batch_size": 1, "target_rank": 2, "save_name": "browser/mug"}
STATE = """type => {
    const node = app.graph.nodes.find(n => n.type === type), image = node.imgs?.[0];
    if (!image?.complete) return null;
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext('2d').drawImage(image, 0, 0);
    return {ended: window.ended, picture: canvas.toDataURL('image/png')};
}"""


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """What the page's console called errors."""
    return []


@pytest.fixture(scope="module")
def page(server: ComfyServer, messages: list[str]) -> Iterator[Page]:
    """One visit for all tests of this file."""
    quiet_settings(server.base, **{"LiteGraph.Canvas.MaximumFps": 5})  # pictures are drawn without a GPU
    with frontend(server.url, 1200, 800, messages) as page:
        yield page


def saved(server: ComfyServer) -> set[Path]:
    """The LoRA files that there are."""
    return set((server.base / "models" / "loras").rglob("*.safetensors"))


def shown(page: Page, node_type: str) -> Image.Image:
    """The picture that a node shows, once it is there."""
    page.wait_for_function(f"type => ({STATE})(type)?.picture", arg=node_type, timeout=30_000)
    data = page.evaluate(STATE, node_type)["picture"]
    return Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")


def output(server: ComfyServer, node_type: str) -> Image.Image:
    """The picture that the last run of a node put out."""
    entry = list(server.get("/history").values())[-1]
    node = next(key for key, value in entry["prompt"][2].items() if value["class_type"] == node_type)
    image = entry["outputs"][node]["images"][0]
    return Image.open(server.base / image["type"] / image["subfolder"] / image["filename"]).convert("RGB")


def same(left: Image.Image, right: Image.Image) -> bool:
    """Equal but for JPEG's rounding: one side may have gone through it, which moves a drawn picture by about 1/255."""
    if left.size != right.size:
        return False
    return float(np.abs(np.asarray(left, dtype=float) - np.asarray(right, dtype=float)).mean()) < 4


def browse(page: Page) -> None:
    """Opens the template browser at the pack's templates."""
    page.get_by_role("button", name="Templates", exact=True).click()
    page.get_by_text(PACK, exact=True).click()


def test_the_template_browser_lists_the_three_templates(page: Page) -> None:
    """Under the pack's name, each with its picture."""
    browse(page)
    page.wait_for_function(
        "names => names.every(name => [...document.images].some(i => i.alt === name && i.naturalWidth > 0))",
        arg=[described.name for described in graphs.TEMPLATES],
        timeout=10_000,
    )
    page.keyboard.press("Escape")


def test_the_training_template_opens_and_trains(page: Page, server: ComfyServer) -> None:
    """Nothing missing; a live picture while it runs, the picture of the ranks at the end, a file with a new name."""
    browse(page)
    page.get_by_text(TRAIN, exact=True).first.click()
    page.wait_for_function("type => app.graph.nodes.some(n => n.type === type)", arg=NODE, timeout=10_000)
    kinds = page.evaluate("app.graph.nodes.map(n => [n.type, n.type in window.LiteGraph.registered_node_types])")
    assert len(kinds) == len(graphs.TRAIN.nodes)
    assert all(known for _, known in kinds)
    assert page.get_by_text("missing node", exact=False).count() == 0
    before = saved(server)
    for node_type, values in (SMALL | {NODE: SHORT}).items():
        set_values(page, node_type, values)
    queue(page)
    live = shown(page, NODE)
    assert page.evaluate("window.ended") is None
    assert wait_for_end(page, 120) == "execution_success"
    page.wait_for_timeout(500)
    ranks = output(server, NODE)
    assert not same(live, ranks)
    assert same(shown(page, NODE), ranks)
    assert [path.parent.name for path in saved(server) - before] == ["browser"]
    assert shown(page, "PreviewImage").size == (128, 128)


def test_cancel_stops_and_saves(page: Page, server: ComfyServer) -> None:
    """The button in the page; afterwards the next prompt runs."""
    before = saved(server)
    workflow, _ = adapt(template(TRAIN), server.object_info())
    open_workflow(page, workflow, TRAIN)
    set_values(page, NODE, SHORT | {"steps": 100_000, "seed": 1})
    queue(page)
    page.wait_for_function("app.graph.nodes.find(n => n.progress > 0)", timeout=60_000)
    page.wait_for_timeout(1500)
    page.get_by_label("Cancel current run").click()
    assert wait_for_end(page, 30) == "execution_interrupted"
    (path,) = saved(server) - before
    assert path.stat().st_size > 0
    page.get_by_text("the LoRA so far is saved as").first.wait_for(timeout=5000)
    set_values(page, NODE, {"steps": 1})
    queue(page)
    assert wait_for_end(page, 60) == "execution_success"


def test_inspect_shows_its_picture(page: Page, server: ComfyServer) -> None:
    """The template with a file of somebody else's."""
    name = "browser_other.safetensors"
    pair = {"lora_up.weight": torch.ones(8, 2), "lora_down.weight": torch.ones(2, 8)}
    prefix = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{prefix}.{key}": value for key, value in pair.items()}, server.base / "models" / "loras" / name)
    workflow, _ = adapt(template(INSPECT), server.object_info(), lora_name=name)
    open_workflow(page, workflow, INSPECT)
    queue(page)
    assert wait_for_end(page, 60) == "execution_success"
    page.wait_for_timeout(500)
    assert same(shown(page, "LoRA2_InspectRanks"), output(server, "LoRA2_InspectRanks"))


@pytest.mark.parametrize("name", [TRAIN, LOAD, INSPECT])
def test_our_conversion_is_the_frontend_s(page: Page, server: ComfyServer, name: str) -> None:
    """dev.convert and the frontend's own graphToPrompt give the same prompt."""
    workflow = template(name)
    open_workflow(page, workflow, name)
    frontend_s: dict[str, Any] = page.evaluate("app.graphToPrompt().then(p => JSON.parse(JSON.stringify(p.output)))")
    ours = to_prompt(workflow, server.object_info())
    assert set(ours) == set(frontend_s)
    for number, node in ours.items():
        theirs = frontend_s[number]
        # The frontend adds widgets of its own that the server does not know (Preview as Text).
        assert node["inputs"] == {k: v for k, v in theirs["inputs"].items() if not k.startswith("preview_")}
        assert (node["class_type"], node["_meta"]) == (theirs["class_type"], theirs["_meta"])


def test_the_page_finds_no_fault_with_us(messages: list[str], page: Page) -> None:
    """Last: no error in the console that names the pack, its nodes or its files."""
    page.wait_for_timeout(200)
    assert [m for m in messages if "lora2" in m.lower() and assets.CHECKPOINT not in m] == []

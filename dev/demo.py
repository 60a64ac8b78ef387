"""`make demo`: the shipped templates on a real ComfyUI: train, load, sample, inspect. Minutes, without a GPU.

Nothing is downloaded: the model is a small one that draws a world of its own (dev.painter), the subject a mug of it.
So the templates run with other values than a person would use; every changed value is printed.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from dev import assets, host
from dev.convert import change, to_prompt
from dev.server import ComfyServer, PromptError
from lora2.files.document import read
from lora2.report.markdown import markdown
from lora2.report.ranks import RankReport, build_report

WORKFLOWS = host.ROOT / "workflows"
TRAIN, LOAD, INSPECT = "Train Adaptive LoRA", "Load Adaptive LoRA", "Inspect Ranks"
SIDE = 128  # of the drawn pictures
SMALL: dict[str, dict[str, Any]] = {
    "CheckpointLoaderSimple": {"ckpt_name": assets.PAINTER},
    "LoadImageTextDataSetFromFolder": {"folder": "mug"},
    "ImageScale": {"width": SIDE, "height": SIDE},
    "EmptyLatentImage": {"width": SIDE, "height": SIDE},
    "LoRA2_TrainAdaptiveLora": {"steps": 120, "learning_rate": 0.01, "batch_size": 4, "target_rank": 4},
    "KSampler": {"steps": 15, "cfg": 3.0, "scheduler": "simple"},
}


PROMPT = "a photo of a big sks mug in the desert, centre"
"""In the words of the subject's captions, in a place where no training picture shows it."""


def template(name: str) -> dict[str, Any]:
    """A shipped workflow, as saved by the frontend."""
    return dict(json.loads((WORKFLOWS / f"{name}.json").read_text()))


def adapt(workflow: dict[str, Any], info: dict[str, Any], **names: str) -> tuple[dict[str, Any], list[str]]:
    """A copy of a workflow for the small model, and what changed. lora_name: the file to load or inspect."""
    result, loaders = copy.deepcopy(workflow), ("LoRA2_LoadAdaptiveLora", "LoRA2_InspectRanks")
    changed = change(result, info, SMALL | {node: dict(names) for node in loaders})
    for node in result["nodes"]:
        if node.get("title", "").startswith("Prompt"):
            changed.append(f"{node['title']}: {node['widgets_values'][0]} -> {PROMPT}")
            node["widgets_values"][0] = PROMPT
    return result, changed


class Demo:
    """One run on a started server."""

    def __init__(self, server: ComfyServer) -> None:
        self.server = server
        self.info = server.object_info()
        self.output = server.base / "output" / "lora2_demo"

    def run(self, name: str, **names: str) -> dict[str, list[Path]]:
        """Runs a template; returns the pictures of each of its output nodes, by the node's title."""
        workflow, changed = adapt(template(name), self.info, **names)
        print(f"\n{name}\n" + "\n".join(f"  {line}" for line in changed), flush=True)
        start = time.monotonic()
        prompt = to_prompt(workflow, self.info)
        entry = self.server.run(prompt, timeout=1200)
        for text in dict.fromkeys(self.server.texts):
            print(f"  {text}")
        print(f"  done in {time.monotonic() - start:.0f} s", flush=True)
        return {
            prompt[node]["_meta"]["title"]: [self._path(image) for image in found.get("images", [])]
            for node, found in entry["outputs"].items()
        }

    def _path(self, image: dict[str, str]) -> Path:
        return self.server.base / image["type"] / image["subfolder"] / image["filename"]

    def trained_name(self) -> str:
        """The name under which the training node says that it saved."""
        found = [match for text in self.server.texts if (match := re.search(r"Saved as (.+\.safetensors)", text))]
        if not found:
            raise PromptError(f"the training node named no file: {self.server.texts}")
        return found[-1][1]

    def keep(self, picture: Image.Image, name: str) -> Path:
        """Writes a picture into the output folder."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / name
        picture.save(path)
        return path


def side_by_side(paths: list[Path], height: int = 384) -> Image.Image:
    """Pictures in a row, enlarged without smoothing: their pixels are the model's own."""
    pictures = [Image.open(path).convert("RGB").resize((height, height), Image.Resampling.NEAREST) for path in paths]
    row = Image.new("RGB", (len(pictures) * (height + 8) - 8, height), "white")
    for index, picture in enumerate(pictures):
        row.paste(picture, (index * (height + 8), 0))
    return row


def rank_table(report: RankReport) -> str:
    """Rank per block and projection, as in the node's Markdown, with aligned columns."""
    rows = [line for line in markdown(report).split("###")[1].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "---" not in row]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(f"  {line}" for line in lines)


def play(server: ComfyServer) -> None:
    """Runs the three templates on a started server and says what came of it."""
    demo = Demo(server)
    demo.run(TRAIN)
    name = demo.trained_name()
    adapter = server.base / "models" / "loras" / name
    compared = demo.run(LOAD, lora_name=name)
    both = side_by_side(compared["Without the LoRA"] + compared["With the LoRA"])
    drawn = Image.open(demo.run(INSPECT, lora_name=name)["Inspect Ranks"][0])
    report = build_report(read(adapter), adapter.stem)
    print(f"\nLearned ranks, by block and projection:\n{rank_table(report)}\n")
    print(f"adapter:                        {adapter}")
    print(f"picture, without and with it:   {demo.keep(both, 'without_and_with.png')}")
    print(f"picture of its ranks:           {demo.keep(drawn, 'ranks.png')}\n")
    print(
        f"lora2 demo: ok adapter={adapter} layers={len(report.layers)} ranks={report.min_rank}..{report.max_rank} "
        f"mean={report.mean_rank:.2f} size_mb={adapter.stat().st_size / 1e6:.3f}"
    )


def main() -> None:
    """Starts ComfyUI in .host/demo and plays."""
    base = host.HOST / "demo"
    print("Drawing pictures and a small model, starting ComfyUI.", flush=True)
    with ComfyServer(base) as server:
        assets.fill_base(base)
        play(server)


if __name__ == "__main__":
    try:
        main()
    except PromptError as error:
        sys.exit(f"lora2 demo: failed: {error}")

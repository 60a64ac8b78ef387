"""`make demo` and `make ui` on the tests' server, with fewer steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from dev import demo, ui
from dev.server import ComfyServer

LAST_LINE = re.compile(
    r"lora2 demo: ok adapter=(?P<adapter>.+\.safetensors) layers=(?P<layers>\d+) ranks=(?P<low>\d+)\.\.(?P<high>\d+) "
    r"mean=(?P<mean>\d+\.\d+) size_mb=(?P<size>\d+\.\d+)"
)


def test_the_demo_ends_with_its_line(
    server: ComfyServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts read the last line: format, and figures that agree with the file."""
    few = {"steps": 6, "batch_size": 1, "save_name": "demo/mug"}
    monkeypatch.setitem(demo.SMALL, "LoRA2_TrainAdaptiveLora", demo.SMALL["LoRA2_TrainAdaptiveLora"] | few)
    demo.play(server)
    printed = capsys.readouterr().out
    found = LAST_LINE.fullmatch(printed.rstrip("\n").splitlines()[-1])
    assert found
    adapter = Path(found["adapter"])
    assert adapter.is_file()
    assert float(found["size"]) == pytest.approx(adapter.stat().st_size / 1e6, abs=5e-4)  # three digits are printed
    # Two projections of pictures and of text in each of four blocks, but for the last of text; target_rank 4.
    assert 8 <= int(found["layers"]) <= 15, "a cut may have dropped some"
    # A unit of rank in all layers is 11,776 parameters; those that are left share what a dropped one had, at most 1,024.
    mean, most = float(found["mean"]), 4 * 11776 / (11776 - 1024 * (15 - int(found["layers"])))
    assert 1 <= int(found["low"]) <= mean <= most + 0.005
    assert int(found["high"]) >= 4
    for picture in re.findall(r"picture.*: +(\S.*\.png)", printed):
        with Image.open(picture) as image:
            assert min(image.size) >= 384
    assert "ctx attn qkv" in printed


def test_ui_leaves_small_workflows(server: ComfyServer) -> None:
    """Where the frontend lists the user's own."""
    paths = ui.save_small_workflows(server)
    assert [path.name for path in paths] == [
        "Small - Train Adaptive LoRA.json",
        "Small - Load Adaptive LoRA.json",
        "Small - Inspect Ranks.json",
    ]
    listed = server.get("/userdata?dir=workflows")
    assert set(listed) >= {path.name for path in paths}
    values = [node.get("widgets_values") for node in json.loads(paths[0].read_text())["nodes"]]
    assert ["mug"] in values
    assert ["(the connected LoRA)", "rank"] in values  # the training workflow inspects what it trains

"""The pages of the benchmark say what its JSON says, and its parts run on a CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks import models, speed, table
from benchmarks.measure import Figures, our_step

ROWS: list[dict[str, Any]] = json.loads((speed.DOCS / "speed.json").read_text(encoding="utf-8"))


def test_the_pages_are_those_of_the_json() -> None:
    readme = speed.README.read_text(encoding="utf-8")
    assert table.render(readme, ROWS, speed.README_WORKS) == readme
    assert (speed.DOCS / "speed.md").read_text(encoding="utf-8") == table.page(ROWS)
    assert "| **LoRA², step recorded as a CUDA graph** |" in readme


def test_a_run_is_watched_and_leaves_nothing(folders: Path) -> None:
    """The benchmark's own run, on the small Flux: its steps, sizes and losses are seen; no LoRA and no state is written."""
    patcher, sample = models.small("flux"), models.sample_for("flux", 16, 16)
    figures, watch = our_step(patcher, sample, steps=8, rank=4)
    assert [done for _, done in watch.stamps] == list(range(1, 9))
    assert 0 < figures.ms <= 1e3 * (watch.stamps[-1][0] - watch.start)
    assert watch.held > 0
    assert watch.mean_rank > 0
    assert figures.more["steps"] == 8
    assert not list(folders.rglob("*.safetensors"))
    session = models.pack("nodes.runs.run")
    assert session.Trainer is models.pack("lora2.training.trainer").Trainer, "what was replaced is back in its place"
    assert models.pack("nodes.runs.finish").save_trained.__module__.endswith("nodes.runs.finish")


def test_every_row_says_what_was_measured_where() -> None:
    for row in ROWS:
        assert {"work", "name", "ms", "peak_gib", "limit_ratio", "device", "torch", "comfyui", "date"} <= row.keys()
        assert row["name"] in table.NAMES


def test_a_work_that_is_measured_anew_replaces_its_old_rows() -> None:
    old = [{"work": "a", "name": "limit", "ms": 1}, {"work": "b", "name": "limit", "ms": 2}]
    new = [{"work": "a", "name": "ours", "ms": 3}]
    assert table.merged(old, new) == [new[0], old[1]]


def test_ratios_are_of_the_row_that_is_named() -> None:
    rows = table.Table({"device": "x"})
    rows.add("a", "limit", Figures(10.0, math.nan), "limit")
    row = rows.add("a", "ours", Figures(13.0, 2.0), "limit", more=1)
    assert (row["limit_ratio"], row["peak_gib"], row["more"], row["device"]) == (1.3, 2.0, 1, "x")
    assert rows.rows[0]["peak_gib"] is None

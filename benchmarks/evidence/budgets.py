"""Budgets: ten sizes from tiny to large, and how large the saved files are.

`python -m benchmarks.evidence.budgets` runs it in full.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import models
from benchmarks.evidence.experiment import Claim, Results, chosen, main, table
from benchmarks.evidence.plot import ACCENT, CALM, Plot, Series
from lora2.util.text import format_size as in_words

KEY, FILE = "budget", "budget.json"

WIDTHS = {"sd15": (4, 768, 0), "flux": (16, 4096, 768)}
"""Channels of the latent, width of the text, width of the pooled text."""

FORMS = {"settled": models.pack("lora2.config").TrainingConfig().settle_at, "paper's form": 1.0}
COLOURS = {"settled": ACCENT, "paper's form": CALM}
BUDGETS = 10
CLOSE = 0.02
RESOLUTION = 0.02
"""The share of a budget that a file may stay below it. Smaller files than the one whose last position costs this much are
not asked for: they cannot be met by whole positions."""


def dataset(family: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Three random pictures with captions, as ComfyUI's dataset nodes give them."""
    channels, context, pooled = WIDTHS[family]
    generator = torch.Generator().manual_seed(0)
    pictures = [{"samples": torch.randn(1, channels, 8, 8, generator=generator)} for _ in range(3)]
    captions = []
    for _ in pictures:
        more = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        captions.append([[torch.randn(1, 7, context, generator=generator), more]])
    return pictures, captions


def asked(layers: Mapping[str, nn.Module], overhead: int, itemsize: int, count: int) -> list[float]:
    """Budgets in bytes, in equal ratios: from the smallest that rank 1 everywhere fits to nine tenths of the largest."""
    adapter = models.pack("lora2.adapters.layer")
    shapes = [adapter.module_shape(module) for module in layers.values()]
    costs = [adapter.cost(shape) for shape in shapes]
    most = sum(c * models.pack("lora2.method.factors").full_rank(shape) for c, shape in zip(costs, shapes, strict=True))
    low = max(1.01 * (itemsize * sum(costs) + overhead), itemsize * max(costs) / RESOLUTION)
    high = 0.9 * (itemsize * most + overhead)
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def measure(patcher: Any, family: str, form: str, budget: float, steps: int) -> Results:
    """Train with a budget of so many bytes; the file's size."""
    session, settings = models.pack("nodes.runs.run"), models.pack("lora2.config").TrainingConfig
    told = settings(steps=steps, budget_mb=budget / 1e6, settle_at=FORMS[form], learning_rate=1e-3, seed=steps)
    pictures, captions = dataset(family)
    request = session.RunRequest(save_name="evidence/budget", layers="attention")
    trained = session.train(patcher, pictures, captions, told, request, say=lambda _: None)
    asked_for, got = int(budget), trained.path.stat().st_size
    ranks = [len(t) for key, t in trained.lora.items() if key.endswith(("lora_down.weight", "lora_A.weight"))]
    return {
        "family": family, "form": form, "steps": steps, "asked": asked_for, "file": got,
        "ranks": [min(ranks), max(ranks)], "share": round(got / budget, 5),
    }  # fmt: skip


def run(full: bool) -> Results:
    """Small models with random weights, through the node's own bridge, from checks to file."""
    models.import_comfy()
    import comfy.sd
    import folder_paths

    from dev import assets

    runs = []
    kept = folder_paths.folder_names_and_paths.get("loras")
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
        try:
            for family, count in {"flux": BUDGETS, "sd15": BUDGETS if full else 3}.items():
                patcher = comfy.sd.load_diffusion_model(str(assets.family(family)))
                layers = models.pack("nodes.comfy.layers").select_layers(patcher.model, "attention")
                overhead = _overhead(patcher, layers)
                for form in FORMS:
                    for budget in asked(layers, overhead, 2, count):
                        runs.append(measure(patcher, family, form, budget, 12 if full else 8))
                        print(runs[-1], file=sys.stderr, flush=True)
        finally:
            if kept is not None:
                folder_paths.folder_names_and_paths["loras"] = kept
    return {"steps": 12 if full else 8, "runs": runs}


def _overhead(patcher: Any, layers: Mapping[str, nn.Module]) -> int:
    """The bytes of a file that are not factors, as the bridge reckons them for a run with a budget."""
    host, saving = models.pack("nodes.comfy.layers"), models.pack("nodes.runs.lora_file")
    settings, adapter = models.pack("lora2.config").TrainingConfig, models.pack("lora2.adapters.layer")
    prefixes, style = host.file_prefixes(patcher.model, list(layers))
    info = saving.LoraFile(prefixes, style, "", "epsilon", (64, 64), torch.float16)
    shapes = {name: adapter.module_shape(module) for name, module in layers.items()}
    return int(info.overhead(shapes, "budget", settings(budget_mb=1.0).to_dict()))


def errors(runs: list[Results]) -> list[float]:
    """How far each file is from its budget, as a share of it."""
    return [abs(run["file"] - run["asked"]) / run["asked"] for run in runs]


def overshoots(runs: list[Results]) -> list[float]:
    """How far each file is above its budget, as a share of it; 0 below."""
    return [max(0, run["file"] - run["asked"]) / run["asked"] for run in runs]


def claims(results: Results) -> list[Claim]:
    """Within 2 % of what was asked, never above it."""
    found = []
    for form in FORMS:
        runs = chosen(results["runs"], form=form)
        found.append(Claim(f"budget, {form}: the file's distance from it, as a share", max(errors(runs)), CLOSE))
        found.append(Claim(f"budget, {form}: the file above it, as a share", max(overshoots(runs)), 0.0))
    return found


def summary(results: Results) -> Results:
    """The worst of all."""
    runs = results["runs"]
    return {
        "worst_error": round(max(errors(runs)), 5),
        "worst_overshoot": round(max(overshoots(runs)), 5),
        "runs": len(runs),
    }


def page(results: Results, folder: Path) -> str:
    """Budgets asked for, and files."""
    runs = results["runs"]
    families = list(dict.fromkeys(run["family"] for run in runs))
    series = []
    for form in FORMS:
        own = sorted(chosen(runs, form=form), key=lambda run: run["asked"])
        at, share = (
            [run["asked"] / 1e6 for run in own],
            [100 * (run["asked"] - run["file"]) / run["asked"] for run in own],
        )
        series.append(Series(form, at, share, line=False, colour=COLOURS[form]))
    Plot(
        "How far the file stays below its budget", "budget in MB", "% of the budget", series,
        x_log=10, limit=(2.0, "2 %"), y_range=(0.0, 2.4),
    ).save(folder / "budget.png")  # fmt: skip
    rows = []
    for family in families:
        for form in FORMS:
            own = chosen(runs, family=family, form=form)
            low, high = min(r["asked"] for r in own), max(r["asked"] for r in own)
            rows.append(
                [family, form, len(own), f"{in_words(low)} to {in_words(high)}", f"{100 * max(errors(own)):.2f} %",
                 "never" if not max(overshoots(own)) else f"{100 * max(overshoots(own)):.2f} %"]
            )  # fmt: skip
    return "\n\n".join(
        [
            "## A budget is met",
            "Ten budgets in equal ratios for each small model with random weights, from the smallest that fits rank 1 in every "
            "layer to nine tenths of full rank everywhere, fp16. Where a position of the largest layer is more than 2 % of that "
            "smallest one, they start higher: a file of whole positions cannot come closer. What counts is the file on the disk "
            "with its header and metadata. Settled runs are cut to the budget by what the layers learned. In the paper's form a "
            "budget steers the ranks, and where they come to rest all are scaled together to meet it.",
            table(["model", "form", "budgets", "sizes", "furthest below", "above"], rows),
            "![How far the file stays below its budget](budget.png)",
            "The distance is the header: its length is known for certain only when the ranks are, and so is "
            "reckoned at its longest; what a layer that a cut has dropped would have taken of it is given to the others. It "
            "matters in files of some 100 KB only.",
        ]
    )


if __name__ == "__main__":
    from benchmarks.evidence import budgets

    raise SystemExit(main(budgets))

"""Time and memory of a training step beside the frozen model's: `make bench`, on whatever device there is.

On a GPU: SDXL's UNet (2.57 B parameters, random weights, bf16), 1024², batch 1, attention q/k/v/o, mean rank 64. On a CPU:
the small models of the tests. Prints a table and writes docs/benchmarks/speed.json and speed.md (--out for elsewhere).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import models

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 20


class Row(dict[str, Any]):
    """One line of the table."""


def frozen_step(patcher: Any, sample: models.Sample, graph: bool) -> tuple[float, float]:
    """Milliseconds and peak GiB of the frozen model's forward and backward, the limit of what training can reach."""
    import comfy.model_management as management
    import torch

    weights, blocks = models.pack("nodes.host.weights"), models.pack("nodes.host.checkpointing")
    model = patcher.model
    management.load_models_gpu([patcher])
    model.to(patcher.load_device)
    fresh()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        weights.trainable_weights(model),
        blocks.inputs_of_norms_kept(model.diffusion_model),
    ):
        management.in_training = True
        x = sample.latent.to(patcher.load_device).requires_grad_()
        conditioning = {k: v.to(patcher.load_device) for k, v in sample.conditioning.items()}
        sigma = torch.ones(len(x), device=x.device)

        def work() -> None:
            x.grad = None
            model.apply_model(x, sigma, **conditioning).square().mean().backward()

        try:
            return timed(recorded(work) if graph else work)
        finally:
            management.in_training = False


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """The same work as a CUDA graph's replay."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Median milliseconds of a call, and peak GiB since `fresh` (nan on a CPU)."""
    import torch

    cuda = torch.cuda.is_available()
    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS if cuda else 5):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")


def fresh() -> None:
    """Give back what was cached and start a new peak; a graph's memory is taken while it is recorded, not when replayed."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def our_step(patcher: Any, sample: models.Sample, graphs: bool, **changes: Any) -> tuple[float, float, float]:
    """Median and mean milliseconds of our own loop's steps through the host bridge, and peak GiB.

    The mean counts recording steps anew when arrays were resized; the first third (warm-up, first recording) is left out.
    """
    import torch

    session, trainer = models.pack("nodes.host.session"), models.pack("lora2.trainer")
    engine = models.pack("lora2.engine")
    cuda = torch.cuda.is_available()
    steps = 60 if cuda and graphs else 15
    settings = {"learning_rate": 1e-4, "target_rank": sample.rank, "initial_rank": sample.rank, "settle_at": 1.0}
    settings |= {"steps": steps, "batch_size": len(sample.latent), **changes}
    stamps: list[float] = []

    def stamp(progress: Any) -> None:
        stamps.append(time.perf_counter())

    class Watched(trainer.Trainer):  # type: ignore[name-defined]
        def run(self: Any, on_step: Any = None) -> Any:
            if not graphs:
                self.engine = engine.Engine(self.network, self.engine.loss)
            return trainer.Trainer.run(self, stamp)

    original, session.Trainer = session.Trainer, Watched
    fresh()
    try:
        with torch.inference_mode():
            session.train(
                patcher,
                *sample.dataset(),
                models.pack("lora2.settings").Settings(**settings),
                session.Request("speed", "attention", checkpointing="off"),
            )
    finally:
        session.Trainer = original
    steady = [1e3 * (b - a) for a, b in itertools.pairwise(stamps)][steps // 3 :]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return statistics.median(steady), statistics.mean(steady), peak


def measure() -> list[Row]:
    """All rows, side by side in this run."""
    import torch

    cuda = torch.cuda.is_available()
    about = {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "comfyui": importlib.import_module("comfyui_version").__version__,
        "date": datetime.date.today().isoformat(),
    }
    rows: list[Row] = []
    for work, patcher, sample in models.works():
        table = _Table(work, about)
        if cuda:
            table.add("limit", frozen_step(patcher, sample, True))
        table.add("limit-eager", frozen_step(patcher, sample, False))
        best = "limit" if cuda else "limit-eager"
        table.add("ours", our_step(patcher, sample, cuda), best)
        table.add("ours-frozen", our_step(patcher, sample, cuda, rank_learning_rate=1e-9), best)
        if cuda:
            table.add("ours-eager", our_step(patcher, sample, False), "limit-eager")
        rows += table.rows
    return rows


class _Table:
    """The rows of one work."""

    def __init__(self, work: str, about: dict[str, str]) -> None:
        self.work, self.about = work, about
        self.rows: list[Row] = []
        self._limits: dict[str, float] = {}

    def add(self, name: str, figures: tuple[float, ...], against: str | None = None) -> None:
        """figures: (median ms, peak GiB), or (median ms, mean ms, peak GiB)."""
        ms, peak = figures[0], figures[-1]
        mean = figures[1] if len(figures) > 2 else ms
        self._limits[name] = ms
        ratio = ms / self._limits[against or name]
        row = Row(work=self.work, name=name, ms=round(ms, 1), mean_ms=round(mean, 1), limit_ratio=round(ratio, 3))
        row["peak_gib"] = None if math.isnan(peak) else round(peak, 2)
        self.rows.append(Row(row | self.about))
        print(f"{self.work:44} {name:12} {ms:8.1f} ms, mean {mean:8.1f}, {peak:6.2f} GiB, x{ratio:.2f}", flush=True)


def markdown(rows: list[Row]) -> str:
    """The page."""
    first = rows[0]
    lines = [
        "# Speed",
        "",
        f"{first['device']}, torch {first['torch']}, ComfyUI {first['comfyui']}, {first['date']}; written by "
        "benchmarks/speed.py, one run. `ms` is the median step, `mean` counts recording a step anew after arrays were "
        "resized. `ratio` is against the frozen model's own forward and backward (ours-eager against the eager one).",
        "",
        "| work | what | ms | mean ms | peak GiB | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(f"| {r['work']} | {r['name']} | {r['ms']} | {r['mean_ms']} | {r['peak_gib'] or ''} | {r['limit_ratio']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for speed.json and speed.md; on a GPU docs/benchmarks")
    out = parser.parse_args().out
    models.import_comfy()
    import folder_paths
    import torch

    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
        rows = measure()
    if out is None and torch.cuda.is_available():
        out = ROOT / "docs" / "benchmarks"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "speed.json").write_text(json.dumps(rows, indent=1) + os.linesep)
        (out / "speed.md").write_text(markdown(rows))
        print(f"written to {out}")


if __name__ == "__main__":
    main()

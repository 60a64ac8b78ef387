"""What is measured, section by section; each adds its rows to the table as soon as they are known."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import models, rivals
from benchmarks.measure import (
    GIB,
    Figures,
    Watch,
    adapter_bytes,
    allocated,
    cuda,
    fresh,
    frozen_step,
    load,
    moment_bytes,
    our_step,
    peak,
    train,
)  # fmt: skip
from benchmarks.table import Table

BYTES_PER_PARAMETER = 16
"""What the goal for memory allows an adapter parameter."""

MAIN = "SDXL 1024², batch 1, attention, rank 64"
BATCH = "SDXL 1024², batch 4, attention, rank 64"
OFFLOADED_GB = 3
OFFLOADED = "SDXL 1024², batch 1, attention, rank 64, 3 GB of the weights on the GPU"


class Bench:
    """The models, made once, and the table. until: when all has to be done, by time.monotonic."""

    def __init__(self, table: Table, folder: Path, until: float = math.inf) -> None:
        self.table, self.folder, self.until = table, folder, until
        self._sdxl: Any = None

    def left(self) -> float:
        """Seconds until all has to be done."""
        return self.until - time.monotonic()

    @property
    def sdxl(self) -> Any:
        """SDXL's UNet on the GPU."""
        if self._sdxl is None:
            import torch

            with torch.inference_mode():
                self._sdxl = models.sdxl()
        return self._sdxl

    def aside(self) -> None:
        """Free the GPU's memory for others; models wait in the CPU's."""
        import comfy.model_management as management
        import torch

        management.unload_all_models()
        if self._sdxl is not None:
            with torch.inference_mode():
                self._sdxl.model.to("cpu")
        fresh()

    def drop(self) -> None:
        """Forget the models."""
        import comfy.model_management as management

        self._sdxl = None
        management.unload_all_models()
        fresh()

    def ours(self, work: str, name: str, against: str, patcher: Any, sample: models.Sample, **told: Any) -> Watch:
        """A row of our own steps."""
        figures, watch = our_step(patcher, sample, **told)
        limit = next((r for r in self.table.rows if r["work"] == work and r["name"] == against), None)
        if limit and limit["peak_gib"]:
            goal = 1.05 * (limit["peak_gib"] + BYTES_PER_PARAMETER * watch.held / GIB)
            figures.more["peak_goal_gib"] = round(goal, 2)
        self.table.add(work, name, figures, against, **figures.more)
        return watch


def step(bench: Bench) -> None:
    """A step of SDXL at 1024², batch 1, beside the limit; on a CPU, of small models."""
    if not cuda():
        for family, side in (("sd15", 8), ("flux", 16)):
            _small_step(bench, f"small {family}, rank 16", models.small(family), models.sample_for(family, side, side))
        return
    patcher, sample = bench.sdxl, models.sample_for("sdxl", 128, 128)
    bench.table.add(MAIN, "limit", frozen_step(patcher, sample, True), "limit")
    watch = bench.ours(MAIN, "ours", "limit", patcher, sample, steps=200, rank=64)
    stamps, (held, everything) = [at - watch.start for at, done in watch.stamps if done], watch.base
    bench.table.add(
        "Start of a run, SDXL 1024², model loaded", "ours", None,
        first_step_s=round(stamps[0], 2), fifth_step_s=round(stamps[4], 2),
        base_gib=round(held / GIB, 2), all_but_the_adapter_gib=round(everything / GIB, 2),
        base_weights_held=round(everything / held, 3),
    )  # fmt: skip
    bench.ours(MAIN, "ours-frozen", "limit", patcher, sample, steps=60, rank=64, rank_learning_rate=1e-6)


def eager(bench: Bench) -> None:
    """The same step, launched kernel by kernel."""
    if cuda():
        patcher, sample = bench.sdxl, models.sample_for("sdxl", 128, 128)
        bench.table.add(MAIN, "limit-eager", frozen_step(patcher, sample, False), "limit-eager")
        bench.ours(MAIN, "ours-eager", "limit-eager", patcher, sample, steps=12, rank=64, graphs=False)


@contextlib.contextmanager
def left_for_weights(gigabytes: float) -> Iterator[None]:
    """While inside, ComfyUI loads this many GB of a model's weights and leaves the rest with the CPU, as with --reserve-vram."""
    import comfy.model_management as management

    usual = management.EXTRA_RESERVED_VRAM
    inference = management.minimum_inference_memory() - usual
    management.EXTRA_RESERVED_VRAM = max(usual, int(management.get_free_memory() - inference - gigabytes * 1e9))
    try:
        yield
    finally:
        management.EXTRA_RESERVED_VRAM = usual


def offloaded(bench: Bench) -> None:
    """SDXL with a part of its weights in the CPU's memory, from where each is copied when it is needed."""
    if not cuda():
        return
    patcher, sample = bench.sdxl, models.sample_for("sdxl", 128, 128)
    for checkpointing in (False, True):
        bench.aside()
        with left_for_weights(OFFLOADED_GB):
            work = OFFLOADED + (", checkpointing" if checkpointing else "")
            ours: dict[str, Any] = {"steps": 20, "rank": 64, "checkpointing": "on" if checkpointing else "off"}
            for name, graph in (("limit-eager", False), ("limit", True)):
                figures = frozen_step(patcher, sample, graph, checkpointing, repeats=10, whole=False)
                bench.table.add(work, name, figures, name, loaded_gib=round(patcher.loaded_size() / GIB, 2))
            for name, against, graphs in (("ours", "limit", True), ("ours-eager", "limit-eager", False)):
                if graphs or not checkpointing:  # launched one by one, a run of those would take half a minute
                    bench.ours(work, name, against, patcher, sample, graphs=graphs, **ours)
                    bench.table.rows[-1]["loaded_gib"] = round(patcher.loaded_size() / GIB, 2)
    bench.aside()


def everything(bench: Bench) -> None:
    """The same step on all layers, as TrainLoraNode adapts them."""
    if cuda():
        patcher, sample = bench.sdxl, models.sample_for("sdxl", 128, 128)
        bench.ours(
            MAIN, "ours-all-layers", "limit", patcher, sample, steps=60, rank=64, layers="all linear + convolution"
        )


TURNS = 5
"""How often steps on a CPU are measured by turns: other programs change its pace from second to second."""


def _small_step(bench: Bench, work: str, patcher: Any, sample: models.Sample) -> None:
    """The frozen step and ours by turns; ratios are medians of each turn's own."""
    told: dict[str, dict[str, Any]] = {"ours-eager": {}, "ours-frozen": {"rank_learning_rate": 1e-6}}
    limits: list[float] = []
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in told}
    for _ in range(TURNS):
        for name, changes in told.items():
            before = frozen_step(patcher, sample, False).ms
            figures, _watch = our_step(patcher, sample, steps=20, rank=16, **changes)
            limit = (before + frozen_step(patcher, sample, False).ms) / 2
            limits.append(limit)
            seen[name].append((figures.ms, figures.ms / limit))
    bench.table.add(work, "limit-eager", Figures(statistics.median(limits)), "limit-eager")
    for name, turns in seen.items():
        ms, ratio = (statistics.median(values) for values in zip(*turns, strict=True))
        bench.table.add(work, name, Figures(ms), "limit-eager", limit_ratio=round(ratio, 3), turns=TURNS)


def trainlora(bench: Bench) -> None:
    """ComfyUI's own trainer on the same work."""
    if cuda():
        bench.table.add(
            MAIN, "trainlora", rivals.trainlora_step(bench.sdxl, models.sample_for("sdxl", 128, 128), 64), "limit"
        )


def peft(bench: Bench) -> None:
    """PEFT on the same work."""
    if cuda():
        bench.aside()
        bench.table.add(MAIN, "peft", rivals.peft_step(models.sample_for("sdxl", 128, 128), 64), "limit")


def batch(bench: Bench) -> None:
    """A step of SDXL at 1024², batch 4."""
    if cuda():
        patcher, sample = bench.sdxl, models.sample_for("sdxl", 128, 128, batch=4)
        bench.table.add(BATCH, "limit", frozen_step(patcher, sample, True), "limit")
        bench.ours(BATCH, "ours", "limit", patcher, sample, steps=60, rank=64)
        bench.table.add(BATCH, "limit-eager", frozen_step(patcher, sample, False, repeats=8), "limit-eager")
        bench.ours(BATCH, "ours-eager", "limit-eager", patcher, sample, steps=10, rank=64, graphs=False)


def buckets(bench: Bench) -> None:
    """Three shapes in one run, each over its own limit, after its first visits."""
    if cuda():
        patcher, base, shapes, scale = (
            bench.sdxl,
            models.sample_for("sdxl", 128, 128),
            ((128, 128), (104, 152), (152, 104)),
            8,
        )
    else:
        patcher, base, shapes, scale = (
            models.small("sd15"),
            models.sample_for("sd15", 8, 8),
            ((8, 8), (8, 12), (12, 8)),
            8,
        )
    name = "SDXL" if cuda() else "small sd15"
    samples = [base.sized(*shape) for shape in shapes]
    limits = [frozen_step(patcher, sample, cuda()) for sample in samples]
    watch = Watch()
    latents = [{"samples": s.latent} for s in samples for _ in range(2)]
    rank, steps = (64, 90) if cuda() else (16, 30)
    train(
        patcher, (latents, [[base.caption]] * len(latents)), watch,
        target_rank=rank, initial_rank=rank, settle_at=1.0, steps=steps,
    )  # fmt: skip
    at_most = peak()
    for shape, limit in zip(shapes, limits, strict=True):
        times = [ms for seen, ms in watch.steps(0) if seen[-2:] == shape][4:]
        work = f"{name} bucketed, {shape[1] * scale} × {shape[0] * scale}, rank {rank}"
        kind = "limit" if cuda() else "limit-eager"
        bench.table.add(work, kind, limit, kind)
        figures = Figures(statistics.median(times), at_most, statistics.mean(times), {"visits": len(times)})
        bench.table.add(work, "ours", figures, kind, recordings=watch.recordings)


def falling(bench: Bench) -> None:
    """What memory does when ranks fall from 128 to 16 during the run."""
    patcher = bench.sdxl if cuda() else models.small("sd15")
    sample = models.sample_for("sdxl", 128, 128) if cuda() else models.sample_for("sd15", 8, 8)
    watch, seen = Watch(), list[tuple[int, int, int, int]]()

    def look(trainer: Any) -> None:
        if len(watch.stamps) in (4, steps - 1):
            fresh_bytes = adapter_bytes(trainer.network) + moment_bytes(trainer.optimizer)
            seen.append((watch.held, fresh_bytes, allocated(), trainer.network.size()))

    steps = 120
    watch.on_step = look
    train(
        patcher, sample.dataset(), watch, initial_rank=128, target_rank=16, settle_at=1.0, steps=steps, sync_every=10,
        rank_learning_rate=0.05, rank_weight=100.0, entropy_weight=0.0,
    )  # fmt: skip
    before, after = seen[0], seen[-1]
    removed = 1 - after[3] / before[3]
    bench.table.add(
        f"{'SDXL 1024²' if cuda() else 'small sd15'}, ranks fall from 128 to 16", "ours", None,
        held_before_gib=round(before[1] / GIB, 4), held_after_gib=round(after[1] / GIB, 4),
        allocated_before_gib=round(before[2] / GIB, 3), allocated_after_gib=round(after[2] / GIB, 3),
        rank_removed=round(removed, 4), share_that_fell=round((1 - after[1] / before[1]) / removed, 4),
        recordings=watch.recordings,
    )  # fmt: skip


@contextlib.contextmanager
def allowed(gigabytes: float) -> Iterator[None]:
    """While inside, torch may hold this many GB (10⁹ bytes) of the GPU's memory, and no more."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    fresh()
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _tight(bench: Bench, work: str, patcher: Any, sample: models.Sample, gigabytes: float, steps: int) -> None:
    """The node's defaults with gradient checkpointing, settling included, within so much memory."""
    import torch

    load(patcher)
    with allowed(gigabytes):
        bench.table.add(work, "limit", frozen_step(patcher, sample, True, checkpointing=True, repeats=8), "limit")
        watch = Watch()
        try:
            train(patcher, sample.dataset(), watch, checkpointing="on", steps=steps)
        except Exception:
            most = f"{peak():.2f} GiB in tensors, {torch.cuda.max_memory_reserved() / GIB:.2f} GiB reserved"
            print(f"-- {work}: at most {most}, {watch.recordings} recordings", flush=True)
            raise
        times = [ms for _, ms in watch.steps(4)]
        figures = Figures(statistics.median(times), peak(), statistics.mean(times))
        bench.table.add(
            work, "ours", figures, "limit", adapter_parameters=watch.held, recordings=watch.recordings,
            reserved_gib=round(torch.cuda.max_memory_reserved() / GIB, 2), allowed_gb=gigabytes,
        )  # fmt: skip


def eight(bench: Bench) -> None:
    """SDXL in 8 GB."""
    if cuda():
        sample = models.sample_for("sdxl", 128, 128)
        _tight(bench, "SDXL 1024², batch 1, checkpointing, 8 GB allowed", bench.sdxl, sample, 8, 24)


def flux(bench: Bench) -> None:
    """A Flux of 12 B parameters in fp8, in 24 GB."""
    if cuda():
        import torch

        bench.drop()
        with torch.inference_mode():
            patcher = models.flux()
        sample = models.sample_for("flux", 128, 128, tokens=512)
        _tight(bench, "Flux 12 B, fp8, 1024², batch 1, checkpointing, 24 GB allowed", patcher, sample, 24, 16)
        del patcher
        bench.drop()


def flat(bench: Bench) -> None:
    """2,000 steps of a small model, 600 where time is short: do steps slow down, does memory grow?"""
    steps = 120 if not cuda() else 2000 if bench.left() > 50 else 600
    patcher, sample = models.small("sd15"), models.sample_for("sd15", 8, 8)
    watch, held = Watch(), list[int]()

    def look(trainer: Any) -> None:
        if trainer.progress.step in (steps // 4, steps - 2):  # while the last step's memory is still held
            held.append(allocated())

    watch.on_step = look
    train(patcher, sample.dataset(), watch, steps=steps, target_rank=8, settle_at=0.1)
    times = [ms for _, ms in watch.steps(steps // 4)]
    third = len(times) // 3
    first, last = statistics.median(times[:third]), statistics.median(times[-third:])
    bench.table.add(
        f"small sd15, {steps} steps", "ours", Figures(statistics.median(times), peak(), statistics.mean(times)),
        second_quarter_ms=round(first, 3), last_quarter_ms=round(last, 3), last_over_second=round(last / first, 3),
        grown_bytes=held[-1] - held[0],
    )  # fmt: skip


def loading(bench: Bench) -> None:
    """Our loader beside ComfyUI's, on a file of 0.4 GB, turn by turn. Loading only registers patches: a CPU needs no weights."""
    import comfy.sd
    import comfy.utils
    import torch
    from safetensors.torch import save_file

    node = models.pack("nodes.load").NODES[0].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    with torch.inference_mode():
        patcher = bench.sdxl if cuda() else models.sdxl(device="meta")
    layers = models.pack("nodes.comfy.layers")
    chosen = layers.select_layers(patcher.model, "attention")
    prefixes, _ = layers.file_prefixes(patcher.model, list(chosen))
    rank, tensors = 138, {}
    with torch.inference_mode():
        for name, module in chosen.items():
            tensors[f"{prefixes[name]}.lora_down.weight"] = torch.randn(rank, module.in_features).half() * 0.01
            tensors[f"{prefixes[name]}.lora_up.weight"] = torch.randn(module.out_features, rank).half() * 0.01
            tensors[f"{prefixes[name]}.alpha"] = torch.tensor(float(rank))
        path = bench.folder / "speed_load.safetensors"
        save_file(tensors, path)
        size = path.stat().st_size
        del tensors

        def theirs() -> Any:  # nodes.py, LoraLoader.load_lora with nothing in its cache
            lora, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
            return comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0, lora_metadata=metadata)[0]

        def ours() -> Any:
            return node.execute(model=patcher, lora_name=path.name, strength_model=1.0, strength_clip=0.0).result[0]

        times: dict[str, list[float]] = {"theirs": [], "ours": []}
        for turn in range(61):
            for name, work in (("theirs", theirs), ("ours", ours))[:: 1 if turn % 2 else -1]:
                gc.collect()  # else either pays for giving back what the other had loaded
                start = time.perf_counter()
                loaded = work()
                took = 1e3 * (time.perf_counter() - start)
                del loaded
                if turn:
                    times[name].append(took)
    path.unlink()
    our_ms, their_ms = (statistics.median(times[k]) for k in ("ours", "theirs"))
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["theirs"], strict=True))
    bench.table.add(
        f"Loading an adapter of {size / 1e9:.2f} GB", "ours", Figures(our_ms),
        loraloader_ms=round(their_ms, 1), over_loraloader=round(ratio, 3),
    )  # fmt: skip


def profile(bench: Bench) -> None:
    """The kernels of a step, longest first, into profile.txt; adds no row."""
    if not cuda():
        return
    import torch
    from torch.profiler import ProfilerActivity

    seen: dict[str, Any] = {}
    first, last = 30, 33

    def look(trainer: Any) -> None:
        done = len(watch.stamps)
        if done == first:
            torch.cuda.synchronize()
            seen["p"] = torch.profiler.profile(activities=[ProfilerActivity.CUDA])
            seen["p"].__enter__()
        if done == last:
            torch.cuda.synchronize()
            seen["p"].__exit__(None, None, None)

    watch = Watch(on_step=look)
    sample = models.sample_for("sdxl", 128, 128)
    train(bench.sdxl, sample.dataset(), watch, target_rank=64, initial_rank=64, settle_at=1.0, steps=36, sync_every=50)
    events, count = seen["p"].key_averages(), last - first
    lines = [f"{sum(e.self_device_time_total for e in events) / 1e3 / count:.2f} ms of kernels a step, "
             f"{sum(e.count for e in events) / count:.0f} launches"]  # fmt: skip
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:60]:
        lines.append(f"{e.self_device_time_total / 1e3 / count:8.3f} ms {e.count / count:7.0f}  {e.key[:150]}")
    print("\n".join(lines[:40]), flush=True)
    if bench.table.path is not None:
        bench.table.path.with_name("profile.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "step": (step, 110),
    "eager": (eager, 40),
    "offloaded": (offloaded, 120),
    "everything": (everything, 50),
    "peft": (peft, 60),
    "trainlora": (trainlora, 60),
    "buckets": (buckets, 60),
    "batch": (batch, 70),
    "falling": (falling, 45),
    "loading": (loading, 45),
    "eight": (eight, 45),
    "flux": (flux, 110),
    "flat": (flat, 70),
    "profile": (profile, 60),
}
"""What is measured, in the order of worth, and the seconds on a GPU after which a section is given up. `flux` drops the model
that the others share; `profile` only when asked for by name."""


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A folder for LoRA files and whatever else is written, known to ComfyUI while inside."""
    import folder_paths

    loras, output = folder_paths.folder_names_and_paths["loras"], folder_paths.get_output_directory()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
        folder_paths.filename_list_cache.pop("loras", None)
        folder_paths.set_output_directory(folder)
        try:
            yield Path(folder)
        finally:
            folder_paths.folder_names_and_paths["loras"] = loras
            folder_paths.set_output_directory(output)

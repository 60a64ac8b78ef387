"""Milliseconds and memory of the frozen model's step, and of our own loop's steps through the host bridge."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import models

REPEATS = 15
GIB = 2**30


@dataclass
class Figures:
    """What one way of working took: median and mean milliseconds of a step, peak GiB (nan on a CPU), and what else was seen."""

    ms: float
    peak: float = math.nan
    mean: float | None = None
    more: dict[str, Any] = field(default_factory=dict)


def cuda() -> bool:
    """Whether there is a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def allocated() -> int:
    """Bytes of the GPU's memory that tensors hold; 0 on a CPU."""
    import torch

    return torch.cuda.memory_allocated() if cuda() else 0


def peak() -> float:
    """Peak GiB since `fresh`; nan on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() / GIB if cuda() else math.nan


def fresh() -> None:
    """Give back what was cached and start a new peak.

    cuBLAS keeps 32 MiB for every stream that it was ever used on: a graph that was recorded before would count.
    """
    import torch

    gc.collect()
    if cuda():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def load(patcher: Any, whole: bool = True, memory: float = 0) -> Any:
    """The model on its device, in a node's way, which leaves so many bytes free. whole: all of it, whatever ComfyUI would do."""
    import comfy.model_management as management
    import torch

    with torch.inference_mode():
        management.load_models_gpu([patcher], memory_required=memory)
    if whole:
        patcher.model.to(patcher.load_device)
    return patcher.model


def frozen_step(
    patcher: Any,
    sample: models.Sample,
    graph: bool,
    checkpointing: bool = False,
    repeats: int | None = None,
    whole: bool = True,
) -> Figures:
    """The frozen model's forward and backward, the limit of what training can reach. whole: see `load`."""
    import comfy.model_management as management
    import torch

    weights, blocks = models.pack("nodes.comfy.weights"), models.pack("nodes.comfy.checkpointing")
    fresh()
    model = load(patcher, whole, 0 if whole else 2 * patcher.model.memory_required(list(sample.latent.shape)))
    fresh()
    recomputed = blocks.repeated_blocks(model.diffusion_model) if checkpointing else []
    norms = model.diffusion_model if "num_res_blocks" not in model.model_config.unet_config else torch.nn.Identity()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        weights.offloaded_weights_pinned(patcher),
        weights.trainable_weights(model, patcher.load_device),
        blocks.checkpointed(recomputed),
        blocks.norm_inputs_copied(norms),
    ):
        management.in_training = True
        x = sample.latent.to(patcher.load_device).requires_grad_()
        conditioning = {k: v.to(patcher.load_device) for k, v in sample.conditioning.items()}
        sigma = torch.ones(len(x), device=x.device)

        def work() -> None:
            x.grad = None
            model.apply_model(x, sigma, **conditioning).square().mean().backward()

        try:
            return timed(recorded(work) if graph else work, repeats)
        finally:
            management.in_training = False


def recorded(work: Callable[[], None]) -> Callable[[], None]:
    """The same work as a CUDA graph's replay."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def timed(work: Callable[[], Any], repeats: int | None = None) -> Figures:
    """Median milliseconds of a call after three, and peak GiB since `fresh`."""
    import torch

    for _ in range(3):
        work()
    times = []
    for _ in range(repeats or (REPEATS if cuda() else 5)):
        if cuda():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if cuda():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return Figures(statistics.median(times), peak())


@dataclass
class Watch:
    """What is seen of a run while it trains.

    stamps: the time after every step, and how many steps were known to be done. shapes: of every step's latents. held: the most
    parameters that the adapters' arrays held. base: bytes of base weights, and of everything but the adapters before the first
    step. recordings: how often anything was recorded as a graph; recording: the seconds that it took.
    """

    start: float = 0.0
    stamps: list[tuple[float, int]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    held: int = 0
    mean_rank: float = 0.0
    recordings: int = 0
    recording: float = 0.0
    base: tuple[int, int] = (0, 0)
    on_step: Callable[[Any], None] | None = None
    """Called with the trainer after every step."""

    def steps(self, first: int) -> list[tuple[tuple[int, ...], float]]:
        """(shape, milliseconds) of every step from the first on.

        On a GPU the loop runs a step ahead: what passes between two stamps is the step that became known to be done.
        """
        out = []
        for (a, before), (b, done) in itertools.pairwise(self.stamps):
            if done > first and done == before + 1:
                out.append((self.shapes[done - 1], 1e3 * (b - a)))
        return out


def adapter_bytes(network: Any) -> int:
    """Bytes of factors, working copies and gradient sums of all layers; each storage once."""
    tensors = [t for a in network.adapters for t in (a.down, a.up, a.importance, *(a.working or ()))]
    tensors += [t.grad for a in network.adapters for t in (a.down, a.up) if t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def moment_bytes(optimizer: Any) -> int:
    """Bytes of the optimizer's moments; each storage once."""
    import torch

    tensors = [v for s in optimizer.inner.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights; each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def train(
    patcher: Any,
    dataset: tuple[list[dict[str, Any]], list[Any]],
    watch: Watch,
    graphs: bool = True,
    layers: str = "attention",
    checkpointing: str = "off",
    **settings: Any,
) -> Any:
    """Our own training of this dataset, watched; nothing is saved, neither states nor a LoRA.

    settings: of lora2.config.TrainingConfig, which also gives the defaults.
    """
    import torch

    session, trainer = models.pack("nodes.runs.run"), models.pack("lora2.training.trainer")
    finishing = models.pack("nodes.runs.finish")
    engine = models.pack("lora2.training.cuda_graph")

    class Watched(trainer.Trainer):  # type: ignore[name-defined]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **(named if graphs else {**named, "graphs": False}))
            model, draw = patcher.model, self.batches.sample
            watch.base = (weight_bytes(model), allocated() - adapter_bytes(self.network) - watch.base[1])

            def drawn() -> Any:
                batch = draw()
                watch.shapes.append(tuple(batch[0].shape))
                return batch

            self.batches.sample = drawn

        def run(self, *_given: Any, **_named: Any) -> Any:  # without live pictures and states
            def seen(progress: Any) -> None:
                watch.stamps.append((time.perf_counter(), progress.step))
                if progress.step % 10 == 1 or progress.step == progress.steps:
                    adapters = self.network.adapters
                    watch.held = max(watch.held, sum(a.capacity * a.cost for a in adapters))
                    ranks = [progress.ranks[n] * a.cost for n, a in zip(self.network.names, adapters, strict=True)]
                    watch.mean_rank = sum(ranks) / sum(a.cost for a in adapters)
                if watch.on_step is not None:
                    watch.on_step(self)

            return super().run(seen)

    def record(self: Any, work: Any) -> Any:
        watch.recordings += 1
        begun = time.perf_counter()
        try:
            return original(self, work)
        finally:
            watch.recording += time.perf_counter() - begun

    def save_nothing(trainer: Any, _plan: Any) -> Any:
        return session.TrainedLora(None, Path(), "nothing", trainer.progress.losses)

    original, own = engine.GraphStepRunner._record, session.Trainer
    saves = finishing.save_trained, finishing.CheckpointWriter.save
    session.Trainer, engine.GraphStepRunner._record = Watched, record
    finishing.save_trained, finishing.CheckpointWriter.save = save_nothing, lambda self: False
    fresh()
    watch.base = (0, allocated() - (weight_bytes(patcher.model) if next(patcher.model.parameters()).is_cuda else 0))
    watch.start = time.perf_counter()
    try:
        with torch.inference_mode():
            return session.train(
                patcher,
                *dataset,
                models.pack("lora2.config").TrainingConfig(**{"learning_rate": 1e-4, **settings}),
                session.RunRequest("speed", layers, checkpointing=checkpointing, state_every=0),
            )
    finally:
        session.Trainer, engine.GraphStepRunner._record = own, original
        finishing.save_trained, finishing.CheckpointWriter.save = saves


def our_step(
    patcher: Any, sample: models.Sample, steps: int, rank: int, graphs: bool = True, **changes: Any
) -> tuple[Figures, Watch]:
    """Median and mean milliseconds of a run's steps, without its first fifth (warm-up and first recording), and the peak.

    The mean counts recording steps anew after arrays were resized.
    """
    watch = Watch()
    told = {
        "target_rank": rank,
        "initial_rank": rank,
        "settle_at": 1.0,
        "steps": steps,
        "batch_size": len(sample.latent),
    }
    train(patcher, sample.dataset(), watch, graphs, **{**told, **changes})
    times = [ms for _, ms in watch.steps(max(4, steps // 5))]
    more = {
        "adapter_parameters": watch.held,
        "mean_rank": round(watch.mean_rank, 1),
        "recordings": watch.recordings,
        "recording_s": round(watch.recording, 2),
        "steps": steps,
    }
    return Figures(statistics.median(times), peak(), statistics.mean(times), more), watch

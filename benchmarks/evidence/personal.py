"""One adaptation of the small drawing model to one subject, measured: what the experiments on subjects are made of.

Every method trains the same attention layers with the same optimizer, schedule, batches and noise; a plain LoRA of fixed
rank has Λ = 1, A ~ N(0, 1 / (3 d_in)), B = 0, alpha = rank. Measured on pictures of the subject at places where it was
never trained: the denoising loss, in v, over fixed noise and σ; and the same of the world's other pictures, the drift.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence import measuring
from benchmarks.evidence.cuts import CUTS, Factors, size_of
from benchmarks.evidence.measuring import attached, measured, rounded
from benchmarks.evidence.needs import in_use
from benchmarks.evidence.twists import twisted
from benchmarks.models import pack
from dev.painter import subjects, world
from dev.painter.sampling import Painter

HELD_OUT, OTHERS = 12, 12
"""Pictures that the losses are measured on."""

BATCH = 4
SYNC_EVERY = 20

FIXED, SETTLING, PAPER = "fixed", "settling", "paper"
"""The methods: a plain LoRA of one rank, ours, and the paper's form, whose ranks adapt to the end."""

Judge = Callable[[], dict[str, Any]]
"""Gives the loss on the subject's held-out pictures and the drift, of the model as it now is."""


@dataclass(frozen=True)
class Job:
    """What is trained. rank: of the fixed rank, or the target's. changes: of settings, as pairs.

    marks: steps after which it is measured; always at the end. twist: of the method itself (twists.py).
    """

    subject: str
    pictures: int
    method: str
    rank: int
    rate: float
    seed: int
    steps: int = 200
    changes: tuple[tuple[str, Any], ...] = ()
    marks: tuple[int, ...] = ()
    more: tuple[str, ...] = ()
    """Cuts to judge at every mark at which the file has its size."""
    twist: str = ""

    @cached_property
    def key(self) -> str:
        """The same for the same work."""
        return repr(self)


class Workbench:
    """A loaded checkpoint and everything that is measured on it."""

    def __init__(self, checkpoint: Path) -> None:
        self.painter = Painter(checkpoint)
        self.others = self._others()

    @cache  # noqa: B019 (one workbench a process)
    def subject(self, name: str) -> subjects.Subject:
        """A subject by its name."""
        return next(s for s in (*subjects.SUBJECTS, *subjects.TUNING, *subjects.GRADED) if s.name == name)

    @cache  # noqa: B019
    def dataset(self, name: str, count: int, held_out: bool) -> tuple[list[Tensor], list[Any]]:
        """A subject's pictures as latents (16, side / 8, side / 8) and captions' conditioning entries."""
        drawn = self.subject(name).pictures(count, held_out)
        latents = self.painter.latents([image for image, _ in drawn])
        return [t[0].clone() for t in latents], [self.painter.encode(caption)[0] for _, caption in drawn]

    @cache  # noqa: B019
    def _others(self) -> tuple[list[Tensor], list[Any]]:
        rng = random.Random(99)  # noqa: S311 (pictures, not secrets)
        scenes = [world.random_scene(rng) for _ in range(OTHERS)]
        latents = self.painter.latents([world.draw_scene(scene, rng) for scene in scenes])
        return [t[0].clone() for t in latents], [self.painter.encode(scene.caption)[0] for scene in scenes]

    def adapt(self, job: Job) -> dict[str, Any]:
        """Train and measure; plain values, floats with six digits.

        A run that diverges has no marks, and says so. budget: the parameters that the file may have. use: see needs.py.
        Raises KeyError for a twist that there is not.
        """
        with torch.inference_mode(False), torch.enable_grad(), twisted(job.twist):
            found = self._adapt(job)
        about = {
            "subject": job.subject, "pictures": job.pictures, "method": job.method, "rank": job.rank, "rate": job.rate,
            "seed": job.seed, "steps": job.steps, "changes": dict(job.changes), "twist": job.twist,
        }  # fmt: skip
        return {**about, **rounded(found)}

    def _adapt(self, job: Job) -> dict[str, Any]:
        bridge = pack("nodes.comfy.model")
        host = bridge.HostModel(self.painter.patcher, torch.float32)
        layers = pack("nodes.comfy.layers").select_layers(host.model, "attention", (), ())
        sets = (self.dataset(job.subject, job.pictures, False), self.dataset(job.subject, HELD_OUT, True), self.others)
        latents = [t for images, _ in sets for t in host.scale_latents(images)]
        captions = [c for _, entries in sets for c in entries]
        first, second = job.pictures, job.pictures + HELD_OUT
        with host.training(latents, captions, bridge.empty_caption(captions, None), BATCH, "off"):
            held_out = measured(host, latents, range(first, second))
            others = measured(host, latents, range(second, len(latents)))

            def judge() -> dict[str, Any]:
                return {"loss": measuring.loss(host, held_out), "drift": measuring.loss(host, others)}

            try:
                return trained(job, host, layers, latents[:first], judge)
            except pack("lora2.training.monitor").Diverged as error:
                return {"diverged": str(error), "marks": []}


def trained(
    job: Job, host: Any, layers: Mapping[str, nn.Module], latents: list[Tensor], judge: Judge
) -> dict[str, Any]:
    """Train on these pictures, judging at every mark; then judge the file, and cuts of it."""
    settings = settings_for(job)
    network = pack("lora2.adapters.network").AdaptiveNetwork(layers, settings, host.device, host.compute)
    if job.method == FIXED:
        make_plain(network, job)
    trainer = pack("lora2.training.trainer").Trainer(network, host, latents, settings)
    trainer.steps_ahead = 0  # marks are measured at their own step
    marks: list[dict[str, Any]] = []
    files: list[Factors] = []

    def file() -> Factors:
        # What a trainer of plain LoRAs writes has the order of training; ours writes every settled layer in singular order.
        return (
            network.export_factors(ordered=False)
            if job.method == FIXED
            else pack("lora2.adapters.prune").final_factors(network)[0]
        )

    def look(progress: Any) -> None:
        if progress.step in job.marks or progress.step == job.steps:
            network.refresh()
            marks.append(dict(judge(), step=progress.step, parameters=network.size()))
            files.append(file())

    def cut(kind: str, factors: Factors) -> dict[str, Any]:
        found = {}
        for size, less in CUTS[kind](factors):
            with attached(layers, less, host.device):
                found[str(size)] = dict(judge(), parameters=size_of(less))
        return found

    before = judge()
    progress = trainer.run(look)
    for mark, factors in zip(marks, files, strict=True):
        if mark["parameters"] <= network.budget:
            mark |= {kind: cut(kind, factors) for kind in job.more}
    with attached(layers, files[-1], host.device):
        last = dict(judge(), parameters=size_of(files[-1]))
    return {
        "before": before, "marks": marks, "file": last, "budget": network.budget,
        "ranks": {name: f.rank for name, f in files[-1].items()},
        "use": in_use(files[-1], trainer.optimizer.sensitivities()),
        "seconds": progress.seconds,
    }  # fmt: skip


def settings_for(job: Job) -> Any:
    """The node's settings for a job; what is not said is the node's default."""
    base = pack("lora2.config").TrainingConfig(
        steps=job.steps,
        learning_rate=job.rate,
        batch_size=BATCH,
        target_rank=job.rank,
        seed=job.seed,
        sync_every=SYNC_EVERY,
    )
    if job.method == FIXED:
        base = replace(
            base, initial_rank=job.rank, settle_at=1.0
        )  # 1: nothing is cut, and the learning rate is as given
    if job.method == PAPER:
        base = replace(base, settle_at=1.0)
    return replace(base, **dict(job.changes))


def make_plain(network: Any, job: Job) -> None:
    """Turn a network that has not begun into a plain LoRA of one rank: Λ = 1, B = 0."""
    generator = torch.Generator().manual_seed(job.seed)
    network.pruned = True
    for adapter in network.adapters:
        fan_in = math.prod(adapter.shape[1:])
        rank = min(job.rank, fan_in, adapter.shape[0])
        down = torch.randn(rank, *adapter.shape[1:], generator=generator) / math.sqrt(3 * fan_in)
        adapter.load(pack("lora2.method.factors").Factors(torch.zeros(adapter.shape[0], rank), down))
    network.rebuild()

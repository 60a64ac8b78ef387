"""One adaptation of the small drawing model to one subject, measured: what the experiments on subjects are made of.

Every method trains the same attention layers with the same optimizer, schedule, batches and noise; a plain LoRA of fixed
rank has Λ = 1, A ~ N(0, 1 / (3 d_in)), B = 0, alpha = rank. Measured on pictures of the subject at places where it was
never trained: the denoising loss, in v, over fixed noise and σ; and the same of the world's other pictures, the drift.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import pack
from dev.painter import subjects, world
from dev.painter.sampling import Painter

HELD_OUT, OTHERS = 12, 12
"""Pictures that the losses are measured on."""

SIGMAS = (0.15, 0.35, 0.55, 0.75, 0.92)
BATCH = 4
SYNC_EVERY = 20

FIXED, SETTLING, PAPER = "fixed", "settling", "paper"
"""The methods: a plain LoRA of one rank, ours, and the paper's form, whose ranks adapt to the end."""

Factors = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What is trained. rank: of the fixed rank, or the target's. changes: of settings, as pairs.

    marks: steps after which it is measured; always at the end.
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
    """Cuts to judge at every mark."""

    @property
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
        return next(s for s in (*subjects.SUBJECTS, *subjects.TUNING) if s.name == name)

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
        """Train and measure; plain values."""
        with torch.inference_mode(False), torch.enable_grad():
            return self._adapt(job)

    def _adapt(self, job: Job) -> dict[str, Any]:
        bridge, network_module, trainer_module = pack("nodes.host.model"), pack("lora2.network"), pack("lora2.trainer")
        host = bridge.HostModel(self.painter.patcher, torch.float32)
        layers = pack("nodes.host.layers").select_layers(host.model, "attention", (), ())
        settings = settings_for(job)
        sets = (self.dataset(job.subject, job.pictures, False), self.dataset(job.subject, HELD_OUT, True), self.others)
        latents = [t for images, _ in sets for t in host.scale_latents(images)]
        captions = [c for _, entries in sets for c in entries]
        first, second = job.pictures, job.pictures + HELD_OUT
        marks: list[dict[str, Any]] = []
        kept: list[Factors] = []
        with host.training(latents, captions, bridge.empty_caption(captions, None), BATCH, "off"):
            network = network_module.AdaptiveNetwork(layers, settings, host.device, host.compute)
            if job.method == FIXED:
                make_plain(network, job)
            trainer = trainer_module.Trainer(network, host, latents[:first], settings)
            trainer._ahead = 0  # marks are measured at their own step
            held_out = _measured(host, latents, range(first, second))
            others = _measured(host, latents, range(second, len(latents)))

            def look(progress: Any) -> None:
                if progress.step in job.marks or progress.step == job.steps:
                    network.refresh()
                    marks.append(dict(judged(), step=progress.step, parameters=network.size()))
                    kept.append(network.final_factors()[0])

            def judged() -> dict[str, Any]:
                return {"loss": _loss(host, held_out), "drift": _loss(host, others)}

            def cut(kind: str, factors: Factors) -> dict[str, Any]:
                found = {}
                for size, less in CUTS[kind](factors):
                    with attached(layers, less, host.device):
                        found[str(size)] = dict(judged(), parameters=size_of(less))
                return found

            before = judged()
            progress = trainer.run(look)
            for mark, factors in zip(marks, kept, strict=True):
                mark |= {kind: cut(kind, factors) for kind in job.more}
            with attached(layers, factors, host.device):
                file = dict(judged(), parameters=size_of(factors))
        return {
            "subject": job.subject, "pictures": job.pictures, "method": job.method, "rank": job.rank, "rate": job.rate,
            "seed": job.seed, "steps": job.steps, "changes": dict(job.changes), "before": before, "marks": marks, "file": file,
            "ranks": {n: f.rank for n, f in factors.items()}, "seconds": round(progress.seconds, 2),
        }  # fmt: skip


def settings_for(job: Job) -> Any:
    """The node's settings for a job; what is not said is the node's default."""
    base = pack("lora2.settings").Settings(
        steps=job.steps, learning_rate=job.rate, batch_size=BATCH, target_rank=job.rank, seed=job.seed, sync_every=SYNC_EVERY
    )
    if job.method == FIXED:
        base = replace(base, initial_rank=job.rank, settle_at=0.0)
    if job.method == PAPER:
        base = replace(base, settle_at=1.0)
    return replace(base, **dict(job.changes))


def make_plain(network: Any, job: Job) -> None:
    """Turn a network that has not begun into a plain LoRA of one rank: Λ = 1, B = 0."""
    generator = torch.Generator().manual_seed(job.seed)
    network.settled = True
    for adapter in network.adapters:
        fan_in = math.prod(adapter.shape[1:])
        rank = min(job.rank, fan_in, adapter.shape[0])
        down = torch.randn(rank, *adapter.shape[1:], generator=generator) / math.sqrt(3 * fan_in)
        adapter.load(pack("lora2.factors").Factors(torch.zeros(adapter.shape[0], rank), down))
    network._rebuild()


# -- measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Noisy pictures, each at every σ, with the clean ones and their conditioning, on the model's device."""

    noisy: Tensor
    sigma: Tensor
    clean: Tensor
    conditioning: Any


def _measured(host: Any, latents: Sequence[Tensor], indices: Sequence[int]) -> Measured:
    every = [i for _ in SIGMAS for i in indices]
    clean = torch.stack([latents[i] for i in every])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4242))
    sigma = torch.tensor(SIGMAS).repeat_interleave(len(indices))
    noisy = host.add_noise(sigma, noise, clean)
    [(_, conditioning)] = host.conditions(every, clean.shape)
    return Measured(noisy.to(host.device), sigma.to(host.device), clean.to(host.device), conditioning)


@torch.no_grad()
def _loss(host: Any, measured: Measured) -> float:
    """The mean squared error of the velocity: that of x0 over σ²."""
    wrong = host.denoise(measured.noisy, measured.sigma, measured.conditioning) - measured.clean
    return float((wrong.square().flatten(1).mean(1) / measured.sigma.square()).mean())


@contextmanager
def attached(layers: Mapping[str, nn.Module], factors: Factors, device: torch.device) -> Iterator[None]:
    """While inside, layers answer with plain factors added: written apart from the network, to check it too."""

    def add(up: Tensor, down: Tensor) -> Any:
        return lambda module, args, output: output + (args[0] @ down.T) @ up.T

    handles = [
        layers[name].register_forward_hook(add((f.scale * f.up).float().to(device), f.down.float().to(device)))
        for name, f in factors.items()
        if f.rank
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def size_of(factors: Factors) -> int:
    """Parameters of a file."""
    return sum(f.parameters for f in factors.values())


# -- cutting -------------------------------------------------------------------------------------------------------------

SIZES = (1, 2, 4, 8, 16, 32)
SHARES = (0.75, 0.5, 0.25)


def _singular(factors: Factors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    pairs = {name: pack("lora2.spectrum").singular_order(f) for name, f in factors.items()}
    return {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}


def resized(factors: Factors) -> Iterator[tuple[int, Factors]]:
    """Cut to the size of a uniform rank as resize tools do: every layer keeps the same share of its Frobenius norm (sv_fro).

    The share is the largest whose file is no larger than that of the uniform rank.
    """
    ordered, sigmas = _singular(factors)
    for size in SIZES:
        budget = size * sum(f.cost for f in factors.values())
        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            cut = {n: f.head(_rank_for(sigmas[n], share)) for n, f in ordered.items()}
            low, high = (share, high) if size_of(cut) <= budget else (low, share)
        yield size, {n: f.head(_rank_for(sigmas[n], low)) for n, f in ordered.items()}


def _rank_for(sigma: Tensor, share: float) -> int:
    """The smallest rank whose singular values hold a share of the Frobenius norm."""
    norms = sigma.square().cumsum(0).sqrt()
    return int((norms < share * norms[-1]).sum()) + 1


def allocated(factors: Factors) -> Iterator[tuple[int, Factors]]:
    """Cut to the size of a uniform rank by energy per parameter over all layers together, as the pack's own loader does."""
    ordered, sigmas = _singular(factors)
    costs = {n: f.cost for n, f in factors.items()}
    for size in SIZES:
        ranks = pack("lora2.spectrum").allocate(sigmas, costs, size * sum(costs.values()))
        yield size, {n: f.head(ranks[n]) for n, f in ordered.items()}


def shortened(factors: Factors) -> Iterator[tuple[float, Factors]]:
    """Every layer without its last positions, in the order that the file has: 75, 50 and 25 % of them."""
    for share in SHARES:
        yield share, {n: f.head(max(1, round(share * f.rank))) for n, f in factors.items()}


def shared_out(factors: Factors) -> Iterator[tuple[float, Factors]]:
    """75, 50 and 25 % of the bytes, by energy per parameter over all layers: what the loader does with a file of ours."""
    ordered, sigmas = _singular(factors)
    costs = {n: f.cost for n, f in factors.items()}
    for share in SHARES:
        ranks = pack("lora2.spectrum").allocate(sigmas, costs, int(share * size_of(factors)))
        yield share, {n: f.head(ranks[n]) for n, f in ordered.items()}


CUTS = {"resized": resized, "allocated": allocated, "shortened": shortened, "shared_out": shared_out}

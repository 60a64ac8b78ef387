"""The entropy term on and off, on a small SD 1.x UNet: the drawing model attends to captions in no block of its own.

The UNet's weights are random and so are its pictures. It can show that the term does what it says, what it costs the denoising
loss and whether it moves ranks; it cannot show whether sharper attention makes better pictures.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import models
from benchmarks.evidence import measuring
from benchmarks.evidence.budgets import dataset
from benchmarks.evidence.experiment import Claim, Results, chosen, mean
from benchmarks.models import pack

FAMILY = "sd15"
WEIGHTS = (0.0, 1e-4, 1e-2, 1.0)
"""Off, the default, and much more."""
STEPS, RANK, RATE = {True: 60, False: 16}, 4, 3e-3
LOWER = -0.01
"""By so much of itself the strongest weight lowers the entropy at least, in few steps too."""


def run(full: bool) -> Results:
    """Every weight, over seeds: entropy, denoising loss and ranks at the end."""
    models.import_comfy()
    seeds = (0, 1) if full else (0,)
    weights = WEIGHTS if full else (WEIGHTS[0], WEIGHTS[-1])
    runs = [measure(weight, seed, STEPS[full]) for weight in weights for seed in seeds]
    return {"steps": STEPS[full], "seeds": list(seeds), "runs": runs}


def measure(weight: float, seed: int, steps: int) -> Results:
    """Train one LoRA with this weight of the term."""
    with torch.inference_mode(False), torch.enable_grad():
        return _measure(weight, seed, steps)


def _measure(weight: float, seed: int, steps: int) -> Results:
    bridge, losses = pack("nodes.comfy.model"), pack("lora2.method.attention_entropy")
    host = bridge.HostModel(models.small(FAMILY), torch.float32)
    layers = pack("nodes.comfy.layers").select_layers(host.model, "attention", (), ())
    pictures, captions = (list(side) for side in dataset(FAMILY))
    latents = host.scale_latents([picture["samples"][0] for picture in pictures])
    entries = [caption[0] for caption in captions]
    settings = pack("lora2.config").TrainingConfig(
        steps=steps, learning_rate=RATE, batch_size=2, target_rank=RANK, seed=seed, entropy_weight=weight
    )
    with host.training(latents, entries, bridge.empty_caption(entries, None), settings.batch_size, "off"):
        probe = losses.EntropyProbe(pack("nodes.comfy.layers").cross_attention(host.model))
        network = pack("lora2.adapters.network").AdaptiveNetwork(layers, settings, host.device, host.compute)
        seen = measuring.measured(host, latents, range(len(latents)))
        before = _look(host, network, probe, seen)
        trainer = pack("lora2.training.trainer").Trainer(network, host, latents, settings, probe)
        trainer.run()
        after = _look(host, network, probe, seen)
        ranks = list(network.ranks().values())
    return {
        "weight": weight, "seed": seed, "before": before, "after": after, "ranks": [min(ranks), mean(ranks), max(ranks)],
    }  # fmt: skip


@torch.no_grad()
def _look(host: Any, network: Any, probe: Any, seen: measuring.Measured) -> dict[str, float]:
    """The denoising loss over fixed noise, and the cross-attention's entropy in the same passes."""
    network.refresh()
    with network.attached(), probe.attached():
        loss = measuring.loss(host, seen)
        return {"loss": loss, "entropy": float(probe.take())}


def of(results: Results, weight: float, what: str) -> float:
    """The mean over seeds of the change of a figure over training, as a share of what it was."""
    return mean(run["after"][what] / run["before"][what] - 1 for run in chosen(results["runs"], weight=weight))


def claims(results: Results) -> list[Claim]:
    """The term lowers what it is a term of."""
    strong = of(results, WEIGHTS[-1], "entropy") - of(results, WEIGHTS[0], "entropy")
    words = "entropy term, weight 1: change of cross-attention's entropy in training, less that without the term"
    return [Claim(words, strong, LOWER)]

"""Trains the small model: `python -m dev.painter.pretrain --out FOLDER`. Six minutes on an H100.

Writes weights.xz, loss.json (how it was made: seed, steps, machine, the losses) and samples.png, from the packed weights.
First the TAESD learns pictures, then the MMDiT learns their latents: rectified flow, v = ε − x0, σ of a logit-normal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional

from dev.host import import_comfy

from . import model, packing, sampling, world
from .subjects import Subject

SEED = 20260321
PATTERNED = 0.25
"""Of the TAESD's pictures show surfaces of any colours: it must be able to code subjects; the MMDiT never sees them."""

EMPTY_SHARE = 0.1
"""Of captions are left out, for guidance."""


@dataclass(frozen=True)
class Size:
    """How much is learned. Where the seconds are short for the steps, there are fewer, and the schedules shorter."""

    pictures: int = 60_000
    vae_steps: int = 4_000
    vae_batch: int = 32
    steps: int = 15_000
    batch: int = 256
    rate: float = 1e-3
    vae_seconds: float = 70.0
    seconds: float = 210.0


def picture(number: int) -> tuple[np.ndarray[Any, Any], str, bool]:
    """The numbered picture of the world, its caption, and whether only the TAESD may see it."""
    rng = random.Random(SEED * 1_000_003 + number)  # noqa: S311 (pictures, not secrets)
    scene = world.random_scene(rng)
    if rng.random() < PATTERNED:
        surface = Subject("", rng.randint(1, 12), scene.shape, rng.randrange(2**31) + 10_000).surface
        image = world.draw(scene.shape, surface, scene.place, scene.position, scene.size, scene.style, rng)
        return np.asarray(image), "", True
    return np.asarray(world.draw_scene(scene, rng)), scene.told_in_part(rng), False


def pictures(count: int) -> tuple[Tensor, list[str], Tensor]:
    """Numbered pictures as (count, 3, side, side) uint8, their captions, and which are the TAESD's alone."""
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(picture, range(count), chunksize=64))
    images = torch.from_numpy(np.stack([image for image, _, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return images, [caption for _, caption, _ in drawn], torch.tensor([own for _, _, own in drawn])


def started(module: nn.Module, generator: Generator) -> None:
    """First weights: N(0, 1 / fan-in), zero biases; a block's modulation and the last layer start at zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "adaLN" in name or name.startswith("final_layer") or (parameter.dim() < 2 and name.endswith("bias")):
                parameter.zero_()
            elif parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))


class Pace:
    """How many steps fit a time: fixed once the first ones are measured."""

    def __init__(self, steps: int, seconds: float, measured: int = 150) -> None:
        self.steps, self.seconds, self.measured = steps, seconds, measured

    def __iter__(self) -> Iterator[int]:
        step = 0
        while step < self.steps:
            if step == 20:
                start = time.monotonic()
            if step == 20 + self.measured:
                each = (time.monotonic() - start) / self.measured
                self.steps = min(self.steps, step + int(self.seconds / each))
            yield step
            step += 1


def rate(step: int, steps: int, warmup: int = 300) -> float:
    """Share of the learning rate: a linear start, then a cosine to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_autoencoder(images: Tensor, size: Size, device: torch.device, log: list[float]) -> tuple[nn.Module, int]:
    """TAESD and its steps: absolute and squared error of pictures in [0, 1], latents kept near unit variance."""
    vae: Any = model.autoencoder()
    generator = Generator().manual_seed(SEED)
    started(vae, generator)
    vae.to(device=device).to(memory_format=torch.channels_last)
    draw = Generator(device).manual_seed(SEED)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda"
    )
    pace = Pace(size.vae_steps, size.vae_seconds)
    for step in pace:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate(step, pace.steps)
        rows = torch.randint(len(images), (size.vae_batch,), generator=generator)
        real = images[rows].to(device, memory_format=torch.channels_last).float() / 255
        with torch.autocast(device.type, torch.bfloat16):
            latent = vae.taesd_encoder(real).float()
            noisy = latent + 0.05 * torch.randn(latent.shape, generator=draw, device=device)
            seen = vae.taesd_decoder(noisy).float()
        spread = (latent.square().mean((0, 2, 3)) - 1).square().mean() + latent.mean((0, 2, 3)).square().mean()
        loss = (seen - real).abs().mean() + 2 * (seen - real).square().mean() + 0.01 * spread
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            log.append(round(loss.item(), 5))
    return vae, pace.steps


@torch.no_grad()
def encoded(vae: Any, images: Tensor, device: torch.device) -> Tensor:
    """Latents of pictures in the scale of the MMDiT, (count, 16, side / 8, side / 8) bfloat16."""
    batches = [vae.taesd_encoder(part.to(device).float() / 255).bfloat16() for part in images.split(512)]
    return torch.cat(batches)


def train_model(
    latents: Tensor, texts: Tensor, pooled: Tensor, size: Size, device: torch.device, log: list[float]
) -> tuple[nn.Module, int]:
    """The MMDiT with the mean of its weights over the last steps, and its steps. Row 0 of texts is the empty caption's."""
    dit: Any = model.diffusion_model()
    generator = Generator().manual_seed(SEED + 1)
    dit.pos_embed.copy_(model.position_embedding())
    started(dit, generator)
    dit.to(device)
    parameters = list(dit.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=size.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    mean = [p.detach().clone() for p in parameters]
    draw = Generator(device).manual_seed(SEED + 2)
    recent: list[Tensor] = []
    pace = Pace(size.steps, size.seconds)
    for step in pace:
        for group in optimizer.param_groups:
            group["lr"] = size.rate * rate(step, pace.steps)
        rows = torch.randint(len(latents), (size.batch,), generator=draw, device=device)
        clean = latents[rows].float()
        told = torch.where(torch.rand(size.batch, generator=draw, device=device) < EMPTY_SHARE, 0, rows + 1)
        noise = torch.randn(clean.shape, generator=draw, device=device)
        sigma = torch.sigmoid(torch.randn(size.batch, generator=draw, device=device) * 1.2 + 0.3)
        wide = sigma.view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = dit(
                (1 - wide) * clean + wide * noise, sigma * 1000, context=texts[told].float(), y=pooled[told].float()
            )
        loss = functional.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(mean, [p.detach() for p in parameters], 1 - min(0.999, (1 + step) / (10 + step)))
        recent.append(loss.detach())
        if len(recent) == 100 or step + 1 == pace.steps:
            log.append(round(torch.stack(recent).mean().item(), 5))
            recent.clear()
            if len(log) % 20 == 1:
                print("model", step, log[-1], pace.steps, flush=True)
    with torch.no_grad():
        for parameter, average in zip(parameters, mean, strict=True):
            parameter.copy_(average)
    return dit, pace.steps


def main() -> None:
    """Draws, trains, packs, and samples from what was packed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=model.WEIGHTS.parent)
    for name in ("pictures", "vae_steps", "vae_batch", "steps", "batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Size(), name))
    options = parser.parse_args()
    size = Size(options.pictures, options.vae_steps, options.vae_batch, options.steps, options.batch)
    import_comfy()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    start, times = time.monotonic(), {}
    images, captions, own = pictures(size.pictures)
    times["drawing"] = time.monotonic() - start
    vae_log: list[float] = []
    vae, vae_steps = train_autoencoder(images, size, device, vae_log)
    times["autoencoder"] = time.monotonic() - start
    print("autoencoder", vae_log[0], vae_log[-1], times, flush=True)
    shown = (~own).nonzero().flatten()
    latents = encoded(vae, images[shown], device)
    spread = latents.float().std((0, 2, 3))
    print("latent std", spread.min().item(), spread.max().item(), flush=True)
    texts, pooled = sampling.texts(["", *(captions[i] for i in shown.tolist())], device)
    times["captions"] = time.monotonic() - start
    print("captions", times, flush=True)
    log: list[float] = []
    dit, steps = train_model(latents, texts, pooled, size, device, log)
    times["model"] = time.monotonic() - start
    weights = {model.UNET + k: v.cpu() for k, v in dit.state_dict().items() if k != "pos_embed"}
    weights |= {model.VAE + k: v.cpu() for k, v in vae.state_dict().items() if not k.startswith("vae_")}
    options.out.mkdir(parents=True, exist_ok=True)
    path = packing.pack(weights, options.out / model.WEIGHTS.name)
    about = {
        "seed": SEED, "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "seconds": {k: round(v) for k, v in times.items()}, "size": vars(size),
        "steps_done": {"autoencoder": vae_steps, "model": steps},
        "parameters": {"model": count(dit), "autoencoder": count(vae)},
        "bytes": path.stat().st_size, "autoencoder_loss_every_50": vae_log, "loss_every_100": log,
    }  # fmt: skip
    (options.out / "loss.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps({k: v for k, v in about.items() if "every" not in k}), log[:1], log[-1:], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = model.write_checkpoint(Path(folder) / "painter.safetensors", packing.unpack(path))
        sheet(checkpoint, options.out / "samples.png", images, device)


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in module.parameters())


def sheet(checkpoint: Path, path: Path, images: Tensor, device: torch.device) -> None:
    """Samples of 16 captions, and 8 pictures with what the TAESD makes of them, in one picture."""
    loaded = sampling.Painter(checkpoint)
    rng = random.Random(5)  # noqa: S311
    captions = [world.random_scene(rng).caption for _ in range(24)]
    drawn = loaded.sample(captions, seed=1)
    real = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:8]]
    drawn += real + loaded.through_autoencoder(real)
    side = world.SIDE + 4
    out = Image.new("RGB", (8 * side, math.ceil(len(drawn) / 8) * side), "white")
    for index, image in enumerate(drawn):
        out.paste(image, (index % 8 * side, index // 8 * side))
    out.save(path)
    print("\n".join(captions))


if __name__ == "__main__":
    main()

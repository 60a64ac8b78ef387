"""Wires a small random SD1.x UNet by hand into the right denoiser for smooth pictures, plus noise of its own.

With ε the noise in x = x0 + σε, and x̃ = x / √(1 + σ²) what the UNet is given, its output becomes

    ε̂ = g(t) x̃ − h(t) blur(x̃) + the random network's opinion

where g and h make the best linear guess there is of that form when x0 is smooth and of unit variance. So samples
are soft clouds of colour instead of garbage, and a LoRA, which moves the random part, has something to win.

A signal passes a group norm and a SiLU unchanged if its group holds x, −x and constants ±C that are far larger:
the norm then divides by C / √5, whatever x is, and SiLU(a) − SiLU(−a) = a. Where C depends on the time, so does
the gain. Two groups of ten of the last output block carry x̃ and its blur, from its skip connection to its end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from dev.host import import_comfy

Weights = dict[str, Tensor]

STEPS = 1000
LAST = "output_blocks.3"  # its input's second half is what input_blocks.0 made of x̃
GROUP = 10  # channels: +x̃ and −x̃ (four each), +C, −C
BOTH = 2 * GROUP
CONSTANT = 20.0
LEAST_GAIN = 0.03
OPINION = 0.5  # the random channels' weight in the output


def wire(unet: Weights) -> None:
    """Changes the tensors of dev.checkpoint's family sd15 in place."""
    first, widen, time = "input_blocks.0.0", f"{LAST}.0.in_layers.2", f"{LAST}.0.emb_layers.1"
    narrow, skip, attention = f"{LAST}.0.out_layers.3", f"{LAST}.0.skip_connection", f"{LAST}.1.proj_out"
    for module in (first, widen, time, narrow, skip, attention):
        unet[f"{module}.weight"][:BOTH] = 0
        unet[f"{module}.bias"][:BOTH] = 0
    for norm, start in ((f"{LAST}.0.in_layers.0", 320), (f"{LAST}.0.out_layers.0", 0), ("out.0", 0)):
        unet[f"{norm}.weight"][start : start + BOTH] = 1
        unet[f"{norm}.bias"][start : start + BOTH] = 0
    unet["out.2.weight"] *= OPINION
    unet["out.2.weight"][:, :BOTH] = 0
    unet["out.2.bias"].zero_()

    split = torch.cat([torch.eye(4), -torch.eye(4)])[:, :, None, None]  # 4 channels into +x̃, −x̃
    joined = split[:, :, 0, 0] @ split[:, :, 0, 0].T
    constants = torch.tensor([CONSTANT, -CONSTANT])
    point, box = torch.zeros(3, 3), torch.full((3, 3), 1 / 9)
    point[1, 1] = 1
    unet[f"{first}.weight"][:8] = split * point
    unet[f"{first}.bias"][8:GROUP] = constants
    for start, kernel, sign, gain in zip((0, GROUP), (point, box), (1, -1), gains(), strict=True):
        signal, ballast = slice(start, start + 8), slice(start + 8, start + GROUP)
        # The first norm's groups are twice as wide, half empty: it divides by C / √10.
        unet[f"{widen}.weight"][signal, 320:328] = joined[:, :, None, None] * kernel * CONSTANT / 10**0.5
        weight, bias = time_weights(unet, CONSTANT / gain.clamp(min=LEAST_GAIN))
        unet[f"{time}.weight"][ballast] = torch.stack([weight, -weight])
        unet[f"{time}.bias"][ballast] = torch.stack([bias, -bias])
        unet[f"{narrow}.weight"][signal, signal] = joined[:, :, None, None] * kernel * CONSTANT / 5**0.5
        unet[f"{narrow}.bias"][ballast] = constants
        unet["out.2.weight"][:, signal] = split.transpose(0, 1) * kernel * sign * CONSTANT / 5**0.5


def sigmas() -> Tensor:
    """σ of SD1.x's thousand time steps, (1000,) float64."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - beta, 0)
    return ((1 - kept) / kept).sqrt()


def gains() -> tuple[Tensor, Tensor]:
    """The gains g and h of every time step, each (1000,): least squares over a smooth picture's frequencies, 16 x 16."""
    cosine = (2 * torch.pi * torch.fft.fftfreq(16, dtype=torch.float64)).cos()
    power = (4.1 - 2 * cosine[:, None] - 2 * cosine) ** -2.0
    power = power / power.mean()
    blur = ((1 + 2 * cosine[:, None]) * (1 + 2 * cosine) / 9) ** 3
    sigma = sigmas()[:, None, None]
    # x0 ≈ (a + b·blur) x: the normal equations, weighted with the power of x.
    weight = power + sigma**2
    moments = torch.stack([(weight * blur**n).sum((1, 2)) for n in range(3)])
    target = torch.stack([power.sum(), (power * blur).sum()])
    matrix = torch.stack([torch.stack([moments[0], moments[1]]), torch.stack([moments[1], moments[2]])]).permute(
        2, 0, 1
    )
    a, b = torch.linalg.solve(matrix, target.expand(STEPS, 2)).T
    scale = (1 + sigmas() ** 2).sqrt() / sigmas()  # x = x̃ √(1 + σ²), ε̂ = (x − x̂0) / σ
    return (1 - a) * scale, b * scale


def time_weights(unet: Weights, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer on the time embedding that gives `wanted` (1000,): its row (1280,) and bias, by least squares."""
    import_comfy()
    from comfy.ldm.modules.diffusionmodules.openaimodel import timestep_embedding

    hidden = timestep_embedding(torch.arange(STEPS), 320).double()
    for layer in ("time_embed.0", "time_embed.2"):
        hidden = silu(hidden @ unet[f"{layer}.weight"].double().T + unet[f"{layer}.bias"].double())
    hidden = torch.cat([hidden, torch.ones(STEPS, 1, dtype=torch.float64)], 1)
    relative = hidden / wanted[:, None]
    ridge = 1e-6 * torch.eye(hidden.shape[1], dtype=torch.float64)
    row = torch.linalg.solve(relative.T @ relative + ridge, relative.sum(0)).float()
    return row[:-1], row[-1]

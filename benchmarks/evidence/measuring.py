"""What an adaptation is judged by: the denoising loss over fixed pictures, noise and σ, with factors attached by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.cuts import Factors

SIGMAS = (0.15, 0.35, 0.55, 0.75, 0.92)


@dataclass(frozen=True)
class Measured:
    """Noisy pictures, each at every σ, with the clean ones and their conditioning, on the model's device."""

    noisy: Tensor
    sigma: Tensor
    clean: Tensor
    conditioning: Any


def measured(host: Any, latents: Sequence[Tensor], indices: Sequence[int]) -> Measured:
    """These of the host's pictures; the noise is always the same."""
    every = [i for _ in SIGMAS for i in indices]
    clean = torch.stack([latents[i] for i in every])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4242))
    sigma = torch.tensor(SIGMAS).repeat_interleave(len(indices))
    noisy = host.add_noise(sigma, noise, clean)
    [(_, conditioning)] = host.conditions(every, clean.shape)
    return Measured(noisy.to(host.device), sigma.to(host.device), clean.to(host.device), conditioning)


@torch.no_grad()
def loss(host: Any, pictures: Measured) -> float:
    """The mean squared error of the velocity: that of x0 over σ²."""
    wrong = host.denoise(pictures.noisy, pictures.sigma, pictures.conditioning) - pictures.clean
    return float((wrong.square().flatten(1).mean(1) / pictures.sigma.square()).mean())


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


def rounded(value: Any) -> Any:
    """The same plain values with six digits, in lists and dicts too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value

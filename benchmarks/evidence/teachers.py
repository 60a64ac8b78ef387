"""Layers whose true change is known: what rank recovery is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora2.method.factors import Factors
from lora2.method.losses import X0

Shape = tuple[int, int]


class Teachers:
    """Linear layers W that must each become W + T, with T of a known rank. A denoiser as lora2.training.denoiser has it.

    ranks, shapes: of every layer's T; shapes are (d_out, d_in). decay: a T's singular values fall geometrically from 1 to
    1 / decay. noise: error that nothing can explain, as a share of the loss before training.
    The input of every layer is white noise of its own, and the output the errors of all layers. The loss is
    Σ‖ΔW − T‖² / Σ‖T‖² plus the noise, in the mean over inputs: 1 + noise at the start, and every entry of every T weighs alike.
    """

    prediction, sigma_data, device = X0, 1.0, torch.device("cpu")

    def __init__(
        self, ranks: Sequence[int], shapes: Sequence[Shape], seed: int, decay: float = 1.0, noise: float = 0.0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parts = [nn.Linear(d_in, d_out, bias=False).requires_grad_(False) for d_out, d_in in shapes]
        self.truths: list[Tensor] = []
        for layer, rank, shape in zip(self.parts, ranks, shapes, strict=True):
            layer.weight.data.normal_(0, shape[1] ** -0.5, generator=generator)
            left, right = (
                torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64))[0] for d in shape
            )
            self.truths.append((left * spectrum(rank, decay)) @ right.T)
        self._goals = [truth.float() for truth in self.truths]
        self._outputs, self._inputs = ([shape[side] for shape in shapes] for side in (0, 1))
        self.size = sum(self._inputs) + sum(self._outputs)
        self._scale = (self.size / sum(float(t.square().sum()) for t in self.truths)) ** 0.5
        self._unexplained = (noise * self.size / sum(self._outputs)) ** 0.5

    def layers(self) -> dict[str, nn.Module]:
        """By their place."""
        return {str(index): layer for index, layer in enumerate(self.parts)}

    def latent(self) -> Tensor:
        """The one picture to learn: zeros, so that what `denoise` gives is the error."""
        return torch.zeros(1, self.size)

    def sigma(self, time: Tensor, shifted: bool) -> Tensor:
        return torch.ones_like(time)

    def add_noise(self, sigma: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
        return noise

    def conditions(self, captions: Sequence[int], shape: torch.Size) -> list[tuple[list[int], list[int]]]:
        return [(list(range(len(captions))), list(captions))]

    def denoise(self, noisy: Tensor, sigma: Tensor, captions: Sequence[int]) -> Tensor:
        inputs, unexplained = noisy[:, 0].split([sum(self._inputs), sum(self._outputs)], dim=1)
        parts = zip(self.parts, self._goals, inputs.split(self._inputs, dim=1), strict=True)
        errors = [layer(x) - F.linear(x, layer.weight + goal) for layer, goal, x in parts]
        out = self._scale * torch.cat(errors, 1) + self._unexplained * unexplained
        return F.pad(out, (0, self.size - out.shape[1]))[:, None]

    def save_memory(self) -> None:
        """Nothing here could need less."""


def spectrum(rank: int, decay: float) -> Tensor:
    """Singular values from 1 down to 1 / decay, in equal ratios; (rank,) float64."""
    return decay ** -torch.linspace(0, 1, rank, dtype=torch.float64) if rank > 1 else torch.ones(1, dtype=torch.float64)


def residuals(factors: Mapping[str, Factors], truths: Sequence[Tensor]) -> list[float]:
    """‖ΔW − T‖² / ‖T‖² of every layer, in float64."""
    pairs = zip(factors.values(), truths, strict=True)
    return [float((f.delta().double() - t).square().sum() / t.square().sum()) for f, t in pairs]

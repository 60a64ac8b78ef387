"""A diffusion model as training sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

EMPTY_CAPTION = -1
"""Stands for the empty caption where a picture's index stands for its caption."""


class Denoiser(Protocol):
    """A diffusion model as the trainer sees it: what a host provides."""

    @property
    def prediction(self) -> str:
        """What the network puts out: one of losses.PREDICTIONS."""

    @property
    def sigma_data(self) -> float:
        """The data's standard deviation in the model's parametrisation."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""

    def sigma(self, time: Tensor, shifted: bool) -> Tensor:
        """σ of times in (0, 1): (batch,) → (batch,). shifted: by the model's own timestep shift, if it has one."""

    def add_noise(self, sigma: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
        """The noisy latent, (batch, channels, …)."""

    def conditions(self, captions: Sequence[int], shape: torch.Size) -> list[tuple[list[int], Any]]:
        """Captions (indices, or EMPTY_CAPTION) as conditioning, in groups that can run together.

        shape: of the latents, (batch, channels, …). Returns for each group its places in `captions`, and what `denoise` takes.
        """

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """The model's x0 prediction with every sample's own caption, with gradients."""

    def save_memory(self) -> str | None:
        """Change something so that a step needs less memory; in words what, None where there is nothing."""

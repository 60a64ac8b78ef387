"""The interface between training and a diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

EMPTY_CAPTION = -1
"""Index of the empty caption; other captions have their picture's index."""


class Denoiser(Protocol):
    """A diffusion model, provided by the host."""

    @property
    def prediction(self) -> str:
        """The network's kind of output: one of losses.PREDICTIONS."""

    @property
    def sigma_data(self) -> float:
        """The data's standard deviation in the model's parametrization."""

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""

    def sigma(self, time: Tensor, shifted: bool) -> Tensor:
        """σ of times in (0, 1): (batch,) → (batch,). shifted: by the model's own timestep shift, if it has one."""

    def add_noise(self, sigma: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
        """The noisy latent, (batch, channels, …)."""

    def conditions(self, captions: Sequence[int], shape: torch.Size) -> list[tuple[list[int], Any]]:
        """Captions (indices, or EMPTY_CAPTION) as conditioning, in groups of samples that can run together.

        shape: of the latents, (batch, channels, …). Returns for each group its indices into `captions`, and the conditioning for
        `denoise`.
        """

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """The model's x0 prediction with every sample's own caption, with gradients."""

    def save_memory(self) -> str | None:
        """Make steps need less memory; describe the change, None if there is none."""

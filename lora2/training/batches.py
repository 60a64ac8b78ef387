"""What steps are made of: batches drawn from a seed, in parts that run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ..checkpoints.state import State, restore_generator
from ..config import SEEDS, Settings
from ..method import schedule
from .buckets import Buckets
from .denoiser import EMPTY_CAPTION, Denoiser
from .step import Part

Batch = tuple[Tensor, Tensor, Tensor, list[int]]
"""Clean latents, noise, σ and captions, on the CPU."""


class Samples:
    """Batches of a run's pictures. seeds: of the pictures' order, and of noise, σ and dropped captions.

    most: samples that may run together. largest: how many did so at most in the parts that were last made.
    """

    def __init__(
        self, latents: Sequence[Tensor], denoiser: Denoiser, settings: Settings, batch_size: int, seeds: tuple[int, int]
    ) -> None:
        self.denoiser, self.settings = denoiser, settings
        self.data = Buckets(latents, batch_size, seeds[0] % SEEDS)
        self.generator = Generator().manual_seed(seeds[1] % SEEDS)
        self.most, self.largest = batch_size, 0

    def draw(self) -> Batch:
        """Clean latents, noise, σ and captions of the next batch. Drawn on the CPU: a seed means the same everywhere."""
        settings, generator = self.settings, self.generator
        indices = self.data.next_batch()
        clean = self.data.stack(indices)
        noise = torch.randn(clean.shape, generator=generator)
        sampling = settings.timestep_sampling
        times = schedule.sample_times(len(indices), sampling, generator)
        sigma = self.denoiser.sigma(times, shifted=sampling in ("auto", "shifted"))
        dropped = torch.rand(len(indices), generator=generator) < settings.caption_dropout
        captions = [EMPTY_CAPTION if gone else i for i, gone in zip(indices, dropped.tolist(), strict=True)]
        return clean, noise, sigma, captions

    def parts(self, drawn: list[Batch], count: int) -> Iterator[Part]:
        """So many batches' samples on the device, in parts that can run together, of as many samples as memory allows.

        drawn: the batches so far; those that are missing are drawn and added.
        """
        device, self.largest = self.denoiser.device, 0
        for index in range(count):
            if index == len(drawn):
                drawn.append(self.draw())
            clean, noise, sigma, captions = drawn[index]
            for members, conditioning in self._groups(captions, range(len(captions)), clean.shape):
                self.largest = max(self.largest, len(members))
                weight = torch.full((), len(members) / (len(captions) * count), device=device)
                some: Any = slice(None) if len(members) == len(captions) else members
                yield Part(clean[some].to(device), noise[some].to(device), sigma[some].to(device), conditioning, weight)

    def _groups(
        self, captions: Sequence[int], members: Sequence[int], shape: torch.Size
    ) -> Iterator[tuple[list[int], Any]]:
        """Samples that can run together, at most `most` at once, with their conditioning."""
        chosen = [captions[i] for i in members]
        for places, conditioning in self.denoiser.conditions(chosen, torch.Size([len(chosen), *shape[1:]])):
            group = [members[place] for place in places]
            if len(group) <= self.most:
                yield group, conditioning
                continue
            for start in range(0, len(group), self.most):
                yield from self._groups(captions, group[start : start + self.most], shape)

    def state(self) -> State:
        """Where everything random of the next batches stands."""
        return State.joined(data=self.data.state(), noise=State({"generator": self.generator.get_state()}, {}))

    def restore(self, state: State) -> None:
        """Go on from there. Raises LoraError where that is of other pictures, or damaged."""
        self.data.restore(state.part("data"))
        restore_generator(self.generator, state.part("noise"), "generator")

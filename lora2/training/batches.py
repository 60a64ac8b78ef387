"""Batches sampled from a seed, and the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ..checkpoints.state import State, raise_corrupted, restore_generator
from ..config import SEED_LIMIT, TrainingConfig
from ..method.timesteps import sample_times
from ..util.errors import LoraError
from .denoiser import EMPTY_CAPTION, Denoiser
from .step import MicroBatch

Batch = tuple[Tensor, Tensor, Tensor, list[int]]
"""Clean latents and noise, (batch, channels, …), σ, (batch,), and captions, all on the CPU."""


class Batches:
    """Batches of a run's pictures. seeds: of the pictures' order, and of noise, σ and dropped captions.

    max_micro_batch: samples that may run together. largest_micro_batch: the most that did since `micro_batches` was called.
    """

    def __init__(
        self,
        latents: Sequence[Tensor],
        denoiser: Denoiser,
        config: TrainingConfig,
        batch_size: int,
        seeds: tuple[int, int],
    ) -> None:
        self.denoiser, self.config = denoiser, config
        self.buckets = Buckets(latents, batch_size, seeds[0] % SEED_LIMIT)
        self.generator = Generator().manual_seed(seeds[1] % SEED_LIMIT)
        self.max_micro_batch, self.largest_micro_batch = batch_size, 0

    def sample(self) -> Batch:
        """The next batch. Random numbers come from the CPU, so that a seed gives the same samples on every device."""
        config, generator = self.config, self.generator
        indices = self.buckets.next_batch()
        clean = self.buckets.stack(indices)
        noise = torch.randn(clean.shape, generator=generator)
        sampling = config.timestep_sampling
        times = sample_times(len(indices), sampling, generator)
        sigma = self.denoiser.sigma(times, shifted=sampling in ("auto", "shifted"))
        dropped = torch.rand(len(indices), generator=generator) < config.caption_dropout
        captions = [EMPTY_CAPTION if drop else i for i, drop in zip(indices, dropped.tolist(), strict=True)]
        return clean, noise, sigma, captions

    def micro_batches(self, batches: Sequence[Batch]) -> Iterator[MicroBatch]:
        """All samples of a step on the device, in micro-batches of at most `max_micro_batch`; every sample weighs the same."""
        device, self.largest_micro_batch = self.denoiser.device, 0
        for clean, noise, sigma, captions in batches:
            for members, conditioning in self._groups(captions, range(len(captions)), clean.shape):
                self.largest_micro_batch = max(self.largest_micro_batch, len(members))
                weight = torch.full((), len(members) / (len(captions) * len(batches)), device=device)
                at: Any = slice(None) if len(members) == len(captions) else members
                yield MicroBatch(clean[at].to(device), noise[at].to(device), sigma[at].to(device), conditioning, weight)

    def _groups(
        self, captions: Sequence[int], members: Sequence[int], shape: torch.Size
    ) -> Iterator[tuple[list[int], Any]]:
        """Indices of samples that can run together, at most `max_micro_batch` of them, with their conditioning."""
        chosen = [captions[i] for i in members]
        for indices, conditioning in self.denoiser.conditions(chosen, torch.Size([len(chosen), *shape[1:]])):
            group = [members[index] for index in indices]
            if len(group) <= self.max_micro_batch:
                yield group, conditioning
                continue
            for start in range(0, len(group), self.max_micro_batch):
                yield from self._groups(captions, group[start : start + self.max_micro_batch], shape)

    def state(self) -> State:
        """The state of everything random in the next batches."""
        return State.joined(buckets=self.buckets.state(), noise=State({"generator": self.generator.get_state()}, {}))

    def restore(self, state: State) -> None:
        """Continue from there. Raises LoraError if the state is of other pictures, or damaged."""
        self.buckets.restore(state.part("buckets"))
        restore_generator(self.generator, state.part("noise"), "generator")


class Buckets:
    """Pictures grouped by latent shape; an endless seeded sequence of batches of one shape each.

    latents: one (channels, …) tensor per picture. Picture i has caption i. A bucket is chosen with probability
    proportional to its size. It deals its pictures from a shuffled deck and reshuffles an empty one, so that every batch is
    full.
    """

    def __init__(self, latents: Sequence[Tensor], batch_size: int, seed: int) -> None:
        if not latents:
            raise LoraError("There are no latents to train on. Connect the latents of a dataset node.")
        self.latents = list(latents)
        self.batch_size = batch_size
        self.generator = Generator().manual_seed(seed)
        self.members: dict[tuple[int, ...], list[int]] = {}
        for index, latent in enumerate(self.latents):
            self.members.setdefault(tuple(latent.shape), []).append(index)
        self._decks: dict[tuple[int, ...], list[int]] = {shape: [] for shape in self.members}
        self._sizes = torch.tensor([len(m) for m in self.members.values()], dtype=torch.float64)

    def next_batch(self) -> list[int]:
        """The indices of the next batch's pictures, all of one shape."""
        which = int(torch.multinomial(self._sizes, 1, generator=self.generator))
        shape = list(self.members)[which]
        deck = self._decks[shape]
        while len(deck) < self.batch_size:
            order = torch.randperm(len(self.members[shape]), generator=self.generator).tolist()
            deck.extend(self.members[shape][i] for i in order)
        batch, self._decks[shape] = deck[: self.batch_size], deck[self.batch_size :]
        return batch

    def state(self) -> State:
        """The generator, and the undealt pictures of every deck."""
        return State(
            {"generator": self.generator.get_state()}, {"decks": [list(deck) for deck in self._decks.values()]}
        )

    def restore(self, state: State) -> None:
        """Continue the sequence of a state of the same pictures. Raises LoraError if it is of others, or damaged."""
        decks = state.list_of("decks", list, len(self.members))
        for deck, members in zip(decks, self.members.values(), strict=True):
            if len(deck) > len(members) or not all(type(i) is int for i in deck) or not set(deck) <= set(members):
                raise_corrupted("a deck holds pictures that do not exist")
        restore_generator(self.generator, state, "generator")
        self._decks = {shape: list(deck) for shape, deck in zip(self.members, decks, strict=True)}

    def stack(self, indices: Sequence[int]) -> Tensor:
        """(batch, channels, …) latents of these pictures."""
        return torch.stack([self.latents[i] for i in indices])

"""What steps are made of: batches drawn from a seed, in parts that run together."""

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
"""Clean latents, noise, σ and captions, on the CPU."""


class Batches:
    """Batches of a run's pictures. seeds: of the pictures' order, and of noise, σ and dropped captions.

    most: samples that may run together. largest: how many did so at most in the parts that were last made.
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
        self.data = Buckets(latents, batch_size, seeds[0] % SEED_LIMIT)
        self.generator = Generator().manual_seed(seeds[1] % SEED_LIMIT)
        self.most, self.largest = batch_size, 0

    def draw(self) -> Batch:
        """Clean latents, noise, σ and captions of the next batch. Drawn on the CPU: a seed means the same everywhere."""
        config, generator = self.config, self.generator
        indices = self.data.next_batch()
        clean = self.data.stack(indices)
        noise = torch.randn(clean.shape, generator=generator)
        sampling = config.timestep_sampling
        times = sample_times(len(indices), sampling, generator)
        sigma = self.denoiser.sigma(times, shifted=sampling in ("auto", "shifted"))
        dropped = torch.rand(len(indices), generator=generator) < config.caption_dropout
        captions = [EMPTY_CAPTION if gone else i for i, gone in zip(indices, dropped.tolist(), strict=True)]
        return clean, noise, sigma, captions

    def parts(self, drawn: list[Batch], count: int) -> Iterator[MicroBatch]:
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
                yield MicroBatch(
                    clean[some].to(device), noise[some].to(device), sigma[some].to(device), conditioning, weight
                )

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


class Buckets:
    """Pictures grouped by latent shape; a seeded endless order of batches of one shape each.

    latents: one (channels, …) tensor per picture. Picture i keeps caption i. A bucket is drawn with probability
    proportional to its size, and deals its pictures from a shuffled deck; a deck that runs out is shuffled anew, so that
    every batch is full.
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
        """Where the order is: the generator, and what is left of every deck."""
        return State(
            {"generator": self.generator.get_state()}, {"decks": [list(deck) for deck in self._decks.values()]}
        )

    def restore(self, state: State) -> None:
        """Go on in the order of a state over the same pictures. Raises LoraError where it is of others, or damaged."""
        decks = state.list_of("decks", list, len(self.members))
        for deck, members in zip(decks, self.members.values(), strict=True):
            if len(deck) > len(members) or not all(type(i) is int for i in deck) or not set(deck) <= set(members):
                raise_corrupted("a deck holds pictures that are not there")
        restore_generator(self.generator, state, "generator")
        self._decks = {shape: list(deck) for shape, deck in zip(self.members, decks, strict=True)}

    def stack(self, indices: Sequence[int]) -> Tensor:
        """(batch, channels, …) latents of these pictures."""
        return torch.stack([self.latents[i] for i in indices])

"""Which pictures make a batch: buckets of equal shape, every picture once before any comes again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ..checkpoints.state import State, damaged, restore_generator
from ..util.errors import LoraError


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
        return State({"generator": self.generator.get_state()}, {"decks": [list(deck) for deck in self._decks.values()]})

    def restore(self, state: State) -> None:
        """Go on in the order of a state over the same pictures. Raises LoraError where it is of others, or damaged."""
        decks = state.items("decks", list, len(self.members))
        for deck, members in zip(decks, self.members.values(), strict=True):
            if len(deck) > len(members) or not all(type(i) is int for i in deck) or not set(deck) <= set(members):
                damaged("a deck holds pictures that are not there")
        restore_generator(self.generator, state, "generator")
        self._decks = {shape: list(deck) for shape, deck in zip(self.members, decks, strict=True)}

    def stack(self, indices: Sequence[int]) -> Tensor:
        """(batch, channels, …) latents of these pictures."""
        return torch.stack([self.latents[i] for i in indices])

"""Fingerprint of a run's inputs, compared when a training state is resumed: digests of the model, samples of the dataset."""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..util.text import escaped
from .state import State, raise_corrupted

SAMPLE_SIZE = 64
"""Values of a picture or a caption in its sample. They change with any edit before the encoder."""

ENCODING_TOLERANCE = 0.02
"""Largest difference between two encodings of one picture or caption, as a fraction of the root mean square of its sample."""

MAX_NAMED = 3
"""Pictures that a message names."""


def digest(tensors: Iterable[Tensor], text: str = "", max_values: int = 0) -> str:
    """Digest of tensors and a text. max_values: how many values of each tensor count, evenly spaced; 0 = all."""
    result = hashlib.blake2b(text.encode(), digest_size=16)
    for tensor in tensors:
        flat = _evenly_spaced(tensor, max_values or tensor.numel()).to("cpu").contiguous()
        result.update(f"{tuple(tensor.shape)} {flat.dtype}".encode())
        if flat.numel():
            result.update(flat.view(torch.uint8).numpy().data)
    return result.hexdigest()


def samples(items: Iterable[tuple[Sequence[Tensor], str]]) -> Tensor:
    """(items, 1 + SAMPLE_SIZE), float32: of each item, a checksum of its shapes and its text, and values of its tensors, added up."""
    rows = []
    for tensors, text in items:
        shapes = "".join(repr(tuple(tensor.shape)) for tensor in tensors)
        row = torch.zeros(1 + SAMPLE_SIZE)
        row[0] = zlib.crc32((text + shapes).encode()) >> 8  # 24 bits are exact in float32
        for tensor in tensors:
            values = _evenly_spaced(tensor, SAMPLE_SIZE).to("cpu").float()
            row[1 : 1 + len(values)] += values
        rows.append(torch.nan_to_num(row))
    return torch.stack(rows) if rows else torch.zeros(0, 1 + SAMPLE_SIZE)


@dataclass(frozen=True)
class Fingerprint:
    """Everything that a run is made from, beside its configuration.

    family: of the model, with its prediction type. layers, weights, patches: digests of the adapted layers' names and shapes, of
    their weights in the model's file, and of the LoRAs applied to the model (empty without any). pictures, captions: `samples`.
    empty_caption: of the caption that replaces a dropped one; no row where none is dropped.
    """

    family: str
    layers: str
    pictures: Tensor
    captions: Tensor
    empty_caption: Tensor
    weights: str = ""
    patches: str = ""

    def state(self) -> State:
        """As a part of a training state."""
        values = asdict(self)
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return State(tensors, {name: value for name, value in values.items() if name not in tensors})

    @classmethod
    def restored(cls, state: State) -> Fingerprint:
        """From a part of a training state; raises LoraError where it is corrupted."""
        rows = (None, 1 + SAMPLE_SIZE)
        pictures, captions = state.tensor("pictures", rows), state.tensor("captions", rows)
        if len(pictures) != len(captions):
            raise_corrupted(f"it has {len(pictures)} pictures but {len(captions)} captions")
        family, layers = state.text("family"), state.text("layers")
        empty_caption, weights, patches = (
            state.tensor("empty_caption", rows),
            state.text("weights"),
            state.text("patches"),
        )
        return cls(family, layers, pictures, captions, empty_caption, weights, patches)

    def order_of(self, saved: Fingerprint) -> list[int] | None:
        """Indices that bring this run's pictures with their captions into the saved order; None unless they are the same."""
        indices: defaultdict[bytes, deque[int]] = defaultdict(deque)
        for index, pair in enumerate(torch.cat([self.pictures, self.captions], 1).numpy()):
            indices[pair.tobytes()].append(index)
        pairs = [pair.tobytes() for pair in torch.cat([saved.pictures, saved.captions], 1).numpy()]
        order = [indices[pair].popleft() if indices[pair] else -1 for pair in pairs]
        return order if sorted(order) == list(range(len(self.pictures))) else None

    def reordered(self, order: Sequence[int]) -> Fingerprint:
        """With the pictures and captions at these indices."""
        return replace(self, pictures=self.pictures[list(order)], captions=self.captions[list(order)])

    def compare_data(self, saved: Fingerprint) -> tuple[list[str], list[str]]:
        """Differences from a saved run in all but weights and patches: those that make it another run, and those of rounding."""
        different, rounded = [], []
        if self.family != saved.family:
            different.append(f"the model is {escaped(self.family)}, it was {escaped(saved.family)}")
        if self.layers != saved.layers:
            different.append("the adapted layers differ")
        if len(self.pictures) != len(saved.pictures):
            return [*different, f"there are {len(self.pictures)} pictures, there were {len(saved.pictures)}"], []
        for name in ("pictures", "captions", "empty_caption"):
            now, before = getattr(self, name), getattr(saved, name)
            if len(now) != len(before) or torch.equal(now, before):
                continue
            if others := _different_rows(now, before):
                numbers = ", ".join(str(i + 1) for i in others[:MAX_NAMED]) + ", …" * (len(others) > MAX_NAMED)
                different.append("the empty caption differs" if name == "empty_caption" else f"{name} {numbers} differ")
            else:
                rounded.append(f"the {name.replace('_', ' ')} differ by rounding")
        return different, rounded

    def compare_model(self, saved: Fingerprint) -> list[str]:
        """Differences from a saved run in the model's weights and in the LoRAs applied to it."""
        different = ["the model's weights differ"] if self.weights != saved.weights else []
        return different + ["other LoRAs are applied to the model"] * (self.patches != saved.patches)


def _evenly_spaced(tensor: Tensor, count: int) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // max(count, 1))][:count]


def _different_rows(now: Tensor, before: Tensor) -> list[int]:
    """Rows of `samples` with other shapes, another text, or values that differ by more than rounding."""
    checksums, one, other = now[:, 0] != before[:, 0], now[:, 1:].double(), before[:, 1:].double()
    scale = torch.maximum(one.square().mean(1, keepdim=True).sqrt(), one.abs())
    far = ((one - other).abs() > ENCODING_TOLERANCE * scale).any(1)
    return torch.nonzero(checksums | far).flatten().tolist()

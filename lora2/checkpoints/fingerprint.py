"""What a run was made of, remembered in a few bytes for each part: its base model's layers, its pictures, its captions."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..util.text import escaped
from .state import State, raise_corrupted

SAMPLES = 1024
"""Numbers of a weight that are looked at: two models that differ do so everywhere."""

SKETCH = 32
"""Numbers that are kept as they are, to tell rounding from another thing."""

ROUNDING = 2.0**-7
"""How far the same weight may lie apart in two half types, as a share of it."""

RE_ENCODED = 0.02
"""How far a picture or a caption may lie apart when a GPU encodes it again, as a share of its root mean square."""

NAMED = 3
"""How many layers or pictures a sentence names."""

_HALF = 8


@dataclass(frozen=True)
class Digests:
    """Fingerprints of a list of things.

    digests: (things, 16) uint8, half of it of shapes, half of values. sketches: (things, 32) float32, some values as they are.
    """

    digests: Tensor
    sketches: Tensor

    @classmethod
    def of(cls, things: Iterable[tuple[Sequence[Tensor], str]], samples: int = 0) -> Digests:
        """Of things that are tensors and words each. samples: how many numbers of a tensor are looked at, 0 = all."""
        pairs = [_print(tensors, words, samples) for tensors, words in things]
        if not pairs:
            return cls(torch.zeros(0, 2 * _HALF, dtype=torch.uint8), torch.zeros(0, SKETCH))
        return cls(torch.stack([d for d, _ in pairs]), torch.stack([s for _, s in pairs]))

    def same(self, other: Digests) -> list[bool]:
        """Which things are the same, bit for bit as far as they were looked at; both of one length."""
        return (self.digests == other.digests).all(1).tolist()

    def close(self, other: Digests, share: float) -> list[bool]:
        """Which things are of the same shapes and differ by no more than a share of their root mean square."""
        shapes = (self.digests[:, :_HALF] == other.digests[:, :_HALF]).all(1)
        mine, theirs = self.sketches.double(), other.sketches.double()
        size = torch.maximum(mine.square().mean(1, keepdim=True).sqrt(), mine.abs())
        near = (mine - theirs).abs() <= share * size
        return (shapes & near.all(1)).tolist()

    def state(self) -> State:
        """As part of a training state."""
        return State({"digests": self.digests, "sketches": self.sketches}, {})

    @classmethod
    def restored(cls, state: State) -> Digests:
        """From a part of a training state."""
        digests = state.tensor("digests", (None, 2 * _HALF), torch.uint8)
        return cls(digests, state.tensor("sketches", (len(digests), SKETCH)))


@dataclass(frozen=True)
class Fingerprint:
    """A run's base model and dataset.

    family: of the model, with what it predicts. weights: of every adapted layer, by its path; types: as they are stored.
    patches: a digest of what other LoRAs add to the model, empty without any. pictures, captions: as they came.
    empty: the caption that a dropped one becomes, where any is dropped.
    """

    family: str
    layers: list[str]
    types: list[str]
    weights: Digests
    patches: str
    pictures: Digests
    captions: Digests
    empty: Digests

    def state(self) -> State:
        """As part of a training state."""
        facts = {"family": self.family, "layers": self.layers, "types": self.types, "patches": self.patches}
        return State.joined(
            model=State({}, facts),
            weights=self.weights.state(),
            pictures=self.pictures.state(),
            captions=self.captions.state(),
            empty=self.empty.state(),
        )

    @classmethod
    def restored(cls, state: State) -> Fingerprint:
        """From a part of a training state; raises LoraError where it is damaged."""
        model = state.part("model")
        layers = model.items("layers", str)
        weights, pictures, captions, empty = (
            Digests.restored(state.part(name)) for name in ("weights", "pictures", "captions", "empty")
        )
        if len(weights.digests) != len(layers) or len(pictures.digests) != len(captions.digests):
            raise_corrupted("its fingerprints are not as many as its layers and pictures")
        types = model.items("types", str, len(layers))
        return cls(model.text("family"), layers, types, weights, model.text("patches"), pictures, captions, empty)

    def order(self, pictures: Digests, captions: Digests) -> list[int] | None:
        """Where each of this origin's pictures with its caption lies among others; None unless those are the same pairs."""
        places: dict[bytes, deque[int]] = {}
        for place, pair in enumerate(_pairs(pictures, captions)):
            places.setdefault(pair, deque()).append(place)
        wanted = _pairs(self.pictures, self.captions)
        if len(wanted) != len(pictures.digests):
            return None
        found = [places[pair].popleft() if places.get(pair) else -1 for pair in wanted]
        return None if -1 in found else found

    def against(self, before: Fingerprint) -> tuple[list[str], list[str]]:
        """How this origin differs from that of a state: what makes it another run, and what only rounds otherwise."""
        wrong, rounded = self._model_against(before)
        for what, now, then in (
            ("picture", self.pictures, before.pictures),
            ("caption", self.captions, before.captions),
        ):
            if len(now.digests) != len(then.digests):
                if what == "picture":
                    wrong.append(f"there are {len(now.digests)} pictures, the state's run had {len(then.digests)}")
                continue
            different, near = _compare(now, then, RE_ENCODED)
            if different and sorted(now.digests.tolist()) == sorted(then.digests.tolist()):
                wrong.append(f"the {what}s come in another order")
            elif different:
                wrong.append(f"{_listed([str(i + 1) for i in different], what)} differ")
            elif near:
                rounded.append(f"the {what}s were encoded again and differ by rounding")
        if len(self.empty.digests) and len(before.empty.digests):
            different, _ = _compare(self.empty, before.empty, RE_ENCODED)
            if different:
                wrong.append("the empty caption differs")
        return wrong, rounded

    def _model_against(self, before: Fingerprint) -> tuple[list[str], list[str]]:
        wrong: list[str] = []
        if self.family != before.family:
            wrong.append(f"the model is {escaped(self.family)}, the state's run had {escaped(before.family)}")
        more = [name for name in self.layers if name not in set(before.layers)]
        less = [name for name in before.layers if name not in set(self.layers)]
        if more:
            wrong.append(f"{_listed(more, 'layer')} adapted now that the state has not")
        if less:
            wrong.append(f"{_listed(less, 'layer')} of the state not adapted now")
        if more or less or self.layers != before.layers:
            return wrong or ["the layers come in another order"], []
        same = self.weights.same(before.weights)
        near = self.weights.close(before.weights, ROUNDING)
        rounded = [a != b for a, b in zip(self.types, before.types, strict=True)]
        other = [n for n, s, c, r in zip(self.layers, same, near, rounded, strict=True) if not s and not (c and r)]
        if other:
            wrong.append(f"the model's weights differ in {_listed(other, 'layer')}")
        elif not all(same):
            return wrong + self._patched(before), ["the model is stored in another number type"]
        return wrong + self._patched(before), []

    def _patched(self, before: Fingerprint) -> list[str]:
        return (
            [] if self.patches == before.patches else ["other LoRAs are applied to the model than in the state's run"]
        )


def digest_of(tensors: Sequence[Tensor], words: str = "", samples: int = 0) -> str:
    """One short digest of tensors and words."""
    return bytes(_print(tensors, words, samples)[0].tolist()).hex()


def _compare(now: Digests, then: Digests, share: float) -> tuple[list[int], list[int]]:
    """Places that differ, and places that differ by rounding."""
    same, close = now.same(then), now.close(then, share)
    different = [i for i, (s, c) in enumerate(zip(same, close, strict=True)) if not s and not c]
    return different, [i for i, (s, c) in enumerate(zip(same, close, strict=True)) if not s and c]


def _pairs(pictures: Digests, captions: Digests) -> list[bytes]:
    """The digests of every picture and its caption, as one."""
    return [bytes(pair) for pair in torch.cat([pictures.digests, captions.digests], 1).tolist()]


def _listed(names: Sequence[str], what: str) -> str:
    """Such as '2 layers (a, b)'."""
    more = ", …" if len(names) > NAMED else ""
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({', '.join(escaped(n) for n in names[:NAMED])}{more})"


def _print(tensors: Sequence[Tensor], words: str, samples: int) -> tuple[Tensor, Tensor]:
    shapes, values = hashlib.blake2b(words.encode(), digest_size=_HALF), hashlib.blake2b(digest_size=_HALF)
    kept: list[Tensor] = []
    for tensor in tensors:
        shapes.update(repr(tuple(tensor.shape)).encode())
        flat = tensor.detach().reshape(-1)
        if samples:
            flat = flat[:: max(1, flat.numel() // samples)][:samples]
        flat = flat.to("cpu").contiguous()
        values.update(str(flat.dtype).encode())
        if flat.numel():
            values.update(flat.view(torch.uint8).numpy().data)
        if flat.is_floating_point():
            kept.append(flat[:: max(1, flat.numel() // SKETCH)][:SKETCH].float())
    sketch = torch.zeros(SKETCH)
    for tensor in kept:  # later tensors fold in: each has its say
        sketch[: len(tensor)] += tensor
    digest = torch.tensor(list(shapes.digest() + values.digest()), dtype=torch.uint8)
    return digest, torch.nan_to_num(sketch)


def plain(options: Mapping[str, object]) -> tuple[list[Tensor], str]:
    """The tensors and the words of a table of options, in the order of their names; other things by their kind."""
    tensors: list[Tensor] = []
    words: list[str] = []
    for name in sorted(map(str, options)):
        value = options.get(name)
        if isinstance(value, Tensor):
            tensors.append(value)
        words.append(
            f"{name}={value!r}" if isinstance(value, (bool, int, float, str)) else f"{name}:{type(value).__name__}"
        )
    return tensors, ";".join(words)

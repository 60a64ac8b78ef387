"""A training state: all that a run needs to go on bit for bit, as tensors and plain values in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Generator, Tensor

from ..files.reader import read_file, read_metadata
from ..files.writer import data
from ..util.errors import LoraError
from ..util.safe_json import load_json
from ..util.text import escaped

KEY = "lora2_state"
FORMAT = 2
MAX_STEPS = 100_000_000
"""More than any run has: what a state may claim."""

TEXT_LIMIT = 12 << 20
DEPTH_LIMIT = 6

_GENERATOR_BYTES, _WORDS = 5056, 624
"""What torch's CPU generator (a Mersenne twister of 624 words) hands out."""


class State:
    """Tensors and plain values of a run, or of a part of one.

    tensors: on the CPU, under names whose parts are joined by dots. facts: what JSON can hold, a table for every part.
    The methods that hand a value out check it first: a state may come from a damaged file, or from a stranger.
    """

    def __init__(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        self.facts = dict(facts)

    @classmethod
    def joined(cls, **parts: State) -> State:
        """One state of several parts, each under its name."""
        tensors = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.tensors.items()}
        return cls._over(tensors, {name: part.facts for name, part in parts.items()})

    @classmethod
    def _over(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> State:
        """A state over these very tensors, without a copy."""
        state = cls({}, facts)
        state.tensors = tensors
        return state

    def with_parts(self, **parts: State) -> State:
        """The same joined state with more parts."""
        more = State.joined(**parts)
        return self._over({**self.tensors, **more.tensors}, {**self.facts, **more.facts})

    def part(self, name: str) -> State:
        """One part of a joined state; raises LoraError if there is none."""
        facts = self.facts.get(name)
        if not isinstance(facts, dict):
            raise_corrupted(f"it has no part {name!r}")
        start = f"{name}."
        return State._over({k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(start)}, facts)

    def tensor(
        self, name: str, shape: Sequence[int | None], dtype: torch.dtype = torch.float32, finite: bool = True
    ) -> Tensor:
        """A tensor of this shape (None: any size) and type, its values finite if asked; raises LoraError for another."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise_corrupted(f"{escaped(name)} is missing")
        fits = len(shape) == tensor.ndim and all(s in (None, n) for s, n in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.dtype != dtype:
            raise_corrupted(f"{escaped(name)} has the shape {list(tensor.shape)} and the type {tensor.dtype}")
        if finite and dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            raise_corrupted(f"{escaped(name)} holds NaN or infinity")
        return tensor

    def number(self, name: str, low: float, high: float) -> float:
        """A number of the facts within bounds; raises LoraError for anything else."""
        value = self.facts.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise_corrupted(f"{name} is {escaped(value)}")
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number of the facts within bounds; raises LoraError for anything else."""
        value = self.facts.get(name)
        if type(value) is not int or not low <= value <= high:
            raise_corrupted(f"{name} is {escaped(value)}")
        return value

    def flag(self, name: str) -> bool:
        """A yes or no of the facts; raises LoraError for anything else."""
        value = self.facts.get(name)
        if not isinstance(value, bool):
            raise_corrupted(f"{name} is {escaped(value)}")
        return value

    def text(self, name: str) -> str:
        """A text of the facts; raises LoraError for anything else."""
        value = self.facts.get(name)
        if not isinstance(value, str):
            raise_corrupted(f"{name} is no text")
        return value

    def items(self, name: str, kind: type, count: int | None = None) -> list[Any]:
        """A list of the facts, all of one kind, of this length if given; raises LoraError for anything else."""
        value = self.facts.get(name)
        if not isinstance(value, list) or not all(type(v) is kind for v in value) or count not in (None, len(value)):
            raise_corrupted(f"the list {name} is not what it must be")
        return value

    def metadata(self) -> dict[str, str]:
        """The facts as a file holds them, with the digest of the tensors."""
        facts = {**self.facts, "format": FORMAT, "digest": digest(self.tensors)}
        return {KEY: json.dumps(facts, allow_nan=False, separators=(",", ":"))}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Changes when any bit of the tensors does."""
    found = hashlib.blake2b(digest_size=16)
    for piece in data(tensors):
        found.update(piece)
    return found.hexdigest()


def raise_corrupted(what: str) -> NoReturn:
    """Raise the error for a state that contradicts itself."""
    raise LoraError(f"The training state is damaged: {what}. Choose an older state, or continue from the LoRA file.")


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a state file, without its tensors; raises LoraError where it is no state or a damaged one."""
    text = read_metadata(path).get(KEY)
    if text is None:
        raise LoraError(f"{escaped(path.name)} is not a training state of LoRA².")
    facts = load_json(text, TEXT_LIMIT, DEPTH_LIMIT, raise_corrupted, "its facts have")
    if not isinstance(facts, dict) or type(facts.get("format")) is not int:
        raise_corrupted("it has no format number")
    if facts["format"] != FORMAT:
        raise LoraError(
            f"The training state {escaped(path.name)} has format {facts['format']}, this version of LoRA² knows {FORMAT}: "
            "continue it with the version that made it, or continue from the LoRA file."
        )
    return facts


def read_state(path: Path, most_bytes: int) -> State:
    """A state file's facts and tensors; raises LoraError where it is damaged or larger than any state of the run could be."""
    facts = read_facts(path)
    size = path.stat().st_size
    if size > most_bytes:
        raise_corrupted(f"it has {size} bytes, a state of these layers has at most {most_bytes}")
    state = State._over(read_file(path)[0], facts)
    if digest(state.tensors) != facts.get("digest"):
        raise_corrupted("its numbers are not those that were written")
    return state


def restore_generator(generator: Generator, state: State, name: str) -> None:
    """Put a CPU generator where the state has it; raises LoraError for bytes that are no place of it.

    torch reads past its table for counters that do not belong together: the place of the next word and the words left,
    which add up to 625 but for a generator that was never asked.
    """
    words = state.tensor(name, (_GENERATOR_BYTES,), torch.uint8)
    left = int(words[8:12].view(torch.int32))
    following = int(words[16:24].view(torch.int64))
    if (left, following) != (1, 0) and not (1 <= left <= _WORDS and left + following == _WORDS + 1):
        raise_corrupted(f"{name} is no state of a random generator")
    try:
        generator.set_state(words.clone())
    except (RuntimeError, TypeError) as error:
        raise_corrupted(f"{name} is no state of a random generator ({escaped(error)})")

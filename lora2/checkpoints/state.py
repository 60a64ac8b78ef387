"""A training state: everything that resumes a run bit for bit, as tensors and JSON values in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Generator, Tensor

from ..files.reader import read_file, read_metadata
from ..files.writer import data as file_chunks
from ..util.errors import LoraError
from ..util.safe_json import load_json
from ..util.text import escaped

KEY = "lora2_state"
FORMAT = 3
MAX_STEPS = 100_000_000
"""Upper bound of the step counts in a state file."""

MAX_TEXT = 12 << 20
MAX_DEPTH = 6

_GENERATOR_BYTES, _GENERATOR_WORDS = 5056, 624
"""Size of the state of torch's CPU generator, a Mersenne twister of 624 words."""


class State:
    """Tensors and JSON values of a run, or of a part of one.

    tensors: on the CPU, named "part.name". facts: JSON values, one table for each part. The accessors check types and bounds:
    the file may be corrupted, or come from a stranger. They raise LoraError.
    """

    def __init__(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        self.facts = dict(facts)

    @classmethod
    def joined(cls, **parts: State) -> State:
        """One state of several named parts."""
        tensors = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.tensors.items()}
        return cls._over(tensors, {name: part.facts for name, part in parts.items()})

    @classmethod
    def _over(cls, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> State:
        """A state that shares these tensors instead of copying them."""
        state = cls({}, facts)
        state.tensors = tensors
        return state

    def with_parts(self, **parts: State) -> State:
        """The same joined state with more parts."""
        more = State.joined(**parts)
        return self._over({**self.tensors, **more.tensors}, {**self.facts, **more.facts})

    def part(self, name: str) -> State:
        """One part of a joined state."""
        facts = self.facts.get(name)
        if not isinstance(facts, dict):
            raise_corrupted(f"part {name!r} is missing")
        prefix = f"{name}."
        tensors = {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}
        return State._over(tensors, facts)

    def tensor(
        self, name: str, shape: Sequence[int | None], dtype: torch.dtype = torch.float32, finite: bool = True
    ) -> Tensor:
        """A tensor of this shape (None: any size) and type. finite: refuse NaN and infinity."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise_corrupted(f"tensor {escaped(name)} is missing")
        fits = len(shape) == tensor.ndim and all(s in (None, n) for s, n in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.dtype != dtype:
            raise_corrupted(f"tensor {escaped(name)} has shape {list(tensor.shape)} and type {tensor.dtype}")
        if finite and dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            raise_corrupted(f"tensor {escaped(name)} contains NaN or infinity")
        return tensor

    def number(self, name: str, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.facts.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise_corrupted(f"{name} = {escaped(value)} must lie between {low} and {high}")
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        value = self.facts.get(name)
        if type(value) is not int or not low <= value <= high:
            raise_corrupted(f"{name} = {escaped(value)} must be an integer between {low} and {high}")
        return value

    def flag(self, name: str) -> bool:
        """A boolean."""
        value = self.facts.get(name)
        if not isinstance(value, bool):
            raise_corrupted(f"{name} = {escaped(value)} must be true or false")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.facts.get(name)
        if not isinstance(value, str):
            raise_corrupted(f"{name} = {escaped(value)} must be a text")
        return value

    def list_of(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        """A list whose elements have exactly this type, of this length if given."""
        value = self.facts.get(name)
        if not isinstance(value, list) or not all(type(v) is kind for v in value) or length not in (None, len(value)):
            raise_corrupted(f"{name} must be a list of {'' if length is None else length} {kind.__name__}")
        return value

    def metadata(self) -> dict[str, str]:
        """The file's metadata: the facts as JSON, with the format and a digest of the tensors."""
        facts = {**self.facts, "format": FORMAT, "digest": digest(self.tensors)}
        return {KEY: json.dumps(facts, allow_nan=False, separators=(",", ":"))}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of the tensors' bytes in the file."""
    result = hashlib.blake2b(digest_size=16)
    for chunk in file_chunks(tensors):
        result.update(chunk)
    return result.hexdigest()


def raise_corrupted(problem: str) -> NoReturn:
    """Raise LoraError for a training state that contradicts itself."""
    raise LoraError(
        f"The training state is corrupted: {problem}. Choose an older state, or continue from the LoRA file."
    )


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a state file, without its tensors. Raises LoraError for another kind of file, another format or a corrupted one."""
    text = read_metadata(path).get(KEY)
    if text is None:
        raise LoraError(f"{escaped(path.name)} is not a training state of LoRA².")
    facts = load_json(text, MAX_TEXT, MAX_DEPTH, raise_corrupted, "its facts have")
    if not isinstance(facts, dict) or type(facts.get("format")) is not int:
        raise_corrupted("it has no format number")
    if facts["format"] != FORMAT:
        raise LoraError(
            f"The training state {escaped(path.name)} has format {facts['format']}, this version of LoRA² knows {FORMAT}: "
            "continue it with the version that made it, or continue from the LoRA file."
        )
    return facts


def read_state(path: Path, max_bytes: int) -> State:
    """A state file's facts and tensors. Raises LoraError where it is corrupted or larger than `max_bytes`."""
    facts = read_facts(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise_corrupted(f"it has {size} bytes, a state of these layers has at most {max_bytes}")
    state = State._over(read_file(path)[0], facts)
    if digest(state.tensors) != facts.get("digest"):
        raise_corrupted("its tensors do not match their digest")
    return state


def restore_generator(generator: Generator, state: State, name: str) -> None:
    """Restore a CPU generator. Raises LoraError for bytes that are no state of it.

    torch does not check the two counters and reads past its table where they disagree: the next word and the words left add up
    to 625, except in a generator that was never used.
    """
    data = state.tensor(name, (_GENERATOR_BYTES,), torch.uint8)
    words_left, next_word = int(data[8:12].view(torch.int32)), int(data[16:24].view(torch.int64))
    unused = (words_left, next_word) == (1, 0)
    if not unused and not (1 <= words_left <= _GENERATOR_WORDS and words_left + next_word == _GENERATOR_WORDS + 1):
        raise_corrupted(f"{name} is no state of a random generator")
    try:
        generator.set_state(data.clone())
    except (RuntimeError, TypeError) as error:
        raise_corrupted(f"{name} is no state of a random generator ({escaped(error)})")

"""A safetensors file as parts that can be changed one by one, and back to bytes: well-formed or broken on purpose."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip


@dataclass
class Part:
    """One tensor: its name, type, shape, bytes."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes

    def fitted(self) -> bytes:
        """The bytes repeated or cut so that shape and type are right; at most 64 KiB, beyond which it stays short."""
        size = min(math.prod(self.shape) * SIZES.get(self.dtype, 1), 1 << 16)
        source = self.data or b"\0"
        return (source * (size // len(source) + 1))[:size]


@dataclass
class Parts:
    """A file: its tensors in order, its metadata, and header entries that replace the right ones."""

    tensors: list[Part] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file; right in itself unless overrides say otherwise."""
        entries: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        pieces, offset = [], 0
        for part in self.tensors:
            if part.name in entries:
                continue
            data = part.fitted()
            entries[part.name] = {
                "dtype": part.dtype,
                "shape": part.shape,
                "data_offsets": [offset, offset + len(data)],
            }
            pieces.append(data)
            offset += len(data)
        return with_header(dump(entries | self.overrides), b"".join(pieces))


def dump(value: Any) -> bytes:
    """JSON as a file holds it; lone surrogates stay escaped."""
    return json.dumps(value, separators=(",", ":")).encode()


def with_header(text: bytes, data: bytes = b"") -> bytes:
    """A file of this header and this data."""
    return len(text).to_bytes(8, "little") + text + data


def take_apart(raw: bytes) -> Parts | None:
    """The parts of a file that is right enough to have any."""
    length = int.from_bytes(raw[:8], "little")
    try:
        entries = json.loads(raw[8 : 8 + length])
        found = Parts(metadata=dict(entries.pop("__metadata__", {})))
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            shape = [int(n) for n in entry["shape"]]
            if min(shape, default=0) < 0 or math.prod(shape) > 1 << 20:
                continue
            found.tensors.append(
                Part(name, str(entry["dtype"]), shape, raw[8 + length + begin : 8 + length + end][: 1 << 16])
            )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    return found

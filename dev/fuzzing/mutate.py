"""One step from a file to another that is nearly right: names, types, shapes, offsets, values, metadata, our JSON, bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from .corpus import LAYERS, OTHERS, PAIRS, WORDS, account, layer
from .files import SIZES, Part, Parts, dump, take_apart, with_header

NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, 8, 255, 65_535, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63,
    1 << 64, 10**30, -1,
    0.5, -0.0, 5e-324, 1e308, -1e308, float("nan"), float("inf"), True, False, None, "1", "", [], {},
)  # fmt: skip
SHAPES: tuple[list[int], ...] = (
    [], [0], [1], [2, 2], [4, 2], [2, 3], [0, 4], [4, 0], [4, 2, 1, 1], [2, 3, 3, 3], [1, 60], [60, 1], [2, 0, 3],
    [1] * 8, [1] * 9,
)  # fmt: skip
VALUES = (
    b"\0\x7e", b"\0\x7c", b"\xff\x7b", b"\x01\0", b"\0\0", b"\xff\xff", b"\0\x80", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f",
)  # fmt: skip
MOST_BYTES = 1 << 19


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Another file, by one to four steps; never longer than MOST_BYTES."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parts = take_apart(raw)
        if parts is None or rng.random() < 0.15:
            raw = rng.choice(BYTES)(raw, rng)
        else:
            changed = copy.deepcopy(parts)
            rng.choice(STEPS)(changed, rng)
            raw = changed.to_bytes()
    return raw[:MOST_BYTES]


def _some(parts: Parts, rng: random.Random) -> Part:
    if not parts.tensors:
        parts.tensors.extend(layer(rng.choice(LAYERS)))
    return rng.choice(parts.tensors)


def _name(parts: Parts, rng: random.Random) -> None:
    part = _some(parts, rng)
    prefix, dot, ending = part.name.partition(".")
    part.name = rng.choice((
        rng.choice(WORDS) + dot + ending, prefix + rng.choice(OTHERS), prefix + rng.choice(rng.choice(PAIRS)), rng.choice(WORDS),
        _spliced(part.name, rng), prefix + rng.choice(WORDS) + dot + ending,
    ))  # fmt: skip


def _shape(parts: Parts, rng: random.Random) -> None:
    part = _some(parts, rng)
    part.shape = rng.choice((list(rng.choice(SHAPES)), part.shape[::-1], [*part.shape, 1], part.shape[1:]))


def _rank(parts: Parts, rng: random.Random) -> None:
    """Both factors of one layer to another rank and other sizes, so that they fit."""
    prefix = _some(parts, rng).name.partition(".")[0]
    rank, size = rng.choice((0, 1, 2, 7, 40)), (rng.choice((1, 2, 5, 33)), rng.choice((1, 3, 20)))
    for part in parts.tensors:
        if part.name.startswith(prefix) and len(part.shape) >= 2:
            up = any(part.name.endswith(pair[0]) for pair in PAIRS)
            part.shape = [size[0], rank, *part.shape[2:]] if up else [rank, size[1], *part.shape[2:]]


def _dtype(parts: Parts, rng: random.Random) -> None:
    for part in parts.tensors if rng.random() < 0.3 else [_some(parts, rng)]:
        part.dtype = rng.choice((*SIZES, "F8_E8M0", "F4", "f16", ""))


def _values(parts: Parts, rng: random.Random) -> None:
    part = _some(parts, rng)
    data = bytearray(part.data or b"\0" * 8)
    value, at = rng.choice(VALUES), rng.randrange(len(data))
    data[at : at + len(value)] = value
    part.data = rng.choice((bytes(data), value, rng.randbytes(len(data))))


def _more(parts: Parts, rng: random.Random) -> None:
    style, dtype = rng.randrange(len(PAIRS)), rng.choice(list(SIZES))
    prefix = rng.choice(LAYERS) + rng.choice(("", rng.choice(WORDS), str(rng.randrange(100))))
    parts.tensors.extend(
        layer(prefix, rng.randrange(5), (rng.randrange(1, 5), 3), style, dtype, rng.choice((0, 0, 1, 3)))
    )


def _other(parts: Parts, rng: random.Random) -> None:
    """What makes a layer another kind of layer."""
    prefix = _some(parts, rng).name.partition(".")[0]
    shape, dtype = list(rng.choice(SHAPES)), rng.choice(list(SIZES))
    parts.tensors.append(Part(prefix + rng.choice(OTHERS), dtype, shape, rng.choice(VALUES)))


def _fewer(parts: Parts, rng: random.Random) -> None:
    if parts.tensors:
        parts.tensors.pop(rng.randrange(len(parts.tensors)))


def _order(parts: Parts, rng: random.Random) -> None:
    rng.shuffle(parts.tensors)


def _override(parts: Parts, rng: random.Random) -> None:
    """An entry of the header that lies."""
    part = _some(parts, rng)
    entry: dict[str, Any] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [0, len(part.fitted())]}
    key = rng.choice(list(entry))
    entry[key] = rng.choice((
        rng.choice(NUMBERS), [rng.choice(NUMBERS) for _ in range(rng.randrange(4))], entry[key], rng.choice(WORDS),
        [n + rng.choice((-1, 1, 8)) for n in entry["data_offsets"]],
    ))  # fmt: skip
    if rng.random() < 0.1:
        del entry[key]
    parts.overrides[part.name] = rng.choice((entry, entry, entry, rng.choice(NUMBERS), [entry]))


def _metadata(parts: Parts, rng: random.Random) -> None:
    keys = (
        "ss_output_name",
        "modelspec.title",
        "ss_network_dim",
        "ss_sd_model_name",
        "ss_steps",
        "lora_adapter_metadata",
    )
    key = rng.choice((*keys, rng.choice(WORDS)))
    parts.metadata[key] = rng.choice((rng.choice(WORDS), rng.choice(WORDS), rng.choice(NUMBERS)))


def _account(parts: Parts, rng: random.Random) -> None:
    """Our own JSON, changed somewhere inside."""
    try:
        raw = json.loads(parts.metadata["lora2"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raw = json.loads(account(parts.tensors))
    if rng.random() < 0.3:
        parts.metadata["lora2"] = _spliced(json.dumps(raw), rng)
        return
    holder, key = None, None
    value = raw
    while isinstance(value, dict) and value and (holder is None or rng.random() < 0.8):
        holder, key = value, rng.choice(list(value))
        value = holder[key]
    if holder is not None:
        holder[rng.choice((key, key, key, rng.choice(WORDS), "nu", "order", "rank"))] = rng.choice((
            rng.choice(NUMBERS), rng.choice(WORDS), {rng.choice(WORDS): rng.choice(NUMBERS)},
            [rng.choice(NUMBERS)] * rng.randrange(5),
            {"rank": 0, "shape": [rng.choice(NUMBERS), 3]},
            {"rank": 2, "nu": rng.choice(NUMBERS), "order": "importance"}, "singular",
        ))  # fmt: skip
    parts.metadata["lora2"] = json.dumps(raw)


def _spliced(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(WORDS)[:50] + text[at + rng.randrange(4) :]


def _bits(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw or b"\0")
    for _ in range(rng.randrange(1, 5)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def _cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def _length(raw: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(raw[:8], "little") + rng.choice((-8, -1, 1, 8, 1 << 24, 1 << 40))
    return (length % (1 << 64)).to_bytes(8, "little") + raw[8:]


def _header_text(raw: bytes, rng: random.Random) -> bytes:
    """The header's JSON with something put in, its length made right again."""
    length = min(int.from_bytes(raw[:8], "little"), len(raw))
    text, at = raw[8 : 8 + length], rng.randrange(length + 1)
    pieces = (b"[", b"]", b"{", b"}", b",", b'"', b"\\u0000", b"\\ud800", b"\xff", b"-", b"e", b"9" * 30, b"NaN")
    piece = rng.choice((*pieces, dump(rng.choice(WORDS))))
    return with_header(text[:at] + piece * rng.choice((1, 1, 2, 50)) + text[at + rng.randrange(3) :], raw[8 + length :])


STEPS: tuple[Callable[[Parts, random.Random], None], ...] = (
    _name, _shape, _rank, _dtype, _values, _more, _other, _fewer, _order, _override, _metadata, _account, _account,
)  # fmt: skip
BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_bits, _cut, _length, _header_text, _header_text)

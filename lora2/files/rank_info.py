"""Our own JSON in a file's metadata, read as what it is: text from a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypedDict, cast

from ..method.factors import Factors
from ..util.errors import LoraError
from ..util.safe_json import load_json
from ..util.text import escaped

KEY = "lora2"
FORMAT = 1
TEXT_LIMIT = 8 << 20
DEPTH_LIMIT = 8
EMPTY_LIMIT = 10_000

Order = Literal["importance", "singular"]


class LayerInfo(TypedDict):
    """What our JSON says of one layer: shape is the weight's, order that of the positions."""

    rank: int
    nu: float | None
    target: float | None
    shape: list[int]
    order: Order


class RankInfo(TypedDict):
    """Our JSON: its version, the layers by prefix, and the settings of the training as plain values."""

    format: int
    layers: dict[str, LayerInfo]
    training: dict[str, Any]


def layer_info(
    factors: Factors, *, nu: float | None = None, target: float | None = None, order: Order = "singular"
) -> LayerInfo:
    """The entry of one layer, from its factors and what training knows of it."""
    shape = [factors.up.shape[0], *factors.down.shape[1:]]
    return {"rank": factors.rank, "nu": nu, "target": target, "shape": shape, "order": order}


def parse(text: str, layers: Mapping[str, Factors]) -> tuple[RankInfo, list[str]]:
    """Our JSON, checked against the layers of the file, and notes on what it had wrong.

    Where it disagrees with a tensor, the tensor wins. Layers that the file lacks are kept only where they say
    rank 0: they were left out on purpose. Raises LoraError where it is too long or too deep, no JSON, of
    another shape or version, or holds a number that is not finite.
    """
    raw = load_json(text, TEXT_LIMIT, DEPTH_LIMIT, _refuse)
    if not isinstance(raw, dict) or not isinstance(raw.get("layers"), dict):
        _refuse("it has no table of layers")
    if type(raw.get("format")) is not int:
        _refuse("it has no format number")
    if raw["format"] != FORMAT:
        _refuse(f"it has format {escaped(raw['format'])}, this version of LoRA² knows {FORMAT}; an update may help")
    training = raw.get("training", {})
    if not isinstance(training, dict):
        _refuse("its training settings are no table")
    known, notes = _layers(raw["layers"], layers)
    return {"format": FORMAT, "layers": known, "training": training}, notes


def _layers(raw: Mapping[str, Any], layers: Mapping[str, Factors]) -> tuple[dict[str, LayerInfo], list[str]]:
    """The entries that can be used, and one note for each kind of trouble."""
    known: dict[str, LayerInfo] = {}
    trouble: dict[str, list[str]] = {}
    left_out = 0
    for prefix, entry in raw.items():
        if prefix in layers:
            known[prefix], wrong = _layer(entry, layers[prefix])
            for kind in wrong:
                trouble.setdefault(kind, []).append(prefix)
        elif (empty := _empty_layer(entry)) is not None and left_out < EMPTY_LIMIT:
            known[prefix] = empty
            left_out += 1
        else:
            trouble.setdefault("the file has no such layer", []).append(prefix)
    notes = [
        f"Metadata of {len(names)} layer{'s' * (len(names) > 1)} not used: {kind} (first: {escaped(names[0])})."
        for kind, names in trouble.items()
    ]
    return known, notes


def _layer(entry: Any, factors: Factors) -> tuple[LayerInfo, list[str]]:
    """One layer's entry; what it leaves out comes from the tensors, what is wrong is named and left out."""
    info = layer_info(factors)
    if not isinstance(entry, dict):
        return info, ["the entry is malformed"]
    wrong = []
    if "rank" in entry and not _is(entry["rank"], factors.rank):
        wrong.append("its rank differs from the tensors'")
    if "shape" in entry and entry["shape"] != info["shape"]:
        wrong.append("its shape differs from the tensors'")
    nu, target, order = entry.get("nu"), entry.get("target"), entry.get("order", "importance")
    if nu is not None and not (_number(nu) and nu > 0):
        wrong.append("its ν is no positive number")
        nu = None
    if target is not None and not (_number(target) and target >= 0):
        wrong.append("its target is no rank")
        target = None
    if order not in ("importance", "singular"):
        wrong.append("its order is unknown")
        order = "singular"
    info["nu"], info["target"] = nu, target
    info["order"] = cast(Order, order) if nu is not None else "singular"
    return info, wrong


def _empty_layer(entry: Any) -> LayerInfo | None:
    """The entry of a layer that was left out because its rank came to 0, or None for any other."""
    if not isinstance(entry, dict) or not _is(entry.get("rank"), 0):
        return None
    shape = entry.get("shape")
    if not isinstance(shape, list) or not 2 <= len(shape) <= DEPTH_LIMIT:
        return None
    if not all(type(size) is int and 0 < size < 1 << 31 for size in shape):
        return None
    return {"rank": 0, "nu": None, "target": None, "shape": shape, "order": "singular"}


def _number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 53)


def _is(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def _refuse(why: str) -> NoReturn:
    raise LoraError(f"The file's own account of its ranks is not used: {why}.")

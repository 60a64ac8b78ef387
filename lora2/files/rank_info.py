"""The pack's own JSON in a file's metadata: ranks, ν and training settings. Untrusted when read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypedDict, cast

from ..method.factors import Factors
from ..util.errors import LoraError
from ..util.safe_json import load_json
from ..util.text import escaped

KEY = "lora2"
FORMAT = 1
MAX_LENGTH = 8 << 20
MAX_DEPTH = 8
MAX_REMOVED_LAYERS = 10_000
MAX_DIMENSIONS = 8

Order = Literal["importance", "singular"]


class LayerInfo(TypedDict):
    """One layer: rank, ν, target rank, shape of the weight, order of its components."""

    rank: int
    nu: float | None
    target: float | None
    shape: list[int]
    order: Order


class RankInfo(TypedDict):
    """The whole JSON: its version, the layers by prefix, and the training settings as plain values."""

    format: int
    layers: dict[str, LayerInfo]
    training: dict[str, Any]


def layer_info(
    factors: Factors, *, nu: float | None = None, target: float | None = None, order: Order = "singular"
) -> LayerInfo:
    """The entry of one layer. nu, target: None if they were not trained."""
    shape = [factors.up.shape[0], *factors.down.shape[1:]]
    return {"rank": factors.rank, "nu": nu, "target": target, "shape": shape, "order": order}


def parse(text: str, layers: Mapping[str, Factors]) -> tuple[RankInfo, list[str]]:
    """The JSON, validated against the layers of the file, and notes on its errors.

    Tensors take precedence over entries that contradict them. Entries of layers that the file lacks are kept only with rank 0:
    pruning removed those. Raises LoraError if the text is too long or too deeply nested, no JSON, of another structure or
    format, or contains a number that is not finite.
    """
    raw = load_json(text, MAX_LENGTH, MAX_DEPTH, _refuse)
    if not isinstance(raw, dict) or not isinstance(raw.get("layers"), dict):
        _refuse("it has no table of layers")
    if type(raw.get("format")) is not int:
        _refuse("it has no format number")
    if raw["format"] != FORMAT:
        _refuse(f"it has format {escaped(raw['format'])}, this version of LoRA² reads {FORMAT}; an update may help")
    training = raw.get("training", {})
    if not isinstance(training, dict):
        _refuse("its training settings are not a table")
    entries, notes = _validated_layers(raw["layers"], layers)
    return {"format": FORMAT, "layers": entries, "training": training}, notes


def _validated_layers(raw: Mapping[str, Any], layers: Mapping[str, Factors]) -> tuple[dict[str, LayerInfo], list[str]]:
    """The usable entries, and one note for each kind of error."""
    entries: dict[str, LayerInfo] = {}
    errors: dict[str, list[str]] = {}
    removed = 0
    for prefix, entry in raw.items():
        if prefix in layers:
            entries[prefix], problems = _validated_layer(entry, layers[prefix])
            for problem in problems:
                errors.setdefault(problem, []).append(prefix)
        elif (info := _removed_layer(entry)) is not None and removed < MAX_REMOVED_LAYERS:
            entries[prefix] = info
            removed += 1
        else:
            errors.setdefault("the file has no such layer", []).append(prefix)
    notes = [
        f"Metadata of {len(names)} layer{'s' * (len(names) > 1)} not used: {problem} (first: {escaped(names[0])})."
        for problem, names in errors.items()
    ]
    return entries, notes


def _validated_layer(entry: Any, factors: Factors) -> tuple[LayerInfo, list[str]]:
    """One layer's entry and its errors; missing and wrong values are replaced by those of the tensors."""
    info = layer_info(factors)
    if not isinstance(entry, dict):
        return info, ["the entry is malformed"]
    problems = []
    if "rank" in entry and not _equals(entry["rank"], factors.rank):
        problems.append("its rank differs from the tensors'")
    if "shape" in entry and entry["shape"] != info["shape"]:
        problems.append("its shape differs from the tensors'")
    nu, target, order = entry.get("nu"), entry.get("target"), entry.get("order", "importance")
    if nu is not None and not (_is_number(nu) and nu > 0):
        problems.append("its ν is not a positive number")
        nu = None
    if target is not None and not (_is_number(target) and target >= 0):
        problems.append("its target is not a rank")
        target = None
    if order not in ("importance", "singular"):
        problems.append("its order is unknown")
        order = "singular"
    info["nu"], info["target"] = nu, target
    info["order"] = cast(Order, order) if nu is not None else "singular"
    return info, problems


def _removed_layer(entry: Any) -> LayerInfo | None:
    """The entry of a layer that was pruned to rank 0; None for any other."""
    if not isinstance(entry, dict) or not _equals(entry.get("rank"), 0):
        return None
    shape = entry.get("shape")
    if not isinstance(shape, list) or not 2 <= len(shape) <= MAX_DIMENSIONS:
        return None
    if not all(type(size) is int and 0 < size < 1 << 31 for size in shape):
        return None
    return {"rank": 0, "nu": None, "target": None, "shape": shape, "order": "singular"}


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float represents."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 53)


def _equals(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def _refuse(why: str) -> NoReturn:
    raise LoraError(f"The rank metadata of this file is not used: {why}.")

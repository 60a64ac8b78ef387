"""The metadata of a LoRA file: keys that other tools read, and the pack's own JSON (rank_info.py).

The `ss_*` and `sshs_*` keys are those of kohya's sd-scripts, the `modelspec.*` keys those of Stability's ModelSpec 1.0.1; all
values are strings. `lora_adapter_metadata` is never written: diffusers refuses it beside alphas.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from torch import Tensor

from .families import FAMILIES, Family
from .rank_info import FORMAT, KEY, LayerInfo, RankInfo
from .writer import data, header

MAX_VIEWABLE_HEADER = 1 << 20
"""Header bytes beyond which ComfyUI's /view_metadata shows nothing."""

_RUN_KEYS = ("ss_output_name", "modelspec.title", "modelspec.date")
"""Keys that describe the training run rather than the tensors."""


def build(
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    family: str,
    layers: Mapping[str, LayerInfo],
    training: Mapping[str, Any],
    prediction: str | None = None,
    resolution: tuple[int, int] | None = None,
    created: datetime | None = None,
    about_run: bool = True,
) -> dict[str, str]:
    """The metadata of a file with these tensors.

    name: the output's name. family: a key of FAMILIES, or another name, which is then written as it is. layers: entries by
    prefix. training: JSON-like settings; numbers that are not finite become null. prediction: "epsilon", "v" or "flow".
    resolution: (width, height) in pixels. created: local time; default now.

    about_run: False omits everything about the training run: name, date, resolution, settings, hashes. What is needed to read
    the file remains: family, prediction, and each layer's rank, ν, target, shape and order.

    The whole header stays below MAX_VIEWABLE_HEADER if possible, see `with_info`.
    """
    if not about_run:
        training, resolution = {}, None
    name, family = (text.encode("utf-8", "replace").decode("utf-8") for text in (name, family))
    known = FAMILIES.get(family, Family(family, family, "unknown"))
    created = created or datetime.now()
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "ss_base_model_version": known.base,
        "ss_v2": str(known.v2),
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{known.architecture}/lora",
        "modelspec.implementation": known.implementation,
        "modelspec.title": name,
        "modelspec.date": created.replace(microsecond=0).isoformat(),
    }
    if prediction in ("epsilon", "v"):
        metadata["modelspec.prediction_type"] = prediction
    if resolution is not None:
        metadata["modelspec.resolution"] = f"{resolution[0]}x{resolution[1]}"
    if not about_run:
        for key in _RUN_KEYS:
            del metadata[key]
        return with_info(tensors, metadata, {"format": FORMAT, "layers": dict(layers), "training": {}})
    metadata["sshs_model_hash"] = model_hash(tensors)
    metadata["sshs_legacy_hash"] = legacy_hash(tensors, metadata)
    return with_info(tensors, metadata, {"format": FORMAT, "layers": dict(layers), "training": dict(training)})


def with_info(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], info: RankInfo) -> dict[str, str]:
    """The metadata with the pack's own JSON in as much detail as MAX_VIEWABLE_HEADER permits.

    If the header is too long, shapes and targets are dropped first, then everything but ν, then all layers. If the entries
    of the tensors alone (some 300 bytes a layer) exceed the limit, nothing is dropped.
    """
    full = {**metadata, KEY: _dump(info)}
    for text in (full[KEY], *_shorter(info)):
        candidate = {**metadata, KEY: text}
        if len(header(tensors, candidate)) < MAX_VIEWABLE_HEADER:
            return candidate
    return full


def _dump(info: Mapping[str, Any]) -> str:
    return json.dumps(_plain(info), ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """The value as JSON: numbers that are not finite become null, other objects their text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _shorter(info: RankInfo) -> Iterator[str]:
    """The JSON with less and less detail."""
    layers = info["layers"]
    brief = {p: {"nu": layer["nu"], "order": layer["order"]} for p, layer in layers.items()}
    yield _dump({**info, "layers": brief})
    rates = {p: layer["nu"] for p, layer in layers.items() if layer["order"] == "importance"}
    yield _dump({**info, "layers": {p: {"nu": float(f"{nu:.6g}")} for p, nu in rates.items() if nu is not None}})
    yield _dump({**info, "layers": {}})
    yield _dump({"format": info["format"], "layers": {}, "training": {}})


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """sd-scripts' `sshs_model_hash`: SHA-256 of the file after its header."""
    digest = hashlib.sha256()
    for piece in data(tensors):
        digest.update(piece)
    return digest.hexdigest()


def legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sd-scripts' `sshs_legacy_hash`: 8 hex digits of SHA-256 over 64 KiB from 1 MiB on.

    Computed on the file with only the `ss_*` keys as its metadata.
    """
    digest = hashlib.sha256()
    begin, end = 0x100000, 0x110000
    offset = 0
    first = header(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    for piece in (memoryview(first), *data(tensors)):
        digest.update(piece[max(begin - offset, 0) : max(end - offset, 0)])
        offset += len(piece)
        if offset >= end:
            break
    return digest.hexdigest()[:8]

"""Rank report of a LoRA: every layer's rank, and the size of the same layers at one uniform rank."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..method.factors import Factors
from ..method.svd import energy_rank
from ..util.errors import LoraError
from ..util.text import clean
from .layer_names import parse_layer_name
from .layer_rank import LayerRank, mean_rank, used_rank

if TYPE_CHECKING:
    from ..files.document import LoraDocument

UNIFORM_RANKS = (8, 16, 32, 64, 128, 256, 512)
ENERGY_SHARE = 0.99  # of Σ σ²: the rest is at most a tenth of the update's norm

# Metadata keys of other trainers, and the label displayed for each.
_FACTS = {
    "ss_base_model_version": "base model",
    "modelspec.architecture": "architecture",
    "ss_sd_model_name": "trained on",
    "ss_network_module": "network module",
    "ss_network_dim": "network dim",
    "ss_network_alpha": "network alpha",
    "ss_epoch": "epoch",
    "ss_steps": "steps",
    "ss_learning_rate": "learning rate",
    "ss_optimizer": "optimizer",
    "ss_num_train_images": "training images",
}
_MAX_TRAINING_FACTS = 24
_MAX_NOTES = 8


@dataclass(frozen=True)
class RankReport:
    """A LoRA's ranks as plain data; layers in the order in which the network runs.

    bytes: all factors and other tensors as stored (alphas, 4 bytes a layer, are left out so that sizes of
    equal ranks are equal); other_bytes of them belong to the other_tensors, which are no plain up/down pair.
    dtype: the type of most numbers; number_bytes: its size. facts: (name, value) from the metadata, shortened
    and without control characters, but not escaped for any markup; notes: problems found in the file.
    """

    title: str
    layers: tuple[LayerRank, ...]
    bytes: int
    dtype: str
    number_bytes: int
    other_tensors: int = 0
    other_bytes: int = 0
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def min_rank(self) -> int:
        """The smallest rank; 0 if a layer was removed."""
        return min(layer.rank for layer in self.layers)

    @property
    def max_rank(self) -> int:
        """The largest rank."""
        return max(layer.rank for layer in self.layers)

    @property
    def mean_rank(self) -> float:
        """Weighted by parameters per unit of rank: the one rank for all layers that weighs the same."""
        return mean_rank(self.layers)

    @property
    def mean_energy_rank(self) -> float | None:
        """The same mean of the ranks in use; None when they were not measured."""
        if all(layer.energy_rank is None for layer in self.layers):
            return None
        return mean_rank(self.layers, used_rank)

    @property
    def uniform_bytes(self) -> dict[int, int]:
        """Bytes of the same layers, in the same type, at one rank for all: {8: …, 16: …, …, 512: …}."""
        cost = sum(layer.cost for layer in self.layers)
        return {rank: rank * cost * self.number_bytes for rank in UNIFORM_RANKS}

    def to_dict(self) -> dict[str, object]:
        """The whole report for JSON: strings, finite numbers, None, lists and dicts."""
        return {
            "title": self.title,
            "bytes": self.bytes,
            "dtype": self.dtype,
            "rank": {"min": self.min_rank, "mean": self.mean_rank, "max": self.max_rank},
            "mean_energy_rank": self.mean_energy_rank,
            "uniform_bytes": {str(rank): number for rank, number in self.uniform_bytes.items()},
            "other_tensors": self.other_tensors,
            "other_bytes": self.other_bytes,
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text, ASCII only."""
        return json.dumps(self.to_dict(), allow_nan=False)


def build_report(
    doc: LoraDocument, title: str, energy: bool = False, between: Callable[[], None] = lambda: None
) -> RankReport:
    """The report of a LoRA document.

    title: the name to show; any text, made safe here. energy: also measure how many directions of each layer
    hold 99 % of its energy (takes some seconds for large files; `svd.energy_rank`). between: called before
    every layer, for a host that wants to stop by an exception.
    Raises LoraError if there is no plain LoRA layer, or if energy is asked for and a layer is not finite.
    """
    if not doc.layers:
        raise LoraError(
            "There is no plain LoRA layer in this file, so there are no ranks to show. "
            "Choose a file with pairs of lora_up and lora_down (or lora_A and lora_B) weights."
        )
    known = _entries(doc.info)
    layers = []
    for name, factors in doc.layers.items():
        between()
        layers.append(_layer(name, factors, known.get(name, {}), energy))
    layers += filter(None, (_removed(name, entry) for name, entry in known.items() if name not in doc.layers))
    numbers: Counter[str] = Counter()
    for tensor in _tensors(doc.layers):
        numbers[_type(tensor)] += tensor.numel()
    dtype = max(numbers, key=lambda name: (numbers[name], name))
    other = sum(_bytes(tensor) for tensor in doc.other.values())
    return RankReport(
        title=clean(title, 80) or "LoRA",
        layers=tuple(sorted(layers, key=lambda layer: layer.order)),
        bytes=sum(_bytes(tensor) for tensor in _tensors(doc.layers)) + other,
        dtype=dtype,
        number_bytes=next(t.element_size() for t in _tensors(doc.layers) if _type(t) == dtype),
        other_tensors=len(doc.other),
        other_bytes=other,
        facts=tuple(_facts(doc)),
        notes=tuple(clean(note, 300) for note in doc.notes[:_MAX_NOTES]),
    )


def _layer(name: str, factors: Factors, entry: Mapping[str, object], energy: bool) -> LayerRank:
    parsed = parse_layer_name(name)
    nu = entry.get("nu")
    return LayerRank(
        name=clean(name, 300),
        part=parsed.part,
        block=parsed.block,
        projection=parsed.projection,
        rank=factors.rank,
        d_in=factors.down.shape[1:].numel(),
        d_out=factors.up.shape[0],
        parameters=factors.parameters,
        energy_rank=energy_rank(factors, ENERGY_SHARE) if energy else None,
        nu=float(nu) if isinstance(nu, int | float) and math.isfinite(nu) else None,
    )


def _removed(name: str, entry: Mapping[str, object]) -> LayerRank | None:
    """A layer whose rank became 0: no tensors in the file, but our metadata tells its shape."""
    shape = entry.get("shape")
    if entry.get("rank") != 0 or not isinstance(shape, list | tuple) or len(shape) < 2:
        return None
    if not all(isinstance(n, int) and 0 < n < 2**24 for n in shape):
        return None
    parsed = parse_layer_name(name)
    return LayerRank(
        clean(name, 300), parsed.part, parsed.block, parsed.projection, 0, math.prod(shape[1:]), shape[0], 0
    )


def _entries(info: object) -> dict[str, Mapping[str, object]]:
    """Our metadata's entry of every layer; empty for files of others."""
    layers = info.get("layers") if isinstance(info, Mapping) else None
    if not isinstance(layers, Mapping):
        return {}
    return {str(name): entry for name, entry in layers.items() if isinstance(entry, Mapping)}


def _facts(doc: LoraDocument) -> Iterator[tuple[str, str]]:
    """Facts about the training from the metadata; of paths, the last part only."""
    for key, words in _FACTS.items():
        text = clean(doc.metadata.get(key, "")).replace("\\", "/").rsplit("/", 1)[-1]
        if text and text != "None":
            yield words, clean(text, 80)
    training = doc.info.get("training") if isinstance(doc.info, Mapping) else None
    if isinstance(training, Mapping):
        plain = [(k, v) for k, v in training.items() if isinstance(v, str | int | float | bool)]
        for key, value in plain[:_MAX_TRAINING_FACTS]:
            yield clean(key, 40).replace("_", " "), clean(value, 80)


def _tensors(layers: Mapping[str, Factors]) -> Iterator[Tensor]:
    for factors in layers.values():
        yield factors.up
        yield factors.down


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

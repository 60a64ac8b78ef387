"""One layer's rank with its position in the network, and means over several layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .layer_names import LayerName, parse_layer_name

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class LayerRank:
    """One layer of a LoRA.

    name: its key without suffix; part, block, projection: its position in words. d_in and d_out as for a matrix
    (a kernel counts inside d_in). parameters: numbers stored. energy_rank: directions that hold 99 % of
    Σ σ², None when not measured. nu: learned decay of importance, None in a file without our metadata.
    """

    name: str
    part: str
    block: str
    projection: str
    rank: int
    d_in: int
    d_out: int
    parameters: int
    energy_rank: int | None = None
    nu: float | None = None

    @property
    def cost(self) -> int:
        """Parameters per unit of rank."""
        return self.d_in + self.d_out

    @property
    def layer_name(self) -> LayerName:
        """The parsed name, for sorting and drawing."""
        return parse_layer_name(self.name)

    @property
    def order(self) -> tuple[object, ...]:
        """Sorts layers as the network runs."""
        name = self.layer_name
        return (name.order, name.unit or 0, name.row_order, self.name)


def used_rank(layer: LayerRank) -> int:
    """Directions in use, where measured; else the rank."""
    return layer.rank if layer.energy_rank is None else layer.energy_rank


def stored_rank(layer: LayerRank) -> int:
    """The rank of the tensors."""
    return layer.rank


def mean_rank(layers: Iterable[LayerRank], value: Callable[[LayerRank], int] = stored_rank) -> float:
    """Mean weighted by parameters per unit of rank: the one rank for all that weighs the same; 0 for none."""
    total = weight = 0.0
    for layer in layers:
        total += value(layer) * layer.cost
        weight += layer.cost
    return total / weight if weight else 0.0


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by key, groups in the order of their first member."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def range_words(ranks: Sequence[int]) -> str:
    """'12' for one rank, '9.5 (4-16)' for several that differ (their plain mean), '' for none."""
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{sum(ranks) / len(ranks):.1f} ({low}-{high})"

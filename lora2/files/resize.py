"""Less of a LoRA: cut to a share, a maximal rank, or a size, without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..method.allocation import allocate
from ..method.factors import Factors
from ..method.svd import decompose
from ..util.errors import LoraError
from ..util.text import escaped
from .document import LoraDocument, fold_scale
from .metadata import with_info
from .rank_info import KEY, LayerInfo, RankInfo

# What a cut makes untrue. diffusers refuses its own key beside the alphas that a cut layer gets.
STALE_KEYS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata")
ALPHA_BYTES = 4


@dataclass(frozen=True)
class ResizeResult:
    """The LoRA that is left, and what that is of the whole one.

    ranks by prefix, before and after; parameters and bytes of all tensors; uncut: what could not be cut, and
    why.
    """

    document: LoraDocument
    ranks_before: dict[str, int]
    ranks_after: dict[str, int]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    uncut: dict[str, str]


class _Layer:
    """One layer on its way: its factors so far, and its singular order once somebody asked for it."""

    def __init__(self, factors: Factors, nu: float | None) -> None:
        self.factors = factors
        self.nu = nu
        self.changed = False
        self._order: tuple[Factors, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self.factors.rank

    @property
    def unit_bytes(self) -> int:
        """Bytes per unit of rank after a cut in singular order."""
        up, down = self.factors.up, self.factors.down
        return up.shape[0] * _dtype(up).itemsize + down.shape[1:].numel() * _dtype(down).itemsize

    def order(self) -> tuple[Factors, Tensor]:
        if self._order is None:
            self._order = decompose(self.factors)
        return self._order

    def keep_first(self, rank: int) -> None:
        """Cut in the order in which the positions lie."""
        if rank < self.rank:
            self.factors = cast(fold_scale(self.factors).head(rank), self.factors)
            self.changed, self._order = True, None

    def keep_strongest(self, rank: int) -> None:
        """Cut in singular order, the best approximation of that rank."""
        if rank < self.rank:
            ordered, sigma = self.order()
            self.factors = cast(ordered.head(rank), self.factors)
            self.nu, self.changed, self._order = None, True, (ordered.head(rank), sigma[:rank])

    def keep(self, rank: int) -> None:
        """Cut in order of importance where the layer has one, else in singular order."""
        if self.nu is not None:
            self.keep_first(rank)
        else:
            self.keep_strongest(rank)


def resize(
    doc: LoraDocument,
    share: float = 1.0,
    max_rank: int = 0,
    megabytes: float = 0.0,
    between: Callable[[], None] = lambda: None,
) -> ResizeResult:
    """Cut every plain layer: first to a share, then to a maximal rank, then all together to a size.

    share: over 0 and up to 1. A layer whose positions are in order of importance keeps the fewest that hold
    this share of its mass 1 − e^(−νD); any other the fewest singular values that hold this share of its
    energy Σ σ². max_rank: 0 for none. megabytes: 10⁶ bytes for all tensors in the types they are stored in, 0
    for no limit; all layers are brought into singular order and share the room by energy per byte. between: called
    before the work on every layer, for a host that wants to stop by an exception.

    A layer that nothing is cut from keeps its tensors bit for bit; one that is cut gets alpha = rank. Raises
    LoraError where a limit is impossible.
    """
    _check(share, max_rank, megabytes)
    layers = {prefix: _Layer(factors, _rate(doc.info, prefix)) for prefix, factors in doc.layers.items()}
    if share < 1:
        for layer in layers.values():
            between()
            layer.keep(_rank_of_share(layer, share))
    if max_rank:
        for layer in layers.values():
            between()
            layer.keep(max_rank)
    if megabytes:
        _fit(layers, doc, megabytes, between)
    after = _document(doc, layers)
    tensors_before, tensors_after = doc.state_dict(), after.state_dict()
    return ResizeResult(
        document=after,
        ranks_before={prefix: factors.rank for prefix, factors in doc.layers.items()},
        ranks_after={prefix: factors.rank for prefix, factors in after.layers.items()},
        parameters_before=sum(tensor.numel() for tensor in tensors_before.values()),
        parameters_after=sum(tensor.numel() for tensor in tensors_after.values()),
        bytes_before=_bytes(tensors_before),
        bytes_after=_bytes(tensors_after),
        uncut=doc.uncut(),
    )


def cast(factors: Factors, like: Factors) -> Factors:
    """The factors in the types of others, contiguous; 8-bit ones become bfloat16, which new values need."""
    up = factors.up.to(like.up.device, _dtype(like.up)).contiguous()
    down = factors.down.to(like.down.device, _dtype(like.down)).contiguous()
    return Factors(up, down, factors.alpha)


def _dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.element_size() > 1 else torch.bfloat16


def _check(share: float, max_rank: int, megabytes: float) -> None:
    if not 0 < share <= 1:
        raise LoraError(f"The share to load is {share}. Give a number over 0 and up to 1; 1 loads all.")
    if max_rank < 0:
        raise LoraError(f"The maximal rank is {max_rank}. Give 1 or more, or 0 for no limit.")
    if not (math.isfinite(megabytes) and megabytes >= 0):
        raise LoraError(f"The size is {megabytes} MB. Give a number over 0, or 0 for no limit.")


def _rate(info: RankInfo | None, prefix: str) -> float | None:
    """ν of a layer whose positions are in order of importance, else None."""
    entry = None if info is None else info["layers"].get(prefix)
    return entry["nu"] if entry is not None and entry["order"] == "importance" else None


def _rank_of_share(layer: _Layer, share: float) -> int:
    """The fewest positions that hold `share` of what the layer's order measures."""
    if layer.nu is not None:
        kept = -torch.expm1(-layer.nu * torch.arange(1, layer.rank + 1, dtype=torch.float64))
    else:
        kept = layer.order()[1].square().cumsum(0)
    if not len(kept):
        return 0
    return int((kept < share * kept[-1]).sum()) + int(kept[-1] > 0)


def _fit(layers: Mapping[str, _Layer], doc: LoraDocument, megabytes: float, between: Callable[[], None]) -> None:
    """Cut all layers together so that all tensors take at most this many MB."""
    fixed = sum(t.numel() * t.element_size() for t in doc.other.values())
    budget = int(megabytes * 1e6)
    alphas = {p: doc.alphas[p].element_size() if p in doc.alphas else 0 for p in layers}
    stored = {
        p: sum(t.numel() * t.element_size() for t in (layer.factors.up, layer.factors.down))
        + (ALPHA_BYTES if layer.changed else alphas[p])
        for p, layer in layers.items()
    }
    if fixed + sum(stored.values()) <= budget:
        return
    room = budget - fixed - sum(max(ALPHA_BYTES, alphas[p]) for p in layers)
    sigmas = {}
    for p, layer in layers.items():
        between()
        sigmas[p] = layer.order()[1]
    ranks = allocate(
        sigmas,
        {p: layer.unit_bytes for p, layer in layers.items()},
        room,
    )
    if not any(ranks.values()):
        least = min((layer.unit_bytes for layer in layers.values() if layer.rank), default=0) + budget - room
        raise LoraError(
            f"{megabytes:g} MB leaves nothing of this LoRA: what cannot be cut and one position of its"
            f" smallest layer take {least / 1e6:.3g} MB. Give a larger size."
        )
    for prefix, layer in layers.items():
        layer.keep_strongest(ranks[prefix])


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _document(doc: LoraDocument, layers: Mapping[str, _Layer]) -> LoraDocument:
    """The document with the layers that changed; the very same where none did."""
    changed = {prefix: layer for prefix, layer in layers.items() if layer.changed}
    if not changed:
        return doc
    for prefix, layer in changed.items():
        if not all(bool(torch.isfinite(t).all()) for t in (layer.factors.up, layer.factors.down)):
            raise LoraError(f"Layer {escaped(prefix)} is too strong to be cut in its own type. Load all of it.")
    after = replace(
        doc,
        layers={prefix: layer.factors for prefix, layer in layers.items()},
        alphas={**doc.alphas, **{p: torch.tensor(float(layer.rank)) for p, layer in changed.items()}},
        metadata={key: value for key, value in doc.metadata.items() if key not in STALE_KEYS},
    )
    for key in ("ss_network_dim", "ss_network_alpha"):
        if key in after.metadata:
            after.metadata[key] = "Dynamic"
    if doc.info is not None:
        entries = {p: _entry(entry, changed.get(p)) for p, entry in doc.info["layers"].items()}
        after.info = {**doc.info, "layers": entries}
        after.metadata.pop(KEY, None)
        after.metadata = with_info(after.state_dict(), after.metadata, after.info)
    return after


def _entry(entry: LayerInfo, layer: _Layer | None) -> LayerInfo:
    """What our JSON says of a layer after the cut."""
    if layer is None:
        return entry
    order = entry["order"] if layer.nu is not None else "singular"
    return {**entry, "rank": layer.rank, "nu": layer.nu, "order": order}

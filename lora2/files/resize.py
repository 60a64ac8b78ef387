"""Resizing a LoRA without training: to a share of its energy, a maximum rank, or a file size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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

# Invalid after a cut. diffusers refuses its own key, the last one, beside the alphas that a cut layer gets.
STALE_KEYS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata")
ALPHA_BYTES = 4


@dataclass(frozen=True)
class ResizeResult:
    """The resized LoRA. Ranks by prefix; parameters and bytes of all tensors; uncut: reasons, see LoraDocument.uncut."""

    document: LoraDocument
    ranks_before: dict[str, int]
    ranks_after: dict[str, int]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    uncut: dict[str, str]


class _Layer:
    """One layer: its current factors, and its singular value decomposition, computed on demand.

    nu: ν if the components are in order of importance, else None.
    """

    def __init__(self, factors: Factors, nu: float | None) -> None:
        self.factors = factors
        self.nu = nu
        self.changed = False
        self._svd: tuple[Factors, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self.factors.rank

    @property
    def component_bytes(self) -> int:
        """Bytes of one component after a cut."""
        up, down = self.factors.up, self.factors.down
        return up.shape[0] * _dtype(up).itemsize + down.shape[1:].numel() * _dtype(down).itemsize

    def svd(self) -> tuple[Factors, Tensor]:
        """`decompose` of the current factors."""
        if self._svd is None:
            self._svd = decompose(self.factors)
        return self._svd

    def truncate(self, rank: int) -> None:
        """Keep the first `rank` components of the singular value decomposition."""
        if rank < self.rank:
            ordered, sigma = self.svd()
            self.factors = cast(ordered.head(rank), self.factors)
            self.nu, self.changed, self._svd = None, True, (ordered.head(rank), sigma[:rank])

    def cut(self, rank: int) -> None:
        """Keep the `rank` most important components, or those of the SVD for a layer without an order of importance."""
        if self.nu is None:
            self.truncate(rank)
        elif rank < self.rank:
            self.factors = cast(fold_scale(self.factors).head(rank), self.factors)
            self.changed, self._svd = True, None


def resize(
    document: LoraDocument,
    share: float = 1.0,
    max_rank: int = 0,
    megabytes: float = 0.0,
    check_cancelled: Callable[[], None] = lambda: None,
) -> ResizeResult:
    """Cut every plain layer to a share, then to a maximum rank, then all layers together to a size.

    share: over 0 and up to 1. A layer whose components are in order of importance keeps the fewest that hold this share of its
    mass 1 − e^(−νD); any other layer the fewest singular values that hold this share of its energy Σ σ². max_rank: 0 for no
    limit. megabytes: size of all tensors in their stored dtypes in 10⁶ bytes, 0 for no limit; layers are truncated by SVD,
    components chosen by energy per byte. check_cancelled: called before the work on each layer; may raise.

    Layers that are not cut keep their tensors bit for bit; those that are cut get alpha = rank. Raises LoraError if a limit
    is impossible.
    """
    _check(share, max_rank, megabytes)
    layers = {prefix: _Layer(factors, _rate(document.info, prefix)) for prefix, factors in document.layers.items()}
    if share < 1:
        for layer in layers.values():
            check_cancelled()
            layer.cut(_rank_of_share(layer, share))
    if max_rank:
        for layer in layers.values():
            check_cancelled()
            layer.cut(max_rank)
    if megabytes:
        _fit_size(layers, document, megabytes, check_cancelled)
    after = _resized_document(document, layers)
    tensors_before, tensors_after = document.state_dict(), after.state_dict()
    return ResizeResult(
        document=after,
        ranks_before={prefix: factors.rank for prefix, factors in document.layers.items()},
        ranks_after={prefix: factors.rank for prefix, factors in after.layers.items()},
        parameters_before=sum(tensor.numel() for tensor in tensors_before.values()),
        parameters_after=sum(tensor.numel() for tensor in tensors_after.values()),
        bytes_before=_bytes(tensors_before.values()),
        bytes_after=_bytes(tensors_after.values()),
        uncut=document.uncut(),
    )


def cast(factors: Factors, like: Factors) -> Factors:
    """The factors in the dtypes of `like`, contiguous; bfloat16 instead of 8-bit types, which are too coarse."""
    up = factors.up.to(like.up.device, _dtype(like.up)).contiguous()
    down = factors.down.to(like.down.device, _dtype(like.down)).contiguous()
    return Factors(up, down, factors.alpha)


def _dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.element_size() > 1 else torch.bfloat16


def _check(share: float, max_rank: int, megabytes: float) -> None:
    if not 0 < share <= 1:
        raise LoraError(f"The share to load is {share}. Give a number over 0 and up to 1; 1 loads all.")
    if max_rank < 0:
        raise LoraError(f"The maximum rank is {max_rank}. Give 1 or more, or 0 for no limit.")
    if not (math.isfinite(megabytes) and megabytes >= 0):
        raise LoraError(f"The size is {megabytes} MB. Give a number over 0, or 0 for no limit.")


def _rate(info: RankInfo | None, prefix: str) -> float | None:
    """ν of a layer whose components are in order of importance, else None."""
    entry = None if info is None else info["layers"].get(prefix)
    return entry["nu"] if entry is not None and entry["order"] == "importance" else None


def _rank_of_share(layer: _Layer, share: float) -> int:
    """The fewest components that hold `share` of the layer's mass of importance, or of its energy."""
    if layer.nu is not None:
        sums = -torch.expm1(-layer.nu * torch.arange(1, layer.rank + 1, dtype=torch.float64))
    else:
        sums = layer.svd()[1].square().cumsum(0)
    if not len(sums):
        return 0
    return int((sums < share * sums[-1]).sum()) + int(sums[-1] > 0)


def _fit_size(
    layers: Mapping[str, _Layer], document: LoraDocument, megabytes: float, check_cancelled: Callable[[], None]
) -> None:
    """Truncate all layers together so that all tensors take at most this many MB."""
    budget = int(megabytes * 1e6)
    alphas = {p: document.alphas[p].element_size() if p in document.alphas else 0 for p in layers}
    size = _bytes(document.other.values())
    for p, layer in layers.items():
        size += _bytes((layer.factors.up, layer.factors.down)) + (ALPHA_BYTES if layer.changed else alphas[p])
    if size <= budget:
        return
    fixed = _bytes(document.other.values()) + sum(max(ALPHA_BYTES, alphas[p]) for p in layers)
    sigmas, costs = {}, {p: layer.component_bytes for p, layer in layers.items()}
    for p, layer in layers.items():
        check_cancelled()
        sigmas[p] = layer.svd()[1]
    ranks = allocate(sigmas, costs, budget - fixed)
    if not any(ranks.values()):
        smallest = fixed + min((costs[p] for p, layer in layers.items() if layer.rank), default=0)
        raise LoraError(
            f"{megabytes:g} MB leaves nothing of this LoRA: the parts that cannot be cut and one component of its smallest "
            f"layer take {smallest / 1e6:.3g} MB. Give a larger size."
        )
    for p, layer in layers.items():
        layer.truncate(ranks[p])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _resized_document(document: LoraDocument, layers: Mapping[str, _Layer]) -> LoraDocument:
    """The document with the changed layers; the same object if there are none."""
    changed = {prefix: layer for prefix, layer in layers.items() if layer.changed}
    if not changed:
        return document
    for prefix, layer in changed.items():
        if not all(bool(torch.isfinite(t).all()) for t in (layer.factors.up, layer.factors.down)):
            raise LoraError(f"Layer {escaped(prefix)} is too strong to be cut in its own dtype. Load all of it.")
    after = replace(
        document,
        layers={prefix: layer.factors for prefix, layer in layers.items()},
        alphas={**document.alphas, **{p: torch.tensor(float(layer.rank)) for p, layer in changed.items()}},
        metadata={key: value for key, value in document.metadata.items() if key not in STALE_KEYS},
    )
    for key in ("ss_network_dim", "ss_network_alpha"):
        if key in after.metadata:
            after.metadata[key] = "Dynamic"
    if document.info is not None:
        entries = {p: _resized_entry(entry, changed.get(p)) for p, entry in document.info["layers"].items()}
        after.info = {**document.info, "layers": entries}
        after.metadata.pop(KEY, None)
        after.metadata = with_info(after.state_dict(), after.metadata, after.info)
    return after


def _resized_entry(entry: LayerInfo, layer: _Layer | None) -> LayerInfo:
    if layer is None:
        return entry
    order = entry["order"] if layer.nu is not None else "singular"
    return {**entry, "rank": layer.rank, "nu": layer.nu, "order": order}

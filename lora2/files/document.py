"""LoRA files as layers: from keys to factors and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..method.factors import Factors
from ..util.errors import LoraError
from ..util.text import escaped
from ..util.thread_pool import run_parallel, worker_count
from .keys import BIASES, COMPANIONS, KEY_STYLES, stems
from .rank_info import KEY, RankInfo
from .rank_info import parse as parse_info
from .reader import read_file


class LoraStateDict(dict[str, Tensor]):
    """A LoRA's tensors as the host's nodes exchange them, with the file's metadata."""

    metadata: dict[str, str]

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata or {})


def to_state_dict(
    layers: Mapping[str, Factors], style: str, dtype: torch.dtype, alpha: float | None = None
) -> dict[str, Tensor]:
    """The file's tensors: up, down and alpha of every layer, contiguous and on the CPU.

    layers: by the full prefix of their keys ("lora_unet_…_to_q", "diffusion_model.….qkv"). style: a key of KEY_STYLES.
    Layers of rank 0 are omitted, since ComfyUI divides by the rank. Raises LoraError if a value is NaN, infinite, or too
    large for the dtype.

    alpha: None for each layer's rank (a scale of 1), or one number for all layers, with the factors rescaled to the same ΔW.
    Readers that take each layer's alpha and rank from the file see no difference. diffusers (0.39 to 0.42 measured) loses
    alphas that differ between the attention layers of a UNet in kohya's keys and scales them wrongly; one alpha for all
    layers is read correctly.
    """
    up_suffix, down_suffix = KEY_STYLES[style]
    tensors: dict[str, Tensor] = {}
    for prefix, factors in layers.items():
        if factors.rank:
            folded = fold_scale(factors, alpha)
            tensors[prefix + up_suffix] = _stored(folded.up, dtype, prefix)
            tensors[prefix + down_suffix] = _stored(folded.down, dtype, prefix)
            tensors[prefix + ".alpha"] = torch.tensor(folded.alpha, dtype=torch.float32)
    return tensors


def fold_scale(factors: Factors, alpha: float | None = None) -> Factors:
    """The same ΔW with another alpha (None: the rank); the same tensors if the scale does not change."""
    target = float(factors.rank) if alpha is None else alpha
    ratio = factors.scale * factors.rank / target if factors.rank else 1.0
    if ratio == 1.0:
        return Factors(factors.up, factors.down, target)
    root = math.sqrt(abs(ratio))
    up, down = factors.up.detach().float(), factors.down.detach().float()
    return Factors(up * math.copysign(root, ratio), down * root, target)


def _stored(tensor: Tensor, dtype: torch.dtype, prefix: str) -> Tensor:
    """A copy for the file, which does not follow further training."""
    stored = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise LoraError(
            f"Layer {escaped(prefix)} contains NaN, infinity, or a value too large for {str(dtype).removeprefix('torch.')}. "
            "Save as float32 or bfloat16; if that fails too, the training has diverged: lower the learning rate."
        )
    return stored


@dataclass
class LoraDocument:
    """A LoRA file as layers.

    layers: plain layers (up · down and nothing else) by prefix. styles: key style of each, of KEY_STYLES. alphas: alpha
    tensors of those that have one. other: all other tensors by key. metadata: as in the file. info: the pack's own JSON,
    None without one. notes: sentences about errors in it.
    """

    layers: dict[str, Factors]
    styles: dict[str, str]
    alphas: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    info: RankInfo | None = None
    notes: list[str] = field(default_factory=list)

    def state_dict(self) -> LoraStateDict:
        """The tensors under their original keys, with the metadata; layers of rank 0 are omitted.

        All pairs of an omitted layer are: a file may hold one layer in several styles, and ComfyUI would apply the second
        pair if only the first were missing.
        """
        tensors: dict[str, Tensor] = {}
        omitted: set[str] = set()
        for prefix, factors in self.layers.items():
            if factors.rank:
                up_suffix, down_suffix = KEY_STYLES[self.styles[prefix]]
                tensors[prefix + up_suffix] = factors.up
                tensors[prefix + down_suffix] = factors.down
                if prefix in self.alphas:
                    tensors[prefix + ".alpha"] = self.alphas[prefix]
            else:
                omitted.update(prefix + suffix for pair in KEY_STYLES.values() for suffix in pair)
        others = {key: tensor for key, tensor in self.other.items() if key not in omitted}
        return LoraStateDict({**tensors, **others}, self.metadata)

    def uncut(self) -> dict[str, str]:
        """Reasons why parts cannot be cut, by layer, or by key for tensors of no known kind of layer."""
        reasons: dict[str, str] = {}
        for key in self.other:
            suffix = next((s for s in COMPANIONS if key.endswith(s)), None)
            if suffix is not None:
                reasons.setdefault(key.removesuffix(suffix), COMPANIONS[suffix])
        for key in self.other:
            if not any(stem in reasons for stem in stems(key)):
                suffix = next((s for s in BIASES if key.endswith(s)), None)
                reasons[key] = BIASES[suffix] if suffix is not None else "not a plain pair of factors"
        return reasons


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoraDocument:
    """Group a LoRA's tensors into layers. metadata: default is that of a LoraStateDict.

    Tensors that are not part of a plain layer go to `other`. Raises LoraError with the layer's name if the shapes of a pair
    do not match, its alpha is not one number, or it contains NaN or infinity. If the pack's own JSON is unusable, a note
    says so and the tensors are used without it.
    """
    if metadata is None:
        metadata = getattr(tensors, "metadata", None) or {}
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise LoraError(f"{escaped(key)} in this LoRA is not a tensor. Connect a LoRA, or load one from a file.")
    layers: dict[str, Factors] = {}
    styles: dict[str, str] = {}
    alphas: dict[str, Tensor] = {}
    other = dict(tensors)
    for prefix, style in _pairs(tensors).items():
        up, down = (tensors[prefix + suffix] for suffix in KEY_STYLES[style])
        alpha = tensors.get(prefix + ".alpha")
        if not (up.is_floating_point() and down.is_floating_point()):
            continue
        layers[prefix] = _checked(prefix, up, down, alpha)
        styles[prefix] = style
        if alpha is not None:
            alphas[prefix] = alpha
        for suffix in (*KEY_STYLES[style], ".alpha"):
            other.pop(prefix + suffix, None)
    _check_finite(layers)
    document = LoraDocument(layers, styles, alphas, other, dict(metadata))
    if KEY in metadata:
        try:
            document.info, document.notes = parse_info(metadata[KEY], layers)
        except LoraError as error:
            document.notes = [str(error)]
    return document


def read(path: str | Path) -> LoraDocument:
    """Read a LoRA file. Raises LoraError with the file's name if it is damaged; see `read_file` and `parse`."""
    path = Path(path)
    tensors, metadata = read_file(path)
    try:
        return parse(tensors, metadata)
    except LoraError as error:
        raise LoraError(f"{escaped(path.name)}: {error}") from error


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Key style of every layer that ComfyUI applies as up · down and nothing else, by prefix."""
    styles: dict[str, str] = {}
    for style, (up_suffix, down_suffix) in KEY_STYLES.items():
        for key in tensors:
            prefix = key.removesuffix(up_suffix)
            if prefix in styles or prefix in ("", key) or any(prefix + s in tensors for s in COMPANIONS):
                continue
            if prefix + down_suffix not in tensors:
                raise LoraError(
                    f"Layer {escaped(prefix)} has {up_suffix[1:]} but no {down_suffix[1:]}: the LoRA is damaged."
                )
            styles[prefix] = style
    return styles


def _checked(prefix: str, up: Tensor, down: Tensor, alpha: Tensor | None) -> Factors:
    """The factors of one layer after a check of their shapes; `_check_finite` checks the values of all layers."""
    if up.ndim < 2 or down.ndim < 2 or up.shape[1:].numel() != down.shape[0]:
        raise LoraError(
            f"The factors of layer {escaped(prefix)} do not fit together: up has the shape {list(up.shape)}, down "
            f"{list(down.shape)}; the second dimension of up must equal the first of down. The LoRA is damaged."
        )
    if 0 in (up.shape[0], *down.shape[1:]):
        raise LoraError(f"Layer {escaped(prefix)} belongs to a weight of size 0: the LoRA is damaged.")
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or not _finite(alpha)):
        raise LoraError(f"The alpha of layer {escaped(prefix)} is not one finite number: the LoRA is damaged.")
    return Factors(up, down, None if alpha is None else float(alpha.item()))


def _check_finite(layers: Mapping[str, Factors]) -> None:
    """Raise LoraError with the name of the first layer that contains NaN or infinity.

    This is the first access to a file's memory-mapped pages and is bound by reading them, hence in parallel.
    """
    names = list(layers)
    chunk = max(1, len(names) // (4 * worker_count()) + 1)
    found = run_parallel(partial(_first_nonfinite, layers, names[i : i + chunk]) for i in range(0, len(names), chunk))
    nonfinite = next((name for name in found if name is not None), None)
    if nonfinite is not None:
        raise LoraError(
            f"Layer {escaped(nonfinite)} contains NaN or infinity: it would turn every image black. Use another LoRA."
        )


def _first_nonfinite(layers: Mapping[str, Factors], names: Sequence[str]) -> str | None:
    return next((name for name in names if not (_finite(layers[name].up) and _finite(layers[name].down))), None)


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite.

    By minimum and maximum, which propagate NaN: one pass without a mask, 15 to 40 times faster than torch.isfinite. 8-bit
    floats, for which torch has neither, are converted first.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    return math.isfinite(float(low)) and math.isfinite(float(high))

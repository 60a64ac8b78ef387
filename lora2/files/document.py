"""A LoRA file as layers: from keys to factors and back."""

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
from .writer import write_new

__all__ = ["LoraDocument", "LoraStateDict", "fold_scale", "parse", "read", "to_state_dict", "write_new"]


class LoraStateDict(dict[str, Tensor]):
    """A LoRA's tensors, as every node of the host takes them, with the file's metadata beside them."""

    metadata: dict[str, str]

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata or {})


def to_state_dict(
    layers: Mapping[str, Factors], style: str, dtype: torch.dtype, alpha: float | None = None
) -> dict[str, Tensor]:
    """The file's tensors: up, down and alpha of every layer, contiguous and on the CPU.

    layers: by the full prefix of their keys ("lora_unet_…_to_q", "diffusion_model.….qkv"). style: "kohya"
    (lora_up/lora_down) or "peft" (lora_B/lora_A). Layers of rank 0 are left out, since ComfyUI divides by the
    rank. Raises LoraError where a value is NaN, infinite, or too large for the dtype.

    alpha: every layer's own rank where it is None, so that the scale is 1; or one number for all layers, the
    factors then holding what the scale alpha / rank takes away. Both give the same ΔW to readers that take
    each layer's alpha and rank from the file. diffusers (0.39 to 0.42 measured) loses alphas that differ on
    the attention layers of a UNet in kohya's keys and then scales them wrongly; one number for all it reads
    right.
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
    """The same ΔW with another alpha, the rank where None; the tensors themselves where nothing changes."""
    target = float(factors.rank) if alpha is None else alpha
    ratio = factors.scale * factors.rank / target if factors.rank else 1.0
    if ratio == 1.0:
        return Factors(factors.up, factors.down, target)
    root = math.sqrt(abs(ratio))
    up, down = factors.up.detach().float(), factors.down.detach().float()
    return Factors(up * math.copysign(root, ratio), down * root, target)


def _stored(tensor: Tensor, dtype: torch.dtype, prefix: str) -> Tensor:
    """A copy for the file, never the tensor that is still being trained."""
    stored = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise LoraError(
            f"Layer {escaped(prefix)} holds NaN, infinity, or a value too large for"
            f" {str(dtype).removeprefix('torch.')}. Save as float32 or bfloat16; if that fails too, the"
            " training has diverged: lower the learning rate."
        )
    return stored


@dataclass
class LoraDocument:
    """A LoRA file as layers.

    layers: the plain ones, by prefix. styles: how each one's keys end (keys.STYLES). alphas: their alpha
    tensors, where there are any. other: all tensors that are not part of a plain layer, by their keys.
    metadata: as in the file. info: our JSON, None without one. notes: what was wrong with it, in sentences.
    """

    layers: dict[str, Factors]
    styles: dict[str, str]
    alphas: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    info: RankInfo | None = None
    notes: list[str] = field(default_factory=list)

    def state_dict(self) -> LoraStateDict:
        """The tensors under the keys they came with, and the metadata; a layer of rank 0 is left out.

        With all of its pairs: a file may hold one layer in several styles, and the pair that ComfyUI would not look at
        must not come to light because the first one was cut away.
        """
        tensors: dict[str, Tensor] = {}
        gone: set[str] = set()
        for prefix, factors in self.layers.items():
            if factors.rank:
                up_suffix, down_suffix = KEY_STYLES[self.styles[prefix]]
                tensors[prefix + up_suffix] = factors.up
                tensors[prefix + down_suffix] = factors.down
                if prefix in self.alphas:
                    tensors[prefix + ".alpha"] = self.alphas[prefix]
            else:
                gone.update(prefix + suffix for pair in KEY_STYLES.values() for suffix in pair)
        others = {key: tensor for key, tensor in self.other.items() if key not in gone}
        return LoraStateDict({**tensors, **others}, self.metadata)

    def uncut(self) -> dict[str, str]:
        """What cannot be cut and why, by layer, or by key for a tensor of no known kind of layer."""
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
    """The layers in a LoRA's tensors. metadata: that of a LoraStateDict is taken where none is given.

    Nothing is lost: what is not a plain pair goes to `other`. Raises LoraError, naming the layer, where a
    pair does not fit together, its alpha is not one number, or it holds NaN or infinity. Our JSON, where it
    cannot be used, costs a note and not the file.
    """
    if metadata is None:
        metadata = getattr(tensors, "metadata", None) or {}
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise LoraError(f"{escaped(key)} in this LoRA is no tensor. Connect a LoRA, or load one from a file.")
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
    """The layers of a LoRA file. Raises LoraError, naming the file, where it makes no sense."""
    path = Path(path)
    tensors, metadata = read_file(path)
    try:
        return parse(tensors, metadata)
    except LoraError as error:
        raise LoraError(f"{escaped(path.name)}: {error}") from error


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The style of every layer that ComfyUI would apply as up · down and nothing else."""
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
    """The factors of one layer, if they make sense; whether they are finite is asked for all layers together."""
    if up.ndim < 2 or down.ndim < 2 or up.shape[1:].numel() != down.shape[0]:
        raise LoraError(
            f"The factors of layer {escaped(prefix)} do not fit together: up has the shape {list(up.shape)},"
            f" down {list(down.shape)}; up's second size must be down's first. The LoRA is damaged."
        )
    if 0 in (up.shape[0], *down.shape[1:]):
        raise LoraError(f"Layer {escaped(prefix)} belongs to a weight of size 0: the LoRA is damaged.")
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or not _finite(alpha)):
        raise LoraError(f"The alpha of layer {escaped(prefix)} is not one finite number: the LoRA is damaged.")
    return Factors(up, down, None if alpha is None else float(alpha.item()))


def _check_finite(layers: Mapping[str, Factors]) -> None:
    """Raise LoraError, naming the first layer that holds NaN or infinity.

    It is the first to touch a file's pages, and takes as long as memory takes to bring them: so all cores ask for some layers.
    """
    names = list(layers)
    per_piece = max(1, len(names) // (4 * worker_count()) + 1)
    pieces = [names[i : i + per_piece] for i in range(0, len(names), per_piece)]
    found = run_parallel(partial(_first_broken, layers, piece) for piece in pieces)
    broken = next((name for name in found if name is not None), None)
    if broken is not None:
        raise LoraError(
            f"Layer {escaped(broken)} holds NaN or infinity: it would turn every picture black. Use another LoRA."
        )


def _first_broken(layers: Mapping[str, Factors], names: Sequence[str]) -> str | None:
    return next((name for name in names if not (_finite(layers[name].up) and _finite(layers[name].down))), None)


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite; 8-bit floats have no such question of their own.

    The least and the greatest are asked, which NaN passes on to: one pass without a map of the answers, 15 to 40 times faster.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    return math.isfinite(float(low)) and math.isfinite(float(high))

"""Inputs of layers that need not be kept for the backward pass, since what they were made of is kept anyway.

A gradient of A asks for the layer's input, which a frozen linear layer does not keep. Where that is what an activation, a product
or a norm has put out, autograd keeps what went into it: it is made again from that when it is needed, and takes no memory until
then. Bit for bit the same, but for a norm's output, which is the same to float32's rounding before it is cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BYTES = 2**20
"""Bytes from which an input is worth one more launch."""

MIN_WIDTH_RATIO = 4
"""Times d_in: layers whose own products are so much more work that a norm's four launches do not count."""


@dataclass(frozen=True)
class Recipe:
    """How a tensor is made again: `make` of `parts`, detached tensors that are kept anyway."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]


def recipe_for(x: Tensor, width: int) -> Recipe | None:
    """How a layer's input x can be made again; width: d_out of the layer.

    None where x is small, was made in another way or in place, or was changed since, also unseen by autograd (but a change
    through `x.data` leaves no trace). And where hooks for saved tensors are in use, or were when x was made, as in a
    checkpointed block: what they keep is not asked for.
    """
    node: Any = x.grad_fn
    if node is None or x.nbytes < MIN_BYTES or x._version:
        return None
    known = _KNOWN.get(node.name())
    if known is None or _hooked() or (known is _norm and width < MIN_WIDTH_RATIO * x.shape[-1]):
        return None
    try:
        return known(node)
    except RuntimeError:  # a part was changed since, or is gone: whoever goes backward through x hears of it
        return None


def saved_tensors(x: Tensor, recipe: Recipe | None) -> tuple[Tensor, ...]:
    """What to save of an input: its parts, or itself."""
    return (x,) if recipe is None else recipe.parts


def recomputed(saved: Sequence[Tensor], make: Callable[..., Tensor] | None) -> Tensor:
    """The input from what was saved of it; make: the recipe's, None where there was none."""
    return saved[0] if make is None else make(*saved)


@contextmanager
def recompute_saved(*known: tuple[Tensor, Recipe | None]) -> Iterator[None]:
    """While inside, torch's own operations keep none of these tensors that have a recipe, but make them again by it.

    Going backward raises RuntimeError where a part was changed in between, as autograd does.
    """
    recipes = [(x, recipe) for x, recipe in known if recipe is not None]
    with ExitStack() as stack:
        if recipes and torch.is_grad_enabled() and not _hooked():
            try:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_packer(recipes), _unpacked))
            except RuntimeError:  # hooks are forbidden, or these tensors have no memory of their own (torch.func)
                stack.close()
        yield


def _packer(recipes: Sequence[tuple[Tensor, Recipe]]) -> Callable[[Tensor], object]:
    """What packs saved tensors. It lives as long as what it packs, and so must not hold the tensors."""
    places = {x.data_ptr(): (x.shape, recipe) for x, recipe in recipes}

    def pack(saved: Tensor) -> object:
        shape, recipe = places.get(saved.data_ptr(), (None, None))
        if recipe is None or saved.shape != shape:
            return saved
        return recipe, [part._version for part in recipe.parts]

    return pack


def _unpacked(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, versions = packed
    if versions != [part._version for part in recipe.parts]:
        raise RuntimeError("A tensor that the backward pass needs has been modified by an inplace operation.")
    return recipe.make(*recipe.parts)


def _hooked() -> bool:
    """Whether torch's hooks for saved tensors are in use: it refuses to switch them off then."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("Nothing is saved here."):
            return False
    except RuntimeError:
        return True


def _saved(node: Any, name: str) -> Tensor | None:
    """What a node keeps, detached; None where it keeps nothing, or hooks keep it in its place."""
    if getattr(getattr(node, f"_raw_saved_{name}"), "unpack_hook", None) is not None:  # older torch does not tell
        return None
    value = getattr(node, f"_saved_{name}")
    return None if value is None else value.detach()


def _product(node: Any) -> Recipe | None:
    one, other = _saved(node, "self"), _saved(node, "other")
    # Of a factor that needs no gradient the other one is not kept.
    return None if one is None or other is None else Recipe(torch.mul, (one, other))


def _silu(node: Any) -> Recipe | None:
    x = _saved(node, "self")
    return None if x is None else Recipe(F.silu, (x,))


def _gelu(node: Any) -> Recipe | None:
    x = _saved(node, "self")
    return None if x is None else Recipe(partial(F.gelu, approximate=node._saved_approximate), (x,))


def _norm(node: Any) -> Recipe | None:
    x, mean, deviation = (_saved(node, name) for name in ("input", "result1", "result2"))
    if x is None or mean is None or deviation is None or mean.dtype not in (torch.float32, torch.float64):
        return None  # on a CPU the moments may be as coarse as x
    return Recipe(partial(_normalised, weight=_saved(node, "weight"), bias=_saved(node, "bias")), (x, mean, deviation))


def _normalised(x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x − mean) · weight / σ + bias, from the moments that the norm has kept; mean, deviation: E x and 1/σ in float32."""
    out = (x - mean).mul_(deviation)
    if weight is not None:
        out.mul_(weight)
    if bias is not None:
        out.add_(bias)
    return out.to(x.dtype)


_KNOWN: dict[str, Callable[[Any], Recipe | None]] = {
    "MulBackward0": _product, "SiluBackward0": _silu, "GeluBackward0": _gelu, "NativeLayerNormBackward0": _norm,
}  # fmt: skip
"""By the name of autograd's node."""

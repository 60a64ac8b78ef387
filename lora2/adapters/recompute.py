"""Layer inputs that the backward pass recomputes, because autograd saves the tensors that they were computed from anyway.

The gradient of A needs the layer's input, which a frozen linear layer does not save. Where the input is the output of an
activation, a product or a norm, autograd has saved the inputs of that operation. The layer's input is recomputed from them when
it is needed and takes no memory until then. The result is bit-identical, except for a norm: its output is the same up to
float32 rounding before the cast.
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
"""Smallest input that is worth one more kernel launch."""

MIN_WIDTH_RATIO = 4
"""Smallest d_out / d_in for which the four launches of a norm are negligible beside the layer's own products."""


@dataclass(frozen=True)
class Recipe:
    """How to recompute a tensor: `make(*parts)`. parts: detached tensors that autograd saves anyway."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]


def recipe_for(x: Tensor, d_out: int) -> Recipe | None:
    """How to recompute a layer's input x; d_out: the layer's output width.

    None where x is small, is the output of another operation or of one in place, or was changed since, even unseen by autograd
    (a change through `x.data` cannot be detected). None also where hooks for saved tensors are active or were active when x was
    computed, as in a checkpointed block: reading their tensors would run the hooks.
    """
    node: Any = x.grad_fn
    if node is None or x.nbytes < MIN_BYTES or x._version:
        return None
    make_recipe = _RECIPES.get(node.name())
    if make_recipe is None or _hooks_active() or (make_recipe is _norm and d_out < MIN_WIDTH_RATIO * x.shape[-1]):
        return None
    try:
        return make_recipe(node)
    except RuntimeError:  # a part was changed since, or was freed: the backward pass through x will report it
        return None


def saved_tensors(x: Tensor, recipe: Recipe | None) -> tuple[Tensor, ...]:
    """The tensors to save for an input: its recipe's parts, or the input itself."""
    return (x,) if recipe is None else recipe.parts


def recomputed(saved: Sequence[Tensor], make: Callable[..., Tensor] | None) -> Tensor:
    """The input from its saved tensors. make: the recipe's, None where there was no recipe."""
    return saved[0] if make is None else make(*saved)


@contextmanager
def recompute_saved(*known: tuple[Tensor, Recipe | None]) -> Iterator[None]:
    """While inside, torch's own operations save the recipes of these tensors, where there are any, instead of the tensors.

    The backward pass raises RuntimeError if a part has been changed in between, as autograd does.
    """
    recipes = [(x, recipe) for x, recipe in known if recipe is not None]
    with ExitStack() as stack:
        if recipes and torch.is_grad_enabled() and not _hooks_active():
            try:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_packer(recipes), _unpack))
            except RuntimeError:  # hooks are forbidden, or these tensors have no memory of their own (torch.func)
                stack.close()
        yield


def _packer(recipes: Sequence[tuple[Tensor, Recipe]]) -> Callable[[Tensor], object]:
    """The pack hook. It lives as long as its results, so it must not hold the tensors."""
    by_address = {x.data_ptr(): (x.shape, recipe) for x, recipe in recipes}

    def pack(saved: Tensor) -> object:
        shape, recipe = by_address.get(saved.data_ptr(), (None, None))
        if recipe is None or saved.shape != shape:
            return saved
        return recipe, [part._version for part in recipe.parts]

    return pack


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, versions = packed
    if versions != [part._version for part in recipe.parts]:
        raise RuntimeError("A tensor that the backward pass needs has been modified by an inplace operation.")
    return recipe.make(*recipe.parts)


def _hooks_active() -> bool:
    """Whether hooks for saved tensors are active: torch then refuses to disable them."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("Nothing is saved here."):
            return False
    except RuntimeError:
        return True


def _saved(node: Any, name: str) -> Tensor | None:
    """A tensor saved by a node, detached; None where it saved none, or where a hook has replaced it."""
    if getattr(getattr(node, f"_raw_saved_{name}"), "unpack_hook", None) is not None:  # absent in older torch
        return None
    value = getattr(node, f"_saved_{name}")
    return None if value is None else value.detach()


def _product(node: Any) -> Recipe | None:
    one, other = _saved(node, "self"), _saved(node, "other")
    # If one factor requires no gradient, autograd does not save the other.
    return None if one is None or other is None else Recipe(torch.mul, (one, other))


def _silu(node: Any) -> Recipe | None:
    x = _saved(node, "self")
    return None if x is None else Recipe(F.silu, (x,))


def _gelu(node: Any) -> Recipe | None:
    x = _saved(node, "self")
    return None if x is None else Recipe(partial(F.gelu, approximate=node._saved_approximate), (x,))


def _norm(node: Any) -> Recipe | None:
    x, mean, inverse_std = (_saved(node, name) for name in ("input", "result1", "result2"))
    if x is None or mean is None or inverse_std is None or mean.dtype not in (torch.float32, torch.float64):
        return None  # on the CPU the moments may be in x's half precision
    return Recipe(
        partial(_normalized, weight=_saved(node, "weight"), bias=_saved(node, "bias")), (x, mean, inverse_std)
    )


def _normalized(x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x − mean) · weight / σ + bias; mean, inverse_std: E x and 1/σ in float32, as the norm saved them."""
    out = (x - mean).mul_(inverse_std)
    if weight is not None:
        out.mul_(weight)
    if bias is not None:
        out.add_(bias)
    return out.to(x.dtype)


_RECIPES: dict[str, Callable[[Any], Recipe | None]] = {
    "MulBackward0": _product, "SiluBackward0": _silu, "GeluBackward0": _gelu, "NativeLayerNormBackward0": _norm,
}  # fmt: skip
"""By the name of autograd's node."""

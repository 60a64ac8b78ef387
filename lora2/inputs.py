"""Inputs of layers that need not be kept for the backward pass, since what they were made of is kept anyway.

A gradient of A asks for the layer's input, which a frozen linear layer does not keep. Where that is what an activation, a product
or a norm has put out, autograd keeps what went into it: it is made again from that when it is needed, and takes no memory until
then. Bit for bit the same, but for a norm's output, which is the same to float32's rounding before it is cast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 2**20
"""Bytes from which an input is worth one more launch."""

WIDE = 4
"""Times d_in: layers whose own products are so much more work that a norm's four launches do not count."""


@dataclass(frozen=True)
class Recipe:
    """How an input is made again: `make` of `parts`, detached tensors that autograd keeps."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]


def recipe_of(x: Tensor, width: int) -> Recipe | None:
    """How a layer's input x can be made again; None where it is small, was made in another way, or others decide what is kept.

    Those are torch's hooks for saved tensors, as in a checkpointed block: asking for what is kept there would run it again.
    width: d_out of the layer.
    """
    node: Any = x.grad_fn
    if node is None or x.nbytes < LARGE:
        return None
    known = _KNOWN.get(node.name())
    if known is None or _hooked() or (known is _norm and width < WIDE * x.shape[-1]):
        return None
    return known(node)


def kept(x: Tensor, recipe: Recipe | None) -> tuple[Tensor, ...]:
    """What to save of an input: its parts, or itself."""
    return (x,) if recipe is None else recipe.parts


def again(saved: Sequence[Tensor], make: Callable[..., Tensor] | None) -> Tensor:
    """The input from what was saved of it; make: the recipe's, None where there was none."""
    return saved[0] if make is None else make(*saved)


def made_again(*known: tuple[Tensor, Recipe | None]) -> AbstractContextManager[object]:
    """While inside, torch's own operations keep none of these tensors that have a recipe, but make them again by it."""
    places = {x.data_ptr(): (recipe, x.shape) for x, recipe in known if recipe is not None}
    if not places or not torch.is_grad_enabled() or _hooked():
        return nullcontext()

    def pack(saved: Tensor) -> Tensor | Recipe:  # what is packed holds on to this function, and so not to the tensors
        recipe, shape = places.get(saved.data_ptr(), (None, None))
        return recipe if recipe is not None and saved.shape == shape else saved

    def unpack(packed: Tensor | Recipe) -> Tensor:
        return packed.make(*packed.parts) if isinstance(packed, Recipe) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _hooked() -> bool:
    """Whether torch's hooks for saved tensors are in use: it refuses to switch them off then."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("Nothing is saved here."):
            return False
    except RuntimeError:
        return True


def _product(node: Any) -> Recipe | None:
    one, other = node._saved_self, node._saved_other
    # Of a factor that needs no gradient the other one is not kept.
    return None if one is None or other is None else Recipe(torch.mul, (one.detach(), other.detach()))


def _silu(node: Any) -> Recipe:
    return Recipe(F.silu, (node._saved_self.detach(),))


def _gelu(node: Any) -> Recipe:
    return Recipe(partial(F.gelu, approximate=node._saved_approximate), (node._saved_self.detach(),))


def _norm(node: Any) -> Recipe | None:
    moments = (node._saved_result1.detach(), node._saved_result2.detach())
    if moments[0].dtype not in (torch.float32, torch.float64):
        return None  # on a CPU they may be as coarse as x
    weight, bias = (None if t is None else t.detach() for t in (node._saved_weight, node._saved_bias))
    return Recipe(partial(_normalised, weight=weight, bias=bias), (node._saved_input.detach(), *moments))


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

"""The low-rank path of a linear layer as one operation: few launches, and gradients that add up where they lie.

Where steps are launched one operation at a time, a layer costs what Python takes for each, so these are few.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recompute import Recipe, recomputed, saved_tensors

RECOMPUTE_ROWS = 4096
"""From so many rows on, ΛA x is worked out again in the backward pass: keeping it takes rows × rank numbers of every layer."""


class AddLowRank(torch.autograd.Function):
    """output + B Λ A x, for a linear layer's input x (…, d_in) and output (…, d_out).

    down: (capacity, d_in), up: (capacity, d_out), the trained factors; importance: (capacity,) Λ, or None for ones.
    folded: ΛA, cast: B, both in x's type and with rows of zeros up to a multiple of 8 at will. Gradients are added to the
    factors' `.grad` in place where there is one, and returned where there is none. With u = g Bᵀ (g the output's gradient):

        ∂L/∂x = u ΛA        ∂L/∂B = (ΛA x)ᵀ g        ∂L/∂A = Λ uᵀ x

    sums: instead, two tensors of the shapes of folded and cast to which ∂L/∂(ΛA) and ∂L/∂B are added by the products
    themselves; whoever gave them finishes the gradients (packed.py). recipe: how x can be made again instead of being kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        folded: Tensor,
        cast: Tensor,
        importance: Tensor | None,
        sums: tuple[Tensor, Tensor] | None,
        recipe: Recipe | None,
    ) -> Tensor:
        """The sum, in the output's shape."""
        rows = _rows(x)
        hidden = F.linear(rows, folded)
        # Working copies stay as they are until the backward pass. Others are made for this call: saved, checkpointing drops them.
        copies = (folded, cast)
        ctx.save_for_backward(_kept(hidden), *((None, None) if sums else copies), *saved_tensors(rows, recipe))
        ctx.fixed = down, up, copies if sums else None, importance, sums, x.shape, recipe and recipe.make
        total = output.new_empty(output.shape)  # not a view, which the host's in-place additions would be refused on
        torch.addmm(output.reshape(-1, output.shape[-1]), hidden, cast, out=total.view(-1, output.shape[-1]))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of output, x, down and up. Raises RuntimeError where they are to be differentiated in turn."""
        _once()
        down, up, copies, importance, sums, shape, make = ctx.fixed
        hidden, folded, cast, *saved = ctx.saved_tensors
        folded, cast = copies or (folded, cast)
        rows = _rows(recomputed(saved, make))
        hidden = F.linear(rows, folded) if hidden is None else hidden
        g = gradient.reshape(-1, gradient.shape[-1])
        u = F.linear(g, cast)
        to_x = torch.mm(u, folded).view(shape) if ctx.needs_input_grad[1] else None
        if sums is not None:
            sums[0].addmm_(u.t(), rows)
            sums[1].addmm_(hidden.t(), g)
            return gradient, to_x, *(None,) * 7
        to_up = _added(up, (hidden.t() @ g)[: len(up)], None)
        to_down = _added(down, (u.t() @ rows)[: len(down)], importance)
        return gradient, to_x, to_down, to_up, *(None,) * 5


class LowRankLinear(torch.autograd.Function):
    """x Wᵀ + bias + B Λ A x: a frozen linear layer and its low-rank path as one operation.

    For a plain layer of weight (d_out, d_in), bias (d_out,) or None, in x's type or cast to it in either pass: the cast is not
    kept in between. Neither weights nor working copies change before the backward pass, so only activations are saved for it.
    Products add onto each other in place, so that neither pass needs an addition of its own: with u = g Bᵀ,

        ∂L/∂x = g W + u ΛA

    anchor: any tensor that requires a gradient, so that the backward pass comes here for inputs that need none; it gets none.
    folded, cast, sums, recipe: as in AddLowRank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        folded: Tensor,
        cast: Tensor,
        sums: tuple[Tensor, Tensor],
        recipe: Recipe | None,
    ) -> Tensor:
        """(…, d_out)."""
        rows = _rows(x)
        hidden = F.linear(rows, folded)
        ctx.save_for_backward(_kept(hidden), *saved_tensors(rows, recipe))
        ctx.fixed = weight, folded, cast, sums, x.shape, recipe and recipe.make
        if weight.dtype is not x.dtype:
            weight = weight.to(x.dtype)
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        width = weight.shape[0]
        if bias is None and x.is_contiguous():
            total = F.linear(x, weight)
        else:  # not a view, as in AddLowRank
            total = x.new_empty((*x.shape[:-1], width))
            if bias is None:
                torch.mm(rows, weight.t(), out=total.view(-1, width))
            else:
                torch.addmm(bias, rows, weight.t(), out=total.view(-1, width))
        total.view(-1, width).addmm_(hidden, cast)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x; those of the factors are added to the sums. Raises RuntimeError as that of AddLowRank does."""
        _once()
        weight, folded, cast, sums, shape, make = ctx.fixed
        hidden, *saved = ctx.saved_tensors
        rows = _rows(recomputed(saved, make))
        hidden = F.linear(rows, folded) if hidden is None else hidden
        g = gradient.reshape(-1, gradient.shape[-1])
        u = F.linear(g, cast)
        sums[0].addmm_(u.t(), rows)
        sums[1].addmm_(hidden.t(), g)
        if not ctx.needs_input_grad[0]:
            return (None,) * 8
        if weight.dtype is not g.dtype:
            weight = weight.to(g.dtype)
        return torch.mm(g, weight).addmm_(u, folded).view(shape), *(None,) * 7


def _rows(x: Tensor) -> Tensor:
    """(…, d) as (rows, d)."""
    return x.reshape(-1, x.shape[-1])


def _kept(hidden: Tensor) -> Tensor | None:
    """What is kept of ΛA x until the backward pass."""
    return hidden if len(hidden) < RECOMPUTE_ROWS else None


def _once() -> None:
    """Gradients that are added in place have no gradients of their own."""
    if torch.is_grad_enabled():
        raise RuntimeError("The gradients of an adapter cannot be differentiated again.")


def _added(parameter: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor | None:
    """Add a gradient, times `scale` by rows, to the parameter's own; return it where there is none to add to."""
    if parameter.grad is None:
        return (gradient if scale is None else gradient * scale[:, None]).to(parameter.dtype)
    if scale is None:
        parameter.grad.add_(gradient)
    else:
        parameter.grad.addcmul_(gradient, scale[:, None])
    return None

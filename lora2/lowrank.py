"""The low-rank path of a linear layer as one operation: few launches, and gradients that add up where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class AddLowRank(torch.autograd.Function):
    """output + B Λ A x, for a linear layer's input x (…, d_in) and output (…, d_out).

    down: (capacity, d_in), up: (capacity, d_out), the trained factors; importance: (capacity,) Λ, or None for ones.
    folded: ΛA, cast: B, both in x's type and with rows of zeros up to a multiple of 8 at will. Gradients are added to the
    factors' `.grad` in place where there is one, and returned where there is none. With u = g Bᵀ (g the output's gradient):

        ∂L/∂x = u ΛA        ∂L/∂B = (ΛA x)ᵀ g        ∂L/∂A = Λ uᵀ x

    sums: instead, two tensors of the shapes of folded and cast to which ∂L/∂(ΛA) and ∂L/∂B are added by the products
    themselves; whoever gave them finishes the gradients (packed.py).
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
    ) -> Tensor:
        """The sum, in the output's shape."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ folded.t()
        ctx.save_for_backward(rows, hidden, folded, cast)
        ctx.factors, ctx.importance, ctx.sums, ctx.shape = (down, up), importance, sums, x.shape
        total = output.new_empty(output.shape)  # not a view, which the host's in-place additions would be refused on
        torch.addmm(output.reshape(-1, output.shape[-1]), hidden, cast, out=total.view(-1, output.shape[-1]))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of output, x, down and up."""
        rows, hidden, folded, cast = ctx.saved_tensors
        down, up = ctx.factors
        g = gradient.reshape(-1, gradient.shape[-1])
        u = g @ cast.t()
        to_x = (u @ folded).view(ctx.shape) if ctx.needs_input_grad[1] else None
        if ctx.sums is not None:
            ctx.sums[0].addmm_(u.t(), rows)
            ctx.sums[1].addmm_(hidden.t(), g)
            return gradient, to_x, None, None, None, None, None, None
        to_up = _added(up, (hidden.t() @ g)[: len(up)], None)
        to_down = _added(down, (u.t() @ rows)[: len(down)], ctx.importance)
        return gradient, to_x, to_down, to_up, None, None, None, None


class LowRankLinear(torch.autograd.Function):
    """x Wᵀ + bias + B Λ A x: a frozen linear layer and its low-rank path as one operation.

    For a plain layer of weight (d_out, d_in), bias (d_out,) or None, in x's type or cast to it in either pass: the cast is not
    kept in between. Products add onto each other in place, so that neither pass needs an addition of its own: with u = g Bᵀ,

        ∂L/∂x = g W + u ΛA

    anchor: any tensor that requires a gradient, so that the backward pass comes here for inputs that need none; it gets none.
    folded, cast, sums: as in AddLowRank.
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
    ) -> Tensor:
        """(…, d_out)."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ folded.t()
        ctx.save_for_backward(rows, hidden, weight, folded, cast)
        ctx.sums, ctx.shape = sums, x.shape
        total = x.new_empty(*x.shape[:-1], len(weight))  # not a view, as in AddLowRank
        flat, across = total.view(-1, len(weight)), weight.to(x.dtype).t()
        if bias is None:
            torch.mm(rows, across, out=flat)
        else:
            torch.addmm(bias.to(x.dtype), rows, across, out=flat)
        flat.addmm_(hidden, cast)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x; those of the factors are added to the sums."""
        rows, hidden, weight, folded, cast = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        u = g @ cast.t()
        ctx.sums[0].addmm_(u.t(), rows)
        ctx.sums[1].addmm_(hidden.t(), g)
        to_x = (g @ weight.to(g.dtype)).addmm_(u, folded).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return to_x, None, None, None, None, None, None


def _added(parameter: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor | None:
    """Add a gradient, times `scale` by rows, to the parameter's own; return it where there is none to add to."""
    if parameter.grad is None:
        return (gradient if scale is None else gradient * scale[:, None]).to(parameter.dtype)
    if scale is None:
        parameter.grad.add_(gradient)
    else:
        parameter.grad.addcmul_(gradient, scale[:, None])
    return None

"""The low-rank path of a linear layer as one autograd operation: few launches, gradients that accumulate in place.

Outside CUDA graphs, Python's overhead for each operation determines the cost of a layer, so there are few operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recompute import Recipe, recomputed, saved_tensors

RECOMPUTE_ROWS = 4096
"""From this number of rows on, the backward pass recomputes ΛA x: saving it takes rows × rank numbers in every layer."""


class AddLowRank(torch.autograd.Function):
    """output + B Λ A x, for a linear layer's input x (…, d_in) and output (…, d_out).

    down: A, (capacity, d_in); up: Bᵀ, (capacity, d_out), the trained factors; importance: Λ, (capacity,), or None for ones.
    scaled_down: ΛA; cast_up: Bᵀ, both in x's dtype; rows of zeros may follow up to a multiple of 8. Gradients are added to
    the factors' `.grad` in place where there is one, and returned otherwise. With h = x (ΛA)ᵀ, the output's gradient g, u = g B:

        ∂L/∂x = u ΛA        ∂L/∂Bᵀ = hᵀ g        ∂L/∂A = Λ uᵀ x

    sums: two tensors of the shapes of scaled_down and cast_up. If given, ∂L/∂(ΛA) and ∂L/∂Bᵀ are added to them instead, and the
    caller computes the factors' gradients from them (flat_buffers.py). recipe: how to recompute x; None to save it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scaled_down: Tensor,
        cast_up: Tensor,
        importance: Tensor | None,
        sums: tuple[Tensor, Tensor] | None,
        recipe: Recipe | None,
    ) -> Tensor:
        """The sum, in the output's shape."""
        rows = _as_rows(x)
        hidden = F.linear(rows, scaled_down)
        # Working copies do not change before the backward pass. Copies made for this call are saved, so checkpointing frees them.
        copies = (scaled_down, cast_up)
        saved_copies = (None, None) if sums else copies
        ctx.save_for_backward(_unless_large(hidden), *saved_copies, *saved_tensors(rows, recipe))
        ctx.unsaved = down, up, copies if sums else None, importance, sums, x.shape, recipe and recipe.make
        total = output.new_empty(output.shape)  # not a view: autograd forbids the host's in-place additions on one
        torch.addmm(output.reshape(-1, output.shape[-1]), hidden, cast_up, out=total.view(-1, output.shape[-1]))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of output, x, down and up. Raises RuntimeError for a second derivative."""
        _forbid_double_backward()
        down, up, copies, importance, sums, shape, make = ctx.unsaved
        hidden, scaled_down, cast_up, *saved = ctx.saved_tensors
        scaled_down, cast_up = copies or (scaled_down, cast_up)
        rows = _as_rows(recomputed(saved, make))
        hidden = F.linear(rows, scaled_down) if hidden is None else hidden
        g = gradient.reshape(-1, gradient.shape[-1])
        u = F.linear(g, cast_up)
        of_x = torch.mm(u, scaled_down).view(shape) if ctx.needs_input_grad[1] else None
        if sums is not None:
            sums[0].addmm_(u.t(), rows)
            sums[1].addmm_(hidden.t(), g)
            return gradient, of_x, *(None,) * 7
        of_up = _accumulated(up, (hidden.t() @ g)[: len(up)], None)
        of_down = _accumulated(down, (u.t() @ rows)[: len(down)], importance)
        return gradient, of_x, of_down, of_up, *(None,) * 5


class LowRankLinear(torch.autograd.Function):
    """x Wᵀ + bias + B Λ A x: a frozen linear layer and its low-rank path as one operation.

    weight: (d_out, d_in); bias: (d_out,) or None. Either pass casts them to x's dtype where they have another; the cast is not
    saved. Weights and working copies do not change before the backward pass, so only activations are saved. Products
    accumulate in place, so neither pass needs a separate addition: with u = g B,

        ∂L/∂x = g W + u ΛA

    anchor: any tensor that requires a gradient, so that autograd calls `backward` for inputs that require none; it gets none.
    scaled_down, cast_up, sums, recipe: as in AddLowRank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        scaled_down: Tensor,
        cast_up: Tensor,
        sums: tuple[Tensor, Tensor],
        recipe: Recipe | None,
    ) -> Tensor:
        """(…, d_out)."""
        rows = _as_rows(x)
        hidden = F.linear(rows, scaled_down)
        ctx.save_for_backward(_unless_large(hidden), *saved_tensors(rows, recipe))
        ctx.unsaved = weight, scaled_down, cast_up, sums, x.shape, recipe and recipe.make
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
        total.view(-1, width).addmm_(hidden, cast_up)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x; those of the factors are added to `sums`. Raises RuntimeError for a second derivative."""
        _forbid_double_backward()
        weight, scaled_down, cast_up, sums, shape, make = ctx.unsaved
        hidden, *saved = ctx.saved_tensors
        rows = _as_rows(recomputed(saved, make))
        hidden = F.linear(rows, scaled_down) if hidden is None else hidden
        g = gradient.reshape(-1, gradient.shape[-1])
        u = F.linear(g, cast_up)
        sums[0].addmm_(u.t(), rows)
        sums[1].addmm_(hidden.t(), g)
        if not ctx.needs_input_grad[0]:
            return (None,) * 8
        if weight.dtype is not g.dtype:
            weight = weight.to(g.dtype)
        return torch.mm(g, weight).addmm_(u, scaled_down).view(shape), *(None,) * 7


def _as_rows(x: Tensor) -> Tensor:
    """(…, d) as (rows, d)."""
    return x.reshape(-1, x.shape[-1])


def _unless_large(hidden: Tensor) -> Tensor | None:
    """ΛA x where it is saved for the backward pass; None where it is recomputed."""
    return hidden if len(hidden) < RECOMPUTE_ROWS else None


def _forbid_double_backward() -> None:
    """Gradients that accumulate in place have no gradients of their own."""
    if torch.is_grad_enabled():
        raise RuntimeError("The gradients of an adapter cannot be differentiated again.")


def _accumulated(parameter: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor | None:
    """Add a gradient, its rows times `scale`, to the parameter's `.grad`; return it where there is none."""
    if parameter.grad is None:
        return (gradient if scale is None else gradient * scale[:, None]).to(parameter.dtype)
    if scale is None:
        parameter.grad.add_(gradient)
    else:
        parameter.grad.addcmul_(gradient, scale[:, None])
    return None

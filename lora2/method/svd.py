"""The singular order of a LoRA layer, and the split of a budget over layers that have it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..util.errors import LoraError
from .factors import Factors


def float64(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU where the device (Apple's) has no float64."""
    return (tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()).double()


@torch.no_grad()
def singular_order(factors: Factors) -> tuple[Factors, Tensor]:
    """The same ΔW with its positions in the order of its singular values, and those values.

    ΔW = U diag(σ) Vᵀ; up = U √σ and down = √σ Vᵀ share the weight equally, so that cutting the tail is the
    best approximation of every rank (Eckart and Young, 1936) and both factors keep a range that half
    precision can hold. Two QR decompositions reduce the problem to rank × rank: d_out × d_in is never formed.

    Returns float64 Factors of rank k = min(rank, d_out, d_in) with alpha = k, the kernel's shape kept, and
    σ (k,) float64, non-increasing, on the factors' device (the CPU for Apple's, which has no float64). Raises LoraError if a
    factor holds NaN or infinity. For many layers of which a part is kept, see orders.py.
    """
    up = float64(factors.up).reshape(factors.up.shape[0], factors.rank)
    down = float64(factors.down).reshape(factors.rank, factors.down.shape[1:].numel())
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    core = factors.scale * (r_up @ r_down.T)
    if not bool(torch.isfinite(core).all()):
        raise LoraError("A LoRA layer holds NaN, infinity or enormous values, so it has no singular values.")
    try:
        # Singular values of one small matrix take a GPU many times as long as a CPU core.
        u, sigma, vh = (part.to(core.device) for part in torch.linalg.svd(core.cpu(), full_matrices=False))
    except torch.linalg.LinAlgError as error:
        raise LoraError("A LoRA layer holds numbers that are too far apart to be decomposed.") from error
    root = sigma.sqrt()
    rank = sigma.shape[0]
    new_up = ((q_up @ u) * root).reshape(up.shape[0], rank, *[1] * (factors.up.ndim - 2))
    new_down = (root[:, None] * (vh @ q_down.T)).reshape(rank, *factors.down.shape[1:])
    return Factors(new_up, new_down, float(rank)), sigma


def allocate(
    sigmas: Mapping[str, Tensor], costs: Mapping[str, int], budget: int, max_rank: int | None = None
) -> dict[str, int]:
    """Ranks for all layers together, so that the energy kept, Σ σ², is large and Σ rank · cost ≤ budget.

    sigmas: per layer σ (rank,), non-increasing. costs: per layer the price of one unit of rank, in the unit
    of the budget (parameters or bytes). max_rank: an upper limit for every layer.

    Positions are taken in the order of σ² / cost, over all layers; where one does not fit any more, its layer
    is closed and cheaper ones go on, so what is left over is less than one unit of any layer that could still
    grow. Every result is a prefix of its layer's positions. Equal ratios go to the lower position, then to
    the layer that comes first in `sigmas`. Raises LoraError on NaN or infinite σ.
    """
    names = list(sigmas)
    lengths = [len(sigmas[name]) if max_rank is None else min(len(sigmas[name]), max_rank) for name in names]
    ranks = dict.fromkeys(names, 0)
    if not any(lengths):
        return ranks
    # One row per position and one column per layer: a stable sort of the rows then breaks ties as promised.
    table = torch.full((len(names), max(lengths)), -1.0, dtype=torch.float64)
    for row, name, length in zip(table, names, lengths, strict=True):
        row[:length] = sigmas[name][:length].double().cpu().square() / costs[name]
    if not bool(torch.isfinite(table).all()):
        raise LoraError("A layer's singular values hold NaN or infinity, so no budget can be split over them.")
    flat = table.T.reshape(-1)
    order = torch.argsort(flat, descending=True, stable=True)[: sum(lengths)]
    layer = order % len(names)
    price = torch.tensor([costs[name] for name in names], dtype=torch.int64)[layer]
    taken = torch.zeros(len(names), dtype=torch.int64)
    while len(price):
        fits = int((price.cumsum(0) <= budget).sum())
        taken += torch.bincount(layer[:fits], minlength=len(names))
        budget -= int(price[:fits].sum())
        layer, price = layer[fits:], price[fits:]
        # The first position left does not fit, so each turn closes one price for good.
        layer, price = layer[price <= budget], price[price <= budget]
    return {name: int(count) for name, count in zip(names, taken, strict=True)}

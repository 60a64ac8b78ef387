"""The singular orders of many layers at once, as settling needs them: the few positions that are kept, in float32.

`spectrum.singular_order` decomposes one layer by two QR decompositions, in float64 throughout. Here, a layer is reduced to
rank × rank by the products of its factors with themselves, which any device does at the speed of a matrix product; everything
else is small, stays on the CPU, and is shared out over its cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ..util.memory import on_device
from ..util.thread_pool import shared_out
from .factors import Factors, float32
from .svd import singular_order

MOST_INVERSE = 1e4
"""Where ‖L⁻¹‖ of a factor's correlations is larger, its layer is decomposed by QR: what L loses is about ‖L⁻¹‖² · 1.1e-16 of
the layer, 1e-8 at this limit, a sixth of float32's rounding."""


class Order:
    """A layer's singular values, and its first positions on demand.

    sigma: (k,) float64 on the CPU, non-increasing; k = min(rank, d_out, d_in).
    """

    def __init__(self, sigma: Tensor, head: Callable[[int], Factors]) -> None:
        self.sigma = sigma
        self.head = head
        """The first so many positions, float32 on the CPU, ΔW shared equally by both factors, alpha = rank."""


class _Pair:
    """Both factors of a layer as matrices, up (d_out, rank) and down (rank, d_in), on the device that multiplies them."""

    def __init__(self, factors: Factors, device: torch.device) -> None:
        self.factors, self.device = factors, device

    def sides(self) -> tuple[Tensor, Tensor]:
        """Both in float64, each with its positions as columns."""
        up, down, rank = self.factors.up, self.factors.down, self.factors.rank
        moved = (
            t.detach().to(self.device) for t in (up.reshape(len(up), rank), down.reshape(rank, down[0].numel()).t())
        )
        return next(moved).double(), next(moved).double()

    def products(self) -> tuple[Tensor, Tensor]:
        """UᵀU and D Dᵀ, float64 on the CPU."""
        up, down = self.sides()
        return (up.t() @ up).cpu(), (down.t() @ down).cpu()

    def mixed(self, for_up: Tensor, for_down: Tensor) -> Factors:
        """New positions as sums of old ones. for_up, for_down: (rank, new rank) float64."""
        up, down = self.sides()
        rank = for_up.shape[1]
        new_up = (up @ for_up.to(self.device)).float().cpu()
        new_down = (for_down.t().to(self.device) @ down.t()).float().cpu()
        tail = (1,) * (self.factors.up.ndim - 2)
        return Factors(
            new_up.reshape(len(up), rank, *tail), new_down.reshape(rank, *self.factors.down.shape[1:]), float(rank)
        )


@torch.no_grad()
def singular_orders(layers: Mapping[str, Factors], device: torch.device | None = None) -> dict[str, Order]:
    """`singular_order` of all layers, up to float32's rounding.

    device: a GPU for the large products; on any other device, and where its memory runs out, they are made on the CPU. Raises
    LoraError if a factor holds NaN or infinity.
    """
    place = device if device is not None and device.type == "cuda" else torch.device("cpu")

    def products() -> Iterator[Callable[[], Order]]:
        for factors in layers.values():
            yield partial(_order, factors, place, _products(factors, place))

    return dict(zip(layers, shared_out(products()), strict=True))


def _products(factors: Factors, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Both factors' products with themselves; None where they cannot have full rank."""
    if not 0 < factors.rank <= min(len(factors.up), factors.down[0].numel()):
        return None
    return on_device(device, lambda place: _Pair(factors, place).products())


def _order(factors: Factors, device: torch.device, products: tuple[Tensor, Tensor] | None) -> Order:
    """The order by way of the products where they hold enough digits, by QR where they do not.

    With norms N of the positions and N⁻¹ UᵀU N⁻¹ = L Lᵀ, U = Q Lᵀ N has an orthonormal Q = U N⁻¹ L⁻ᵀ; the same for D; and
    ΔW = Q_u (s Lᵀ_u N_u N_d L_d) Qᵀ_d has the singular values of the rank × rank matrix in brackets.
    """
    sides = None if products is None else [_unmixed(product) for product in products]
    if sides is None or sides[0] is None or sides[1] is None:
        return _by_qr(factors)
    (norms_u, lower_u, inverse_u), (norms_d, lower_d, inverse_d) = sides[0], sides[1]
    core = factors.scale * (lower_u.t() * (norms_u * norms_d)) @ lower_d
    try:
        u, sigma, vh = torch.linalg.svd(core)
    except torch.linalg.LinAlgError:
        return _by_qr(factors)  # which has the words for it
    # (rank, rank) each: what of the old positions is in each new one.
    root = sigma.sqrt()
    for_up = (inverse_u.t() @ u) * root / norms_u[:, None]
    for_down = (inverse_d.t() @ vh.t()) * root / norms_d[:, None]

    def head(rank: int) -> Factors:
        return on_device(device, lambda place: _Pair(factors, place).mixed(for_up[:, :rank], for_down[:, :rank]))

    return Order(sigma, head)


def _unmixed(product: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Norms of the positions (rank,), L and L⁻¹ of their correlations; None where positions are zero or all but dependent."""
    norms = product.diagonal().sqrt()
    if not bool((norms > 0).all()) or not math.isfinite(float(norms.sum())):
        return None
    lower, failed = torch.linalg.cholesky_ex(product / torch.outer(norms, norms))
    if int(failed):
        return None
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
    return (norms, lower, inverse) if float(torch.linalg.matrix_norm(inverse)) <= MOST_INVERSE else None


def _by_qr(factors: Factors) -> Order:
    ordered, sigma = singular_order(Factors(factors.up.cpu(), factors.down.cpu(), factors.alpha))

    return Order(sigma, lambda rank: float32(ordered.head(rank)))

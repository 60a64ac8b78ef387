"""The singular order of a LoRA layer, and the split of a budget over layers that have it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ..util.errors import LoraError
from ..util.memory import on_device_or_cpu
from ..util.thread_pool import run_parallel
from .factors import Factors, float32


def float64(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU where the device (Apple's) has no float64."""
    return (tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()).double()


@torch.no_grad()
def decompose(factors: Factors) -> tuple[Factors, Tensor]:
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


@torch.no_grad()
def squared_singular_values(factors: Factors) -> Tensor:
    """σ² of ΔW without its scale, (min(rank, d_out, d_in),) float64, non-increasing.

    The eigenvalues of (downdownᵀ)^½ (upᵀup) (downdownᵀ)^½ are those of ΔWᵀΔW other than zero: only
    rank × rank matrices are decomposed, which is many times faster than an SVD and exact enough for shares of
    the energy (relative error about 1e-15 of the largest). Raises LoraError on NaN or infinity.
    """
    up = float64(factors.up).reshape(factors.up.shape[0], factors.rank)
    down = float64(factors.down).reshape(factors.rank, factors.down.shape[1:].numel())
    if factors.rank > min(up.shape[0], down.shape[1]):
        # More positions than directions: the product is the smaller matrix, whatever rank a file claims.
        product = up @ down
        if not bool(torch.isfinite(product).all()):
            raise LoraError("A LoRA layer holds NaN, infinity or numbers too large to square.")
        return _singular_values(product) ** 2
    left, right = up.T @ up, down @ down.T
    if not (bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())):
        raise LoraError("A LoRA layer holds NaN, infinity or numbers too large to square.")
    try:
        values, vectors = torch.linalg.eigh(right)
        half = vectors * values.clamp_min(0.0).sqrt()
        sigma_squared = torch.linalg.eigvalsh(half.T @ left @ half).clamp_min(0.0).flip(0)
    except torch.linalg.LinAlgError:  # numbers of very different sizes: what takes longer bears them
        return _singular_values(torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T) ** 2
    return sigma_squared[: min(factors.rank, up.shape[0], down.shape[1])]


def _singular_values(matrix: Tensor) -> Tensor:
    try:
        return torch.linalg.svdvals(matrix)
    except torch.linalg.LinAlgError as error:
        raise LoraError("A LoRA layer holds numbers that are too far apart to be decomposed.") from error


def energy_rank(factors: Factors, share: float) -> int:
    """The least number of directions that hold `share` of Σ σ²; 0 for a layer that changes nothing."""
    if factors.rank == 0 or factors.scale == 0.0:
        return 0
    kept = squared_singular_values(factors).cumsum(0)
    total = float(kept[-1]) if len(kept) else 0.0
    # The last sum is the total itself, so a share of 1 finds it in spite of rounding.
    return 0 if total == 0.0 else int((kept < share * total).sum()) + 1


MAX_INVERSE_NORM = 1e4
"""Where ‖L⁻¹‖ of a factor's correlations is larger, its layer is decomposed by QR: what L loses is about ‖L⁻¹‖² · 1.1e-16 of
the layer, 1e-8 at this limit, a sixth of float32's rounding."""


class Decomposition:
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
def decompose_layers(layers: Mapping[str, Factors], device: torch.device | None = None) -> dict[str, Decomposition]:
    """`decompose` of all layers, up to float32's rounding.

    device: a GPU for the large products; on any other device, and where its memory runs out, they are made on the CPU. Raises
    LoraError if a factor holds NaN or infinity.
    """
    place = device if device is not None and device.type == "cuda" else torch.device("cpu")

    def products() -> Iterator[Callable[[], Decomposition]]:
        for factors in layers.values():
            yield partial(_order, factors, place, _products(factors, place))

    return dict(zip(layers, run_parallel(products()), strict=True))


def _products(factors: Factors, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Both factors' products with themselves; None where they cannot have full rank."""
    if not 0 < factors.rank <= min(len(factors.up), factors.down[0].numel()):
        return None
    return on_device_or_cpu(device, lambda place: _Pair(factors, place).products())


def _order(factors: Factors, device: torch.device, products: tuple[Tensor, Tensor] | None) -> Decomposition:
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
        return on_device_or_cpu(device, lambda place: _Pair(factors, place).mixed(for_up[:, :rank], for_down[:, :rank]))

    return Decomposition(sigma, head)


def _unmixed(product: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Norms of the positions (rank,), L and L⁻¹ of their correlations; None where positions are zero or all but dependent."""
    norms = product.diagonal().sqrt()
    if not bool((norms > 0).all()) or not math.isfinite(float(norms.sum())):
        return None
    lower, failed = torch.linalg.cholesky_ex(product / torch.outer(norms, norms))
    if int(failed):
        return None
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
    return (norms, lower, inverse) if float(torch.linalg.matrix_norm(inverse)) <= MAX_INVERSE_NORM else None


def _by_qr(factors: Factors) -> Decomposition:
    ordered, sigma = decompose(Factors(factors.up.cpu(), factors.down.cpu(), factors.alpha))

    return Decomposition(sigma, lambda rank: float32(ordered.head(rank)))

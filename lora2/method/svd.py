"""Singular value decomposition of LoRA layers, ΔW = U diag(σ) Vᵀ, without ever forming d_out × d_in.

decompose: one layer, exact in float64, by QR of both factors. For cutting files and exporting trained layers.
decompose_layers: many layers of which a part is kept, accurate to float32's rounding, by the factors' Gram matrices: their
large products run on a GPU and everything else is rank × rank. For the cuts of training. Layers that are too badly
conditioned for it go through `decompose`.
squared_singular_values, energy_rank: σ² only, for measuring which rank holds a share of the energy Σ σ².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..util.errors import LoraError
from ..util.memory import on_device_or_cpu
from ..util.thread_pool import run_parallel
from .factors import Factors, float32

MAX_INVERSE_NORM = 1e4
"""Largest ‖L⁻¹‖ of the Cholesky factor of a layer's correlations for the Gram path. Its relative error is about
‖L⁻¹‖² · 1.1e-16: 1e-8 at this limit, a sixth of float32's rounding."""


def float64(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if its device is Apple's GPU, which has no float64."""
    return (tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()).double()


def _matrices(factors: Factors, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Both factors as float64 matrices, up (d_out, rank) and down (rank, d_in), on `device` or where they are."""
    up = factors.up.detach().reshape(factors.up.shape[0], factors.rank)
    down = factors.down.detach().reshape(factors.rank, factors.down.shape[1:].numel())
    if device is None:
        return float64(up), float64(down)
    return up.to(device).double(), down.to(device).double()


def _like(factors: Factors, up: Tensor, down: Tensor) -> Factors:
    """Matrices (d_out, k) and (k, d_in) as factors in the shape of the layer's own, with alpha = k."""
    rank = up.shape[1]
    tail = (1,) * (factors.up.ndim - 2)
    return Factors(up.reshape(len(up), rank, *tail), down.reshape(rank, *factors.down.shape[1:]), float(rank))


def _check_finite(*matrices: Tensor) -> None:
    if not all(bool(torch.isfinite(matrix).all()) for matrix in matrices):
        raise LoraError("A LoRA layer has no singular values: it contains NaN, infinity or values too large to square.")


def _not_converged() -> LoraError:
    return LoraError("The singular values of a LoRA layer cannot be computed: its values are too far apart.")


# --- one layer


@torch.no_grad()
def decompose(factors: Factors) -> tuple[Factors, Tensor]:
    """The same ΔW as rank-one components in the order of their singular values, and these values.

    up = U √σ and down = √σ Vᵀ share the weight equally: keeping the first r components is the best approximation of rank r
    (Eckart and Young, 1936), and both factors stay in a range that half precision can represent. Two QR decompositions
    reduce the problem to rank × rank.

    Returns float64 Factors of rank k = min(rank, d_out, d_in) with alpha = k, in the layer's shape, and σ (k,) float64,
    non-increasing, on the factors' device (the CPU for Apple's GPUs, which have no float64). Raises LoraError if a factor
    contains NaN or infinity.
    """
    up, down = _matrices(factors)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    core = factors.scale * (r_up @ r_down.T)
    _check_finite(core)
    try:
        # A GPU takes many times as long as a CPU core for the SVD of one small matrix.
        u, sigma, vh = (part.to(core.device) for part in torch.linalg.svd(core.cpu(), full_matrices=False))
    except torch.linalg.LinAlgError as error:
        raise _not_converged() from error
    root = sigma.sqrt()
    return _like(factors, (q_up @ u) * root, root[:, None] * (vh @ q_down.T)), sigma


@torch.no_grad()
def squared_singular_values(factors: Factors) -> Tensor:
    """σ² of ΔW without its scale, (min(rank, d_out, d_in),) float64, non-increasing.

    The eigenvalues of (downdownᵀ)^½ (upᵀup) (downdownᵀ)^½ are those of ΔWᵀΔW other than zero. Only rank × rank matrices are
    decomposed, which is many times faster than an SVD and exact enough for shares of the energy (relative error about 1e-15
    of the largest). Raises LoraError on NaN or infinity.
    """
    up, down = _matrices(factors)
    if factors.rank > min(up.shape[0], down.shape[1]):
        # The product is the smaller matrix, whatever rank a file claims.
        product = up @ down
        _check_finite(product)
        return _singular_values(product) ** 2
    left, right = up.T @ up, down @ down.T
    _check_finite(left, right)
    try:
        values, vectors = torch.linalg.eigh(right)
        half = vectors * values.clamp_min(0.0).sqrt()
        sigma_squared = torch.linalg.eigvalsh(half.T @ left @ half).clamp_min(0.0).flip(0)
    except torch.linalg.LinAlgError:  # values of very different sizes; QR is slower and converges
        return _singular_values(torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T) ** 2
    return sigma_squared[: min(factors.rank, up.shape[0], down.shape[1])]


def _singular_values(matrix: Tensor) -> Tensor:
    try:
        return torch.linalg.svdvals(matrix)
    except torch.linalg.LinAlgError as error:
        raise _not_converged() from error


def energy_rank(factors: Factors, share: float) -> int:
    """The lowest rank whose best approximation holds `share` of Σ σ²; 0 for a layer that changes nothing."""
    if factors.rank == 0 or factors.scale == 0.0:
        return 0
    energy = squared_singular_values(factors).cumsum(0)
    total = float(energy[-1]) if len(energy) else 0.0
    # The last sum is the total itself, so a share of 1 is found in spite of rounding.
    return 0 if total == 0.0 else int((energy < share * total).sum()) + 1


# --- many layers


@dataclass(frozen=True)
class Decomposition:
    """A layer's singular values, and its first components on demand.

    sigma: (k,) float64 on the CPU, non-increasing; k = min(rank, d_out, d_in). head: the first r components as Factors,
    float32 on the CPU, in the layer's shape, √σ in both factors, with alpha = r.
    """

    sigma: Tensor
    head: Callable[[int], Factors]


@torch.no_grad()
def decompose_layers(layers: Mapping[str, Factors], device: torch.device | None = None) -> dict[str, Decomposition]:
    """`decompose` of every layer, accurate to float32's rounding.

    device: a GPU for the large products. They run on the CPU on any other device, and where the GPU is out of memory. Raises
    LoraError if a factor contains NaN or infinity.
    """
    compute = device if device is not None and device.type == "cuda" else torch.device("cpu")

    def tasks() -> Iterator[Callable[[], Decomposition]]:
        for factors in layers.values():
            yield partial(_by_gram_or_qr, factors, compute, _gram_matrices(factors, compute))

    return dict(zip(layers, run_parallel(tasks()), strict=True))


def _gram_matrices(factors: Factors, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """UᵀU and D Dᵀ, float64 on the CPU; None where they are singular by their shape."""
    if not 0 < factors.rank <= min(len(factors.up), factors.down[0].numel()):
        return None

    def products(device: torch.device) -> tuple[Tensor, Tensor]:
        up, down = _matrices(factors, device)
        return (up.t() @ up).cpu(), (down @ down.t()).cpu()

    return on_device_or_cpu(device, products)


def _by_gram_or_qr(factors: Factors, device: torch.device, grams: tuple[Tensor, Tensor] | None) -> Decomposition:
    """By the Gram matrices where they are well conditioned, else by QR.

    With norms N of U's columns and N⁻¹ UᵀU N⁻¹ = L Lᵀ, U = Q Lᵀ N with an orthonormal Q = U N⁻¹ L⁻ᵀ; likewise for D. Then
    ΔW = Q_u (s Lᵀ_u N_u N_d L_d) Qᵀ_d has the singular values of the rank × rank matrix in parentheses.
    """
    sides = None if grams is None else [_whiten(gram) for gram in grams]
    if sides is None or sides[0] is None or sides[1] is None:
        return _by_qr(factors)
    (norms_u, lower_u, inverse_u), (norms_d, lower_d, inverse_d) = sides[0], sides[1]
    core = factors.scale * (lower_u.t() * (norms_u * norms_d)) @ lower_d
    try:
        u, sigma, vh = torch.linalg.svd(core)
    except torch.linalg.LinAlgError:
        return _by_qr(factors)  # raises the error that explains it
    # (rank, rank) each: the new components as combinations of the old ones.
    root = sigma.sqrt()
    for_up = (inverse_u.t() @ u) * root / norms_u[:, None]
    for_down = (inverse_d.t() @ vh.t()) * root / norms_d[:, None]

    def head(rank: int) -> Factors:
        def combined(device: torch.device) -> Factors:
            up, down = _matrices(factors, device)
            new_up = (up @ for_up[:, :rank].to(device)).float().cpu()
            return _like(factors, new_up, (for_down[:, :rank].t().to(device) @ down).float().cpu())

        return on_device_or_cpu(device, combined)

    return Decomposition(sigma, head)


def _whiten(gram: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Norms N (rank,), L and L⁻¹ with N⁻¹ gram N⁻¹ = L Lᵀ; None if components are zero or nearly dependent."""
    norms = gram.diagonal().sqrt()
    if not bool((norms > 0).all()) or not math.isfinite(float(norms.sum())):
        return None
    lower, failed = torch.linalg.cholesky_ex(gram / torch.outer(norms, norms))
    if int(failed):
        return None
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
    return (norms, lower, inverse) if float(torch.linalg.matrix_norm(inverse)) <= MAX_INVERSE_NORM else None


def _by_qr(factors: Factors) -> Decomposition:
    exact, sigma = decompose(Factors(factors.up.cpu(), factors.down.cpu(), factors.alpha))
    return Decomposition(sigma, lambda rank: float32(exact.head(rank)))

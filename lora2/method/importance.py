"""Importance of a layer's components, and the rank that follows from it.

Symbols follow Shenaj, Errica, Carta, "Not All Layers Are Created Equal" (arXiv:2603.21884) and its parent, Errica et al.,
"Adaptive Width Neural Networks" (arXiv:2501.15889): ν is the rate of a discretized exponential over components j = 0, 1, …,
q the share of its mass that a layer keeps, D the rank. The learned parameter is θ, the logarithm of the continuous rank
ρ = c / ν with c = −ln(1 − q), so that one step in θ changes every rank by the same fraction and ν stays positive.
Every function works elementwise on tensors of any float dtype and device and never copies to the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# e^(ln 64) is 64.000004 in float32; without this slack a rank set to a whole number would round up to the next one.
CEIL_SLACK = 2e-6


def mass_constant(q: float) -> float:
    """The constant c = −ln(1 − q), for 0 < q < 1."""
    return -math.log1p(-q)


def rate(theta: Tensor, q: float) -> Tensor:
    """ν = c e^(−θ): the rate of a log rank θ."""
    return mass_constant(q) * torch.exp(-theta)


def importance(component: Tensor, nu: Tensor) -> Tensor:
    """f(j; ν) = e^(−νj) (1 − e^(−ν)): the mass of component j, which sums to 1 over all j ≥ 0."""
    return torch.exp(-nu * component) * -torch.expm1(-nu)


def log_importance_slope(component: Tensor, nu: Tensor) -> Tensor:
    """∂ ln f(j; ν) / ∂θ = ν (j − 1 / (e^ν − 1)), by ∂ν/∂θ = −ν."""
    return nu * (component - 1 / torch.expm1(nu))


def quantile_rank(theta: Tensor) -> Tensor:
    """D = ⌈c / ν⌉ = ⌈e^θ⌉: the fewest components whose mass reaches q. A float tensor of integers, at least 1."""
    rho = torch.exp(theta)
    return torch.ceil(rho * (1 - CEIL_SLACK)).clamp(min=1)


def down_std(d_in: int) -> float:
    """σ of the down factor's initialization: σ² = 1 / (3 d_in), the variance of a plain LoRA's Kaiming-uniform (a = √5) rows."""
    return math.sqrt(1 / (3 * d_in))


def gain(rank: int, energy: float) -> float:
    """G = √(D / Σ_{j<D} f(j; ν)²), which makes E‖gΛA‖² that of a plain LoRA of rank D with alpha = rank.

    g is a constant of the layer that moves A's scale into Λ: under an optimizer whose steps do not depend on the scale of
    gradients, A then learns as fast as in a plain LoRA.
    """
    return math.sqrt(rank / energy)


def paper_down_std(energy: float) -> float:
    """σ = √2 / √Σf²: the paper's literal "rescaled Kaiming", which does not depend on the fan-in."""
    return math.sqrt(2 / energy)


def kept_energy(rank: int, nu: float) -> float:
    """Σ_{j<D} f(j; ν)² in closed form: (1 − e^(−ν))² (1 − e^(−2νD)) / (1 − e^(−2ν))."""
    return math.expm1(-nu) ** 2 * math.expm1(-2 * nu * rank) / math.expm1(-2 * nu)

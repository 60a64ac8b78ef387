"""Sensitivity of the loss to a change of each layer, from the optimizer's mean squared gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MAX_SENSITIVITY = 1e30
"""Beyond it a layer has hardly any energy to weigh."""


@torch.no_grad()
def sensitivities(layers: Iterable[tuple[str, Tensor, Tensor, Tensor | None]]) -> dict[str, float] | None:
    """Loss per unit of a layer's energy ‖ΔW‖², by layer, up to a factor that all layers share.

    layers: name, up factor B (rank, d_out), down factor ΛA (rank, …), mean of (∂L/∂B)² (rank, d_out) as Adam's second moment.

    Removing component j raises the loss by about ½ Σ_k F_jk b_jk², with the diagonal of the Fisher information F estimated by
    the mean of (∂L/∂b_jk)² (LeCun et al., "Optimal Brain Damage", 1990; Theis et al., arXiv:1801.05787). Summed over the
    layer's components and divided by their energy Σ_j ‖b_j‖² ‖Λ_j a_j‖² it weighs σ² of every component. Both sums are over
    the components that are trained; after a cut those are rotated (rotation.py), so they differ from those in singular order.
    Returns None when nothing is known yet: an optimizer without second moments, or before its first step.
    """
    names, worth, energy = [], [], []
    for name, up, down, squares in layers:
        if squares is None:
            return None
        wide = torch.float32 if up.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        squared = up.detach().to(wide).square()
        names.append(name)
        worth.append((squares.to(wide) * squared).sum())
        energy.append((squared.sum(1) * down.to(wide).flatten(1).square().sum(1)).sum())
    table = torch.stack([torch.stack(worth), torch.stack(energy)])
    (over, under) = table.tolist()
    if not bool(torch.isfinite(table).all()) or not any(w > 0 for w in over):
        return None
    return {name: min(w / e, MAX_SENSITIVITY) if e > 0 else 1.0 for name, w, e in zip(names, over, under, strict=True)}

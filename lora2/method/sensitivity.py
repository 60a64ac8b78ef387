"""Sensitivity of the loss to a change of each layer, from the optimizer's mean squared gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MAX_SENSITIVITY = 1e30
"""Only layers of hardly any energy exceed it."""


@torch.no_grad()
def sensitivities(layers: Iterable[tuple[str, Tensor, Tensor, Tensor | None]]) -> dict[str, float] | None:
    """Loss per unit of a layer's energy ‖ΔW‖², by layer, up to a factor that all layers share.

    layers: name, up factor B (rank, d_out), down factor ΛA (rank, …), mean of (∂L/∂B)² (rank, d_out) as Adam's second moment.

    Removing component j raises the loss by about ½ Σ_k F_jk b_jk², with the diagonal of the Fisher information F estimated by
    the mean of (∂L/∂b_jk)² (LeCun et al., "Optimal Brain Damage", 1990; Theis et al., arXiv:1801.05787). Summed over the
    layer's components and divided by their energy Σ_j ‖b_j‖² ‖Λ_j a_j‖² it weighs σ² of every component. Both sums are over
    the components that are trained; after a cut those are rotated (rotation.py), so they differ from those in singular order.
    Returns None without second moments: another optimizer, or before its first step.
    """
    names, saliency, energy = [], [], []
    for name, up, down, second_moment in layers:
        if second_moment is None:
            return None
        wide = torch.float32 if up.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        squared = up.detach().to(wide).square()
        names.append(name)
        saliency.append((second_moment.to(wide) * squared).sum())
        energy.append((squared.sum(1) * down.to(wide).flatten(1).square().sum(1)).sum())
    table = torch.stack([torch.stack(saliency), torch.stack(energy)])
    saliencies, energies = table.tolist()
    if not bool(torch.isfinite(table).all()) or not any(s > 0 for s in saliencies):
        return None
    return {
        name: min(s / e, MAX_SENSITIVITY) if e > 0 else 1.0
        for name, s, e in zip(names, saliencies, energies, strict=True)
    }

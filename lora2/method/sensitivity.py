"""How much the loss minds a change of each layer, from the optimizer's mean squared gradients."""

from __future__ import annotations

import torch

from ..adapters.network import AdaptiveNetwork

MAX_SENSITIVITY = 1e30
"""Beyond it a layer has hardly any energy to weigh."""


@torch.no_grad()
def sensitivities(network: AdaptiveNetwork, optimizer: torch.optim.Optimizer) -> dict[str, float] | None:
    """The loss that a unit of a layer's energy ‖ΔW‖² is worth, by layer, up to a factor that all share.

    Without a position's b_j the loss rises by about ½ Σ_k F_jk b_jk², with the diagonal of the Fisher information F as the
    mean of (∂L/∂b_jk)² (LeCun et al., "Optimal Brain Damage", 1990; Theis et al., arXiv:1801.05787): Adam's second moment.
    Summed over the layer's positions and divided by their energy Σ_j ‖b_j‖² ‖Λ_j a_j‖² it weighs σ² of every position. Both
    sums are of the positions that are trained: after a cut those are mixtures (mixing.py), whose sums are not those of singular
    order.
    None where nothing is known yet: an optimizer without second moments, or before its first steps.
    """
    wide = torch.float32 if network.device.type == "mps" else torch.float64  # Apple's has no float64
    worth, energy = [], []
    for adapter in network.adapters:
        squares = optimizer.state.get(adapter.up, {}).get("exp_avg_sq")
        if squares is None:
            return None
        up = adapter.up.detach().to(wide).square()
        down = adapter.folded_down().to(wide).flatten(1).square().sum(1)
        worth.append((squares.to(wide) * up).sum())
        energy.append((up.sum(1) * down).sum())
    table = torch.stack([torch.stack(worth), torch.stack(energy)])
    (over, under) = table.tolist()
    if not bool(torch.isfinite(table).all()) or not any(w > 0 for w in over):
        return None
    return {
        name: min(w / e, MAX_SENSITIVITY) if e > 0 else 1.0
        for name, w, e in zip(network.names, over, under, strict=True)
    }

"""One step of the factors and of θ, clipped, and not taken when a gradient is not a number."""

from __future__ import annotations

import torch
from torch import Tensor

from .network import AdaptiveNetwork
from .settings import Settings

BETAS = (0.9, 0.99)
"""A run has hundreds of steps, not millions: β₂ = 0.999 would remember the start for all of it."""


class Optimizer:
    """AdamW, Adam or SGD over the factors, and Adam over θ with a learning rate of its own."""

    def __init__(self, network: AdaptiveNetwork, settings: Settings) -> None:
        self.network = network
        self.settings = settings
        self.inner = _factor_optimizer(network.parameters(), settings)
        self.theta = (
            None
            if network.settled
            else torch.optim.Adam([network.theta], lr=settings.rank_learning_rate, betas=BETAS, fused=True)
        )

    @torch.no_grad()
    def step(self, rate: float, ranks_move: bool, loss: Tensor) -> bool:
        """Take the accumulated gradients with `rate` times the learning rate and clear them.

        False, and no step, if they or the loss are not finite (a loss may overflow where its gradients do not).
        """
        if self.theta is not None:
            self.network.write_theta_gradient()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = global_norm(gradients)
        finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
        if finite:
            if self.settings.clip_norm > 0:
                torch._foreach_mul_(gradients, (self.settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            for group in self.inner.param_groups:
                group["lr"] = self.settings.learning_rate * rate
            self.inner.step()
            if self.theta is not None and ranks_move:
                self.theta.step()
        self.network.forget_gradients()
        return finite


def global_norm(gradients: list[Tensor]) -> Tensor:
    """√Σ‖g‖² over all tensors, a scalar on their device."""
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _factor_optimizer(factors: list[torch.nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    fused = all(p.is_cuda or p.device.type == "cpu" for p in factors)
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(factors, lr=rate, momentum=0.9, weight_decay=decay, fused=fused)
    if settings.optimizer == "adam":
        return torch.optim.Adam(factors, lr=rate, betas=BETAS, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(factors, lr=rate, betas=BETAS, weight_decay=decay, fused=fused)

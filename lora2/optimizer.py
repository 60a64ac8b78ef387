"""One step of the factors and of θ, clipped, and not taken when a gradient is not a number.

All on the device: nothing here waits for a value, so that a step can be recorded and replayed (engine.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .network import AdaptiveNetwork
from .settings import Settings

BETAS = (0.9, 0.99)
"""A run has hundreds of steps, not millions: β₂ = 0.999 would remember the start for all of it."""

FUSED = ("cuda", "cpu")
"""Devices whose fused optimizers skip a step, and unscale gradients, by a tensor on the device."""


class Optimizer:
    """AdamW, Adam or SGD over the factors, and Adam over θ with a learning rate of its own."""

    def __init__(self, network: AdaptiveNetwork, settings: Settings) -> None:
        self.network = network
        self.settings = settings
        self.fused = network.device.type in FUSED
        self._capturable = network.device.type == "cuda"
        self.inner = self._make(network.parameters(), settings.optimizer, settings.learning_rate, settings.weight_decay)
        self.theta = None if network.settled else self._make([network.theta], "adam", settings.rank_learning_rate, 0.0)
        self._hold = torch.zeros((), device=network.device)
        self.norms = torch.zeros(0, device=network.device)
        """Of the gradients last taken, in the order of the network's parameters."""
        self.half_taken = False
        """While a step that has begun to change parameters is not complete: it cannot be made again."""

    def _make(self, parameters: list[torch.nn.Parameter], kind: str, rate: float, decay: float) -> torch.optim.Optimizer:
        lr = torch.tensor(rate, device=self.network.device) if self._capturable else rate
        if kind == "sgd":
            sgd = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay, fused=self.fused)
            for parameter in parameters:  # else a first step that is skipped leaves whatever the memory held
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        cls = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
        return cls(parameters, lr=lr, betas=BETAS, weight_decay=decay, fused=self.fused, capturable=self._capturable)

    def step(self, rate: float, ranks_move: bool, loss: Tensor) -> Tensor:
        """Take the accumulated gradients with `rate` times the learning rate and clear them.

        Returns () bool on the device: False, and no step, if they or the loss are not finite (a loss may overflow where its
        gradients do not).
        """
        self.prepare(rate, ranks_move)
        return self.take(loss)

    def prepare(self, rate: float, ranks_move: bool) -> None:
        """Set what the next `take` goes by."""
        self.half_taken = False
        for group in self.inner.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.settings.learning_rate * rate)
            else:
                group["lr"] = self.settings.learning_rate * rate
        self._hold.fill_(0.0 if ranks_move else 1.0)

    @torch.no_grad()
    def take(self, loss: Tensor) -> Tensor:
        """`step` without setting anything: the same launches every time."""
        self.network.finish_gradients()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        self.norms = gradient_norms(gradients, loss)
        norm = torch.linalg.vector_norm(self.norms)
        taken = torch.isfinite(norm) & torch.isfinite(loss)
        skip = (~taken).to(torch.float32)
        excess = (norm / self.settings.clip_norm).clamp(min=1.0) if self.settings.clip_norm > 0 else torch.ones_like(norm)
        self._move(self.inner, gradients, excess, skip)
        self.half_taken = True
        if self.theta is not None:
            assert self.network.theta.grad is not None  # noqa: S101 (written just now)
            self._move(self.theta, [self.network.theta.grad], torch.ones_like(norm), torch.maximum(skip, self._hold))
        self.half_taken = False
        self.network.clear_gradients()
        return taken

    def _move(self, optimizer: torch.optim.Optimizer, gradients: list[Tensor], excess: Tensor, skip: Tensor) -> None:
        """A step with gradients divided by `excess`, or none where `skip` is 1."""
        if self.fused:
            optimizer.grad_scale, optimizer.found_inf = excess.float(), skip.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not bool(skip):
            self.half_taken = True
            torch._foreach_div_(gradients, excess)
            optimizer.step()


def global_norm(gradients: list[Tensor], like: Tensor | None = None) -> Tensor:
    """√Σ‖g‖² over all tensors, a scalar on their device."""
    return torch.linalg.vector_norm(gradient_norms(gradients, like))


def gradient_norms(gradients: list[Tensor], like: Tensor | None = None) -> Tensor:
    """‖g‖ of every tensor, (tensors,) on their device; where there are none, on that of `like`."""
    if not gradients:
        return torch.zeros(0) if like is None else like.new_zeros(0)
    return torch.stack(torch._foreach_norm(gradients))

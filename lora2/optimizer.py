"""One step of the factors and of θ, clipped, and not taken when a gradient is not a number.

All on the device: nothing here waits for a value, so that a step can be recorded and replayed (engine.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import LoraError
from .keys import shown
from .network import AdaptiveNetwork
from .settings import Settings
from .state import State, damaged

BETAS = (0.9, 0.99)
"""A run has hundreds of steps, not millions: β₂ = 0.999 would remember the start for all of it."""

MOMENTS = {
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}
"""What each kind remembers of a parameter."""

FUSED = ("cuda", "cpu")
"""Devices whose fused optimizers skip a step, and unscale gradients, by a tensor on the device."""


class Optimizer:
    """AdamW, Adam or SGD over the factors, and Adam over θ with a learning rate of its own."""

    def __init__(self, network: AdaptiveNetwork, settings: Settings) -> None:
        self.network = network
        self.settings = settings
        self._kind = settings.optimizer
        self.broken = False
        """Whether an error broke off while factors moved: some of them have, some have not."""
        self.fused = network.device.type in FUSED
        self._capturable = network.device.type == "cuda"
        self.inner = self._make(network.parameters(), settings.optimizer, settings.learning_rate, settings.weight_decay)
        self.theta = None if network.settled else self._make([network.theta], "adam", settings.rank_learning_rate, 0.0)
        self._hold = torch.zeros((), device=network.device)

    def _make(self, parameters: list[torch.nn.Parameter], kind: str, rate: float, decay: float) -> torch.optim.Optimizer:
        lr = torch.tensor(rate, device=self.network.device) if self._capturable else rate
        if kind == "sgd":
            sgd = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay, fused=self.fused)
            for parameter in parameters:  # else a first step that is skipped leaves whatever the memory held
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        cls = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
        return cls(parameters, lr=lr, betas=BETAS, weight_decay=decay, fused=self.fused, capturable=self._capturable)

    def state(self) -> State:
        """The moments and step counters of every parameter, under its place in the order; without any before the first step."""
        return State({name: value for name, _, value in self._moments()}, {"kind": self._kind})

    def restore(self, state: State) -> None:
        """Take moments and counters of an optimizer over a network of the same shapes. Raises LoraError where they do not fit."""
        names = MOMENTS[self._kind]
        if MOMENTS.get(str(state.facts.get("kind"))) != names:
            raise LoraError("The training state was made with another optimizer. Choose the one that it was made with.")
        begun = bool(state.tensors)
        for group, optimizer in self._groups():
            for index, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                kind = MOMENTS["adam"] if group == "theta" else names
                if begun:
                    optimizer.state[parameter] = {n: self._restored(state, f"{group}.{index}.{n}", n, parameter) for n in kind}

    def _restored(self, state: State, key: str, name: str, parameter: torch.nn.Parameter) -> Tensor:
        value = state.tensor(key, () if name == "step" else parameter.shape)
        if name != "momentum_buffer" and bool((value < 0).any()) and name != "exp_avg":
            damaged(f"{shown(key)} is negative")
        waits = name == "step" and not (self.fused or self._capturable)
        return value.to("cpu" if waits else parameter.device, copy=True)

    def _groups(self) -> Iterator[tuple[str, torch.optim.Optimizer]]:
        yield "factors", self.inner
        if self.theta is not None:
            yield "theta", self.theta

    def _moments(self) -> Iterator[tuple[str, torch.nn.Parameter, Tensor]]:
        for group, optimizer in self._groups():
            for index, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                for name, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        yield f"{group}.{index}.{name}", parameter, value

    def step(self, rate: float, ranks_move: bool, loss: Tensor) -> Tensor:
        """Take the accumulated gradients with `rate` times the learning rate and clear them.

        Returns () bool on the device: False, and no step, if they or the loss are not finite (a loss may overflow where its
        gradients do not).
        """
        self.prepare(rate, ranks_move)
        return self.take(loss)

    def prepare(self, rate: float, ranks_move: bool) -> None:
        """Set what the next `take` goes by."""
        for group in self.inner.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.settings.learning_rate * rate)
            else:
                group["lr"] = self.settings.learning_rate * rate
        self._hold.fill_(0.0 if ranks_move else 1.0)

    @torch.no_grad()
    def take(self, loss: Tensor) -> Tensor:
        """`step` without setting anything: the same launches every time."""
        self.broken = True
        self.network.finish_gradients()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = global_norm(gradients, loss)
        taken = torch.isfinite(norm) & torch.isfinite(loss)
        skip = (~taken).to(torch.float32)
        excess = (norm / self.settings.clip_norm).clamp(min=1.0) if self.settings.clip_norm > 0 else torch.ones_like(norm)
        self._move(self.inner, gradients, excess, skip)
        if self.theta is not None:
            assert self.network.theta.grad is not None  # noqa: S101 (written just now)
            self._move(self.theta, [self.network.theta.grad], torch.ones_like(norm), torch.maximum(skip, self._hold))
        self.network.clear_gradients()
        self.broken = False
        return taken

    def _move(self, optimizer: torch.optim.Optimizer, gradients: list[Tensor], excess: Tensor, skip: Tensor) -> None:
        """A step with gradients divided by `excess`, or none where `skip` is 1."""
        if self.fused:
            optimizer.grad_scale, optimizer.found_inf = excess.float(), skip.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not bool(skip):
            torch._foreach_div_(gradients, excess)
            optimizer.step()


def global_norm(gradients: list[Tensor], like: Tensor | None = None) -> Tensor:
    """√Σ‖g‖² over all tensors, a scalar on their device."""
    if not gradients:
        return torch.zeros(()) if like is None else torch.zeros_like(like)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

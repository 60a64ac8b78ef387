"""One step of the factors and of θ, clipped, and not taken when a gradient is not a number.

All on the device: nothing here waits for a value, so that a step can be recorded and replayed (engine.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..adapters.network import AdaptiveNetwork
from ..checkpoints.state import State, raise_corrupted
from ..config import TrainingConfig
from ..method import sensitivity
from ..util.errors import LoraError
from ..util.text import escaped

BETAS = (0.9, 0.99)
"""A run has hundreds of steps, not millions: β₂ = 0.999 would remember the start for all of it."""

FUSED = ("cuda", "cpu")
"""Devices whose fused optimizers skip a step, and unscale gradients, by a tensor on the device."""

CAPTURABLE = ("cuda",)
"""Devices whose steps may be recorded: learning rates are then tensors, which a replay reads anew."""

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""What each optimizer remembers of every number."""


class Optimizer:
    """AdamW, Adam or SGD over the factors, and Adam over θ with a learning rate of its own.

    inner: holds every factor's moments; whoever resizes, saves or restores a factor works on it. The steps themselves are taken
    by another optimizer over the blocks that the factors lie in (packed.py), a few large tensors instead of a thousand, whose
    moments are the same memory: `prepare` sees to that whenever either has changed.
    """

    def __init__(self, network: AdaptiveNetwork, config: TrainingConfig) -> None:
        self.network = network
        self.config = config
        self.fused = network.device.type in FUSED
        self._capturable = network.device.type in CAPTURABLE
        self.inner = self._make(network.parameters(), config.optimizer, config.learning_rate, config.weight_decay)
        self._whole = self.inner
        self._parts: list[tuple[torch.nn.Parameter, str, Tensor]] = []
        self.theta = None if network.pruned else self._make([network.theta], "adam", config.rank_learning_rate, 0.0)
        self._hold = torch.zeros((), device=network.device)
        self.norms = torch.zeros(0, device=network.device)
        """Of the gradients last taken, in the order of the network's parameters."""
        self.partially_applied = False
        """While a step that has begun to change parameters is not complete: it cannot be made again."""

    def _make(
        self, parameters: list[torch.nn.Parameter], kind: str, rate: float, decay: float
    ) -> torch.optim.Optimizer:
        lr = torch.tensor(rate, device=self.network.device) if self._capturable else rate
        if kind == "sgd":
            sgd = torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=self.fused)
            for parameter in parameters:  # else a first step that is skipped leaves whatever the memory held
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        cls, decay = (torch.optim.Adam, 0.0) if kind == "adam" else (torch.optim.AdamW, decay)
        return cls(parameters, lr=lr, betas=BETAS, weight_decay=decay, fused=self.fused, capturable=self._capturable)

    def state(self) -> State:
        """The moments and step counters of every parameter, under its place in the order; without any before the first step."""
        moments = {
            f"{place}.{name}": value
            for place, optimizer, parameter in self._places()
            for name, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return State(moments, {"kind": self.config.optimizer})

    def restore(self, state: State) -> None:
        """Take moments and counters of an optimizer over a network of the same shapes. Raises LoraError where they do not fit."""
        names = _remembered(self.config.optimizer)
        if _remembered(str(state.facts.get("kind"))) != names:
            raise LoraError("The training state was made with another optimizer. Choose the one that it was made with.")
        if not state.tensors:
            return  # before the first step
        for place, optimizer, parameter in self._places():
            kind = names if optimizer is self.inner else _remembered("adam")
            optimizer.state[parameter] = {n: self._restored(state, f"{place}.{n}", n, parameter) for n in kind}

    def _restored(self, state: State, key: str, name: str, parameter: torch.nn.Parameter) -> Tensor:
        value = state.tensor(key, () if name == "step" else parameter.shape)
        if name != "momentum_buffer" and bool((value < 0).any()) and name != "exp_avg":
            raise_corrupted(f"{escaped(key)} is negative")
        waits = name == "step" and not (self.fused or self._capturable)
        return value.to("cpu" if waits else parameter.device, copy=True)

    def _places(self) -> Iterator[tuple[str, torch.optim.Optimizer, torch.nn.Parameter]]:
        """Every parameter with its optimizer, and what its moments are called in a state."""
        for group, optimizer in (("factors", self.inner), ("theta", self.theta)):
            if optimizer is None:
                continue
            for index, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                yield f"{group}.{index}", optimizer, parameter

    def sensitivities(self) -> dict[str, float] | None:
        """Loss per unit of each layer's energy now (method/sensitivity.py); None before the first step."""
        return sensitivity.sensitivities(
            (name, a.up, a.scaled_down(), self.inner.state.get(a.up, {}).get("exp_avg_sq"))
            for name, a in zip(self.network.names, self.network.adapters, strict=True)
        )

    def step(self, rate: float, ranks_move: bool, loss: Tensor) -> Tensor:
        """Take the accumulated gradients with `rate` times the learning rate and clear them.

        Returns () bool on the device: False, and no step, if they or the loss are not finite (a loss may overflow where its
        gradients do not).
        """
        self.prepare(rate, ranks_move)
        return self.take(loss)

    def prepare(self, rate: float, ranks_move: bool) -> None:
        """Set what the next `take` goes by."""
        self.partially_applied = False
        self._lay_out()
        for group in (*self.inner.param_groups, *self._whole.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.config.learning_rate * rate)
            else:
                group["lr"] = self.config.learning_rate * rate
        self._hold.fill_(0.0 if ranks_move else 1.0)

    @torch.no_grad()
    def _lay_out(self) -> None:
        """Let the moments lie as the factors do, where they do not yet."""
        network, state = self.network, self.inner.state
        if not network.flat_buffers():
            self._whole = self.inner
            return
        trained = self._whole.param_groups[0]["params"]
        same = all(a is b for a, b in zip(trained, network.trained_tensors(), strict=False))
        if same and self._whole is not self.inner and all(state[p].get(k) is part for p, k, part in self._parts):
            return
        config = self.config
        self._whole, self._parts = self.inner, []  # frees the old layout, block by block
        whole = self._make(network.trained_tensors(), config.optimizer, config.learning_rate, config.weight_decay)
        for block in network.flat_buffers():
            parameters = [parameter for _, parameter in block.members]
            step = next((state[p]["step"] for p in parameters if "step" in state.get(p, {})), None)
            held: dict[str, Tensor] = {}
            if config.optimizer != "sgd":
                held["step"] = (
                    torch.zeros((), device=network.device if self.fused else "cpu") if step is None else step.clone()
                )
            for key in MOMENTS[config.optimizer]:
                held[key] = torch.zeros_like(block.master, requires_grad=False)
                for parameter, part in zip(parameters, block.member_rows(held[key]), strict=True):
                    old = state[parameter].get(key)
                    if old is not None:
                        part.copy_(old)
                    state[parameter][key] = part
                    self._parts.append((parameter, key, part))
            for parameter in parameters:
                if "step" in held:
                    state[parameter]["step"] = held["step"]
            whole.state[block.master] = held
        for parameter in network.trained_tensors()[len(network.flat_buffers()) :]:
            whole.state[parameter] = state[parameter]
        self._whole = whole

    @torch.no_grad()
    def take(self, loss: Tensor) -> Tensor:
        """`step` without setting anything: the same launches every time."""
        self.network.finish_gradients()
        self.norms = gradient_norms([p.grad for p in self.network.parameters() if p.grad is not None], loss)
        norm = torch.linalg.vector_norm(self.norms)
        taken = torch.isfinite(norm) & torch.isfinite(loss)
        skip = (~taken).to(torch.float32)
        excess = (norm / self.config.clip_norm).clamp(min=1.0) if self.config.clip_norm > 0 else torch.ones_like(norm)
        self._move(self._whole, [p.grad for p in self.network.trained_tensors() if p.grad is not None], excess, skip)
        self.partially_applied = True
        written = self.network.theta.grad
        if self.theta is not None and written is not None:
            self._move(self.theta, [written], torch.ones_like(norm), torch.maximum(skip, self._hold))
        self.network.clear_gradients()
        self.partially_applied = False
        return taken

    def _move(self, optimizer: torch.optim.Optimizer, gradients: list[Tensor], excess: Tensor, skip: Tensor) -> None:
        """A step with gradients divided by `excess`, or none where `skip` is 1."""
        if self.fused:
            optimizer.grad_scale, optimizer.found_inf = excess.float(), skip.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not bool(skip):
            self.partially_applied = True
            torch._foreach_div_(gradients, excess)
            optimizer.step()


def _remembered(kind: str) -> tuple[str, ...]:
    """All that an optimizer keeps for a parameter; nothing for a kind that is not known."""
    moments = MOMENTS.get(kind, ())
    return moments if kind == "sgd" or not moments else ("step", *moments)


def gradient_norms(gradients: list[Tensor], like: Tensor | None = None) -> Tensor:
    """‖g‖ of every tensor, (tensors,) on their device; where there are none, on that of `like`."""
    if not gradients:
        return torch.zeros(0) if like is None else like.new_zeros(0)
    return torch.stack(torch._foreach_norm(gradients))

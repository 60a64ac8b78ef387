"""The update of the factors and of θ: clipped gradients, skipped on the device if one is not finite.

Nothing here waits for a value on the device, so that an update can be recorded and replayed (cuda_graph.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from ..adapters.flat_buffers import FlatBuffer
from ..adapters.network import AdaptiveNetwork
from ..checkpoints.state import State, raise_corrupted
from ..config import TrainingConfig
from ..method import sensitivity
from ..util.errors import LoraError
from ..util.text import escaped

BETAS = (0.9, 0.99)
"""A run has hundreds of steps, not millions: with β₂ = 0.999, the start would weigh in all of it."""

FUSED = ("cuda", "cpu")
"""Devices whose fused optimizers skip a step, and scale gradients, by a tensor on the device."""

CAPTURABLE = ("cuda",)
"""Devices whose updates can be recorded: learning rates are then tensors, which a replay reads anew."""

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""Each optimizer's state of the same shape as a parameter."""


class Optimizer:
    """AdamW, Adam or SGD for the factors, and Adam with its own learning rate for θ.

    inner: holds the moments of every factor; resizing, saving and restoring use it. The update itself is made by a second
    optimizer over the flat buffers that the factors are views of (flat_buffers.py): a few large tensors instead of a thousand
    small ones. The moments of `inner` are views of its moments; `prepare` lays them out again after either has changed.
    norms: of the gradients last applied, in the order of the network's parameters.
    partially_applied: set while an update has changed some of the parameters: it must not be repeated.
    """

    def __init__(self, network: AdaptiveNetwork, config: TrainingConfig) -> None:
        self.network = network
        self.config = config
        self.fused = network.device.type in FUSED
        self._capturable = network.device.type in CAPTURABLE
        self.inner = self._make(network.parameters(), config.optimizer, config.learning_rate, config.weight_decay)
        self.flat = self.inner
        self._moment_views: list[tuple[Parameter, str, Tensor]] = []
        self.theta = None if network.pruned else self._make([network.theta], "adam", config.rank_learning_rate, 0.0)
        self._skip_theta = torch.zeros((), device=network.device)
        self.norms = torch.zeros(0, device=network.device)
        self.partially_applied = False

    def _make(self, parameters: list[Parameter], kind: str, rate: float, decay: float) -> torch.optim.Optimizer:
        lr = torch.tensor(rate, device=self.network.device) if self._capturable else rate
        if kind == "sgd":
            sgd = torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=self.fused)
            for parameter in parameters:  # if the first step is skipped, torch leaves them uninitialized
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        cls, decay = (torch.optim.Adam, 0.0) if kind == "adam" else (torch.optim.AdamW, decay)
        return cls(parameters, lr=lr, betas=BETAS, weight_decay=decay, fused=self.fused, capturable=self._capturable)

    # -- the update ----------------------------------------------------------------------------------------------------

    def step(self, rate: float, train_ranks: bool, loss: Tensor) -> Tensor:
        """`prepare`, then `apply`."""
        self.prepare(rate, train_ranks)
        return self.apply(loss)

    def prepare(self, rate: float, train_ranks: bool) -> None:
        """Set the next update's learning rate, `rate` times the configured one, and whether it changes θ."""
        self.partially_applied = False
        self._lay_out_moments()
        for group in (*self.inner.param_groups, *self.flat.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.config.learning_rate * rate)
            else:
                group["lr"] = self.config.learning_rate * rate
        self._skip_theta.fill_(0.0 if train_ranks else 1.0)

    @torch.no_grad()
    def apply(self, loss: Tensor) -> Tensor:
        """Apply the accumulated gradients and clear them; the same kernel launches every time.

        Returns () bool on the device: False, and nothing applied, if the gradients or the loss are not finite (a loss may
        overflow where its gradients do not).
        """
        self.network.finish_gradients()
        self.norms = gradient_norms([p.grad for p in self.network.parameters() if p.grad is not None], loss)
        norm = torch.linalg.vector_norm(self.norms)
        applied = torch.isfinite(norm) & torch.isfinite(loss)
        skip = (~applied).to(torch.float32)
        scale = (norm / self.config.clip_norm).clamp(min=1.0) if self.config.clip_norm > 0 else torch.ones_like(norm)
        self._update(self.flat, [p.grad for p in self.network.trained_tensors() if p.grad is not None], scale, skip)
        self.partially_applied = True
        theta_gradient = self.network.theta.grad
        if self.theta is not None and theta_gradient is not None:
            self._update(self.theta, [theta_gradient], torch.ones_like(norm), torch.maximum(skip, self._skip_theta))
        self.network.clear_gradients()
        self.partially_applied = False
        return applied

    def _update(self, optimizer: torch.optim.Optimizer, gradients: list[Tensor], scale: Tensor, skip: Tensor) -> None:
        """A step with the gradients divided by `scale`; none if `skip` is 1."""
        if self.fused:
            optimizer.grad_scale, optimizer.found_inf = scale.float(), skip.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not bool(skip):
            self.partially_applied = True
            torch._foreach_div_(gradients, scale)
            optimizer.step()

    # -- moments in flat buffers ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _lay_out_moments(self) -> None:
        """Make the flat optimizer's moments hold those of `inner`, unless they do."""
        network, config = self.network, self.config
        if not network.flat_buffers():
            self.flat = self.inner
            return
        if self._layout_is_current():
            return
        self.flat, self._moment_views = self.inner, []  # frees the old moments, buffer by buffer
        flat = self._make(network.trained_tensors(), config.optimizer, config.learning_rate, config.weight_decay)
        for buffer in network.flat_buffers():
            flat.state[buffer.master] = self._move_moments(buffer)
        for parameter in network.trained_tensors()[len(network.flat_buffers()) :]:
            flat.state[parameter] = self.inner.state[parameter]
        self.flat = flat

    def _layout_is_current(self) -> bool:
        """Whether the flat optimizer trains the network's buffers, and every moment of `inner` is a view of its moments."""
        trained, state = self.flat.param_groups[0]["params"], self.inner.state
        return (
            self.flat is not self.inner
            and all(a is b for a, b in zip(trained, self.network.trained_tensors(), strict=False))
            and all(state[parameter].get(name) is view for parameter, name, view in self._moment_views)
        )

    def _move_moments(self, buffer: FlatBuffer) -> dict[str, Tensor]:
        """New state for a buffer with its members' moments, which become views of it."""
        state, parameters = self.inner.state, [parameter for _, parameter in buffer.members]
        moved: dict[str, Tensor] = {}
        if self.config.optimizer != "sgd":
            steps = [state[p]["step"] for p in parameters if "step" in state.get(p, {})]
            device = self.network.device if self.fused else "cpu"
            moved["step"] = steps[0].clone() if steps else torch.zeros((), device=device)
        for name in MOMENTS[self.config.optimizer]:
            moved[name] = torch.zeros_like(buffer.master, requires_grad=False)
            for parameter, view in zip(parameters, buffer.member_rows(moved[name]), strict=True):
                moment = state[parameter].get(name)
                if moment is not None:
                    view.copy_(moment)
                state[parameter][name] = view
                self._moment_views.append((parameter, name, view))
        if "step" in moved:
            for parameter in parameters:
                state[parameter]["step"] = moved["step"]
        return moved

    def sensitivities(self) -> dict[str, float] | None:
        """Every layer's loss per unit of energy (method/sensitivity.py); None before the first step."""
        return sensitivity.sensitivities(
            (name, a.up, a.scaled_down(), self.inner.state.get(a.up, {}).get("exp_avg_sq"))
            for name, a in zip(self.network.names, self.network.adapters, strict=True)
        )

    # -- states --------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Moments and step counters by the parameter's index; none before the first step."""
        moments = {
            f"{key}.{name}": value
            for key, optimizer, parameter in self._parameters()
            for name, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return State(moments, {"kind": self.config.optimizer})

    def restore(self, state: State) -> None:
        """Load the moments and counters of an optimizer for a network of the same shapes. Raises LoraError if they do not fit."""
        names = _state_names(self.config.optimizer)
        if _state_names(str(state.facts.get("kind"))) != names:
            raise LoraError("The training state was made with another optimizer. Choose the one that it was made with.")
        if not state.tensors:
            return  # before the first step
        for key, optimizer, parameter in self._parameters():
            kind = names if optimizer is self.inner else _state_names("adam")
            optimizer.state[parameter] = {n: self._restored(state, f"{key}.{n}", n, parameter) for n in kind}

    def _restored(self, state: State, key: str, name: str, parameter: Parameter) -> Tensor:
        value = state.tensor(key, () if name == "step" else parameter.shape)
        if name not in ("momentum_buffer", "exp_avg") and bool((value < 0).any()):
            raise_corrupted(f"{escaped(key)} is negative")
        on_cpu = name == "step" and not (self.fused or self._capturable)
        return value.to("cpu" if on_cpu else parameter.device, copy=True)

    def _parameters(self) -> Iterator[tuple[str, torch.optim.Optimizer, Parameter]]:
        """Every parameter's key in a state, its optimizer, and itself."""
        for group, optimizer in (("factors", self.inner), ("theta", self.theta)):
            if optimizer is None:
                continue
            for index, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                yield f"{group}.{index}", optimizer, parameter


def _state_names(kind: str) -> tuple[str, ...]:
    """The names of an optimizer's state of a parameter; none for an unknown kind."""
    moments = MOMENTS.get(kind, ())
    return moments if kind == "sgd" or not moments else ("step", *moments)


def gradient_norms(gradients: list[Tensor], like: Tensor | None = None) -> Tensor:
    """‖g‖ of every tensor, (tensors,) on their device; without any, empty on the device of `like`."""
    if not gradients:
        return torch.zeros(0) if like is None else like.new_zeros(0)
    return torch.stack(torch._foreach_norm(gradients))

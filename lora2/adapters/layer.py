"""One adapted layer: the frozen layer's output plus B Λ A x, with factors whose capacity can change."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..method.factors import Factors, cost
from ..method.rotation import rotate
from ..util.errors import LoraError
from ..util.memory import on_device_or_cpu
from .functions import AddLowRank, LowRankLinear
from .recompute import Recipe, recipe_for, recompute_saved

GRANULE = 8
"""Capacities are multiples of this number: tensor cores need it, and fewer resizes follow."""

ZERO_TOLERANCE = 1e-7
"""Singular values below this fraction of the largest are float32 rounding errors."""

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def adaptable(module: nn.Module) -> bool:
    """Whether a layer can carry an adapter: linear, or a 1-, 2- or 3-dimensional convolution.

    Quantized linear layers need not be nn.Linear: any module with in_features, out_features and a weight is accepted.
    """
    linear = hasattr(module, "in_features") and hasattr(module, "out_features")
    return (linear or isinstance(module, tuple(_CONVOLUTIONS))) and getattr(module, "weight", None) is not None


def module_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's unpacked weight: (d_out, d_in) or (c_out, c_in / groups, *kernel)."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return tuple(module.weight.shape)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def round_up_capacity(rank: int) -> int:
    """The smallest capacity that holds a rank."""
    return max(GRANULE, math.ceil(rank / GRANULE) * GRANULE)


class WorkingCopies(NamedTuple):
    """One linear layer's factors in the model's compute type, and sums of their gradients (flat_buffers.py).

    down: ΛA, (rows, d_in); up: B, (rows, d_out); down_sums, up_sums: summed ∂L/∂(ΛA) and ∂L/∂B in the same shapes.
    rows is the capacity rounded up to a multiple of 8; the rows beyond the capacity are zero.
    """

    down: Tensor
    up: Tensor
    down_sums: Tensor
    up_sums: Tensor

    @property
    def gradient_sums(self) -> tuple[Tensor, Tensor]:
        """Sums for the down and the up factor."""
        return self.down_sums, self.up_sums


class Adapter:
    """The factors of one layer and the low-rank path B Λ A x.

    down: A, (capacity, d_in) for a linear layer, (capacity, c_in / groups, *kernel) for a convolution.
    up: Bᵀ, (capacity, d_out): one row per component like down, so that resizing cuts or appends rows of both.
    importance: Λ, (≥ capacity,), zero beyond the logical rank; None after pruning, which stands for ones. The network writes it
    and computes its gradient (network.py); autograd does not see it.
    working: copies in the model's compute type; None where the network keeps none.
    down_std: standard deviation of new rows of A.
    """

    def __init__(
        self, module: nn.Module, capacity: int, down_std: float, device: torch.device, generator: Generator
    ) -> None:
        if not adaptable(module):
            raise LoraError(f"A layer of type {type(module).__name__} cannot carry an adapter.")
        self.module = module
        self.shape = module_shape(module)
        self.down_std = down_std
        self.device = device
        self.down = nn.Parameter(self._new_rows(capacity, generator))
        self.up = nn.Parameter(torch.zeros(capacity, self.shape[0], device=device))
        self.importance: Tensor | None = None
        self.working: WorkingCopies | None = None
        self._path = (
            _convolution_path(module) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else _linear_path
        )

    @property
    def capacity(self) -> int:
        """The number of components that the arrays hold."""
        return int(self.down.shape[0])

    @property
    def is_convolution(self) -> bool:
        """Whether the layer is a convolution; otherwise it is linear."""
        return len(self.shape) > 2

    @property
    def cost(self) -> int:
        """Parameters per component."""
        return cost(self.shape)

    # -- forward -------------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        """B Λ A x in x's dtype and the shape of the layer's output; x: the layer's input."""
        down = _scaled_down(*self._scaled_down_parts(self.down), dtype=x.dtype)
        cast = None
        if x.dtype != self.down.dtype:
            cast = Recipe(partial(_scaled_down, dtype=x.dtype), self._scaled_down_parts(self.down.detach()))
        with recompute_saved((x, self.recipe(x)), (down, cast)):
            return self._path(x, down, self.up.to(x.dtype))

    def recipe(self, x: Tensor) -> Recipe | None:
        """How the backward pass can recompute the layer's input x; None where x has to be saved."""
        return recipe_for(x, self.shape[0])

    def scaled_down(self) -> Tensor:
        """Λ A, (capacity, …), detached."""
        return _scaled_down(*self._scaled_down_parts(self.down.detach()), dtype=self.down.dtype)

    def _scaled_down_parts(self, down: Tensor) -> tuple[Tensor, ...]:
        """A, and Λ where there is one."""
        return (down,) if self.importance is None else (down, self.importance[: self.capacity])

    def add(self, output: Tensor, x: Tensor) -> Tensor:
        """The layer's output plus B Λ A x, in as few kernel launches as the layer allows."""
        if not self.capacity:
            return output  # pruned to rank 0
        working = self.working
        if working is not None and not output.dtype == x.dtype == working.down.dtype:
            # The model runs this layer in another type. Its gradients must still reach the sums.
            dtype = working.down.dtype
            return output + self.add(torch.zeros_like(output, dtype=dtype), x.to(dtype)).to(output.dtype)
        if self.is_convolution or output.dtype != x.dtype:
            return output + self(x)
        importance = None if self.importance is None else self.importance[: self.capacity]
        if working is not None:
            down, up, sums = working.down, working.up, working.gradient_sums
        else:
            sums = None
            with torch.no_grad():
                down = _scaled_down(*self._scaled_down_parts(self.down), dtype=x.dtype)
                up = self.up.to(x.dtype)
        return AddLowRank.apply(output, x, self.down, self.up, down, up, importance, sums, self.recipe(x))

    def can_fuse(self, weight: object, x: Tensor) -> bool:
        """Whether `fused_linear` may replace a layer that computes x Wᵀ + bias and nothing else."""
        if not self.capacity or self.working is None:
            return False
        if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
            return False
        return self.working.down.dtype == x.dtype and weight.device == x.device and weight.is_floating_point()

    def fused_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with its path, x Wᵀ + bias + B Λ A x, in one operation, where `can_fuse` is true."""
        if self.working is None:
            raise ValueError("fused_linear needs working copies.")
        working = self.working
        return LowRankLinear.apply(
            x, weight, bias, self.up, working.down, working.up, working.gradient_sums, self.recipe(x)
        )

    # -- changes between steps -----------------------------------------------------------------------------------------

    def _new_rows(self, count: int, generator: Generator) -> Tensor:
        """Rows for A from N(0, σ²), drawn on the CPU so that the numbers do not depend on the device."""
        return (torch.randn(count, *self.shape[1:], generator=generator) * self.down_std).to(self.device)

    def resize(self, capacity: int, generator: Generator, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep the first components and hold `capacity` in all; optimizer moments follow.

        A new component has a random row in A and zeros in B, so the output does not change; its moments are zero. Call it only
        between an optimizer step and the next forward pass.
        """
        kept = min(capacity, self.capacity)
        added = capacity - kept
        down = torch.cat([self.down.data[:kept], self._new_rows(added, generator)])
        up = torch.cat([self.up.data[:kept], self.up.data.new_zeros(added, self.shape[0])])
        self._replace({"down": down, "up": up}, kept, optimizer)

    def reset_components(
        self, start: int, generator: Generator, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Reinitialize the components from index `start` on: random rows in A, zeros in B and in the moments."""
        if start >= self.capacity:
            return
        self.down.data[start:] = self._new_rows(self.capacity - start, generator)
        self.up.data[start:] = 0
        for parameter in (self.down, self.up):
            for moment in _moments(optimizer, parameter).values():
                moment[start:] = 0

    def restart_zero_components(self, generator: Generator) -> None:
        """Reinitialize components of singular value zero after pruning, as a plain LoRA starts.

        Both rows of such a component are zero, so its gradient would stay zero. It gets a random row in A (variance
        1 / (3 d_in)) and zeros in B. The output changes by rounding error only.
        """
        weight = self.down.data.flatten(1).norm(dim=1) * self.up.data.norm(dim=1)
        zero = weight <= ZERO_TOLERANCE * weight.amax() if self.capacity else weight > 0
        rows = torch.randn(self.down.shape, generator=generator) / math.sqrt(3 * math.prod(self.shape[1:]))
        self.down.data[zero] = rows.to(self.down)[zero]
        self.up.data[zero] = 0

    def rotate(self) -> None:
        """Rotate the components after pruning (rotation.py); the output stays.

        Restarted components are left out. Their rows of A are large, and a rotation would have to cancel them, which leaves
        rounding errors.
        """
        trained = int((self.up.data.norm(dim=1) > 0).sum())
        for parameter in (self.down, self.up):
            rows = parameter.data[:trained]
            rows.copy_(on_device_or_cpu(self.device, partial(rotate, rows)))

    def load(self, factors: Factors, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Replace A and B with these factors at exactly their rank; moments start at zero."""
        down, up = factors.down * factors.scale, factors.up.reshape(self.shape[0], -1).t()
        self._replace({"down": self._copied(down), "up": self._copied(up)}, 0, optimizer)

    def load_arrays(self, down: Tensor, up: Tensor, down_std: float) -> None:
        """Replace A and B with these arrays, (capacity, …) and (capacity, d_out). Requires a new optimizer."""
        self.down_std = down_std
        self._replace({"down": self._copied(down), "up": self._copied(up)}, 0, None)

    def _copied(self, rows: Tensor) -> Tensor:
        """A copy in row-major memory.

        A single row counts as contiguous in other layouts too, and BLAS rounds products of those differently.
        """
        return rows.to(self.down, copy=True, memory_format=torch.contiguous_format)

    def factors(self, rank: int, device: torch.device | None = None) -> Factors:
        """The first `rank` components with √Λ folded into both factors; float32 views or copies, detached.

        device: where to compute; the adapter's own by default.
        """
        device = device or self.device
        down, up = self.down.detach()[:rank].to(device), self.up.detach()[:rank].to(device)
        if self.importance is not None:
            root = self.importance[:rank].to(device).sqrt()
            down, up = down * root.view(-1, *(1,) * (down.ndim - 1)), up * root[:, None]
        tail = (1,) * (len(self.shape) - 2)
        return Factors(up=up.t().reshape(self.shape[0], rank, *tail), down=down, alpha=float(rank))

    def _replace(self, data: dict[str, Tensor], kept: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Replace the parameters, also in the optimizer, whose moments keep their first `kept` rows.

        Assigning to `.data` would fail while the graph of an earlier step is alive, because it remembers the old shape.
        All memory is allocated before anything is changed, so an out-of-memory error leaves the layer as it was.
        """
        moments = {}
        for name, values in data.items():
            for key, moment in _moments(optimizer, getattr(self, name)).items():
                moments[name, key] = torch.zeros_like(values)
                moments[name, key][:kept] = moment[:kept]
        for name, values in data.items():
            old, new = getattr(self, name), nn.Parameter(values)
            setattr(self, name, new)
            if optimizer is None:
                continue
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            state = optimizer.state.pop(old, None)
            if state is not None:
                optimizer.state[new] = state | {key: moment for (of, key), moment in moments.items() if of == name}


def _scaled_down(down: Tensor, importance: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """Λ A in a dtype."""
    return (down if importance is None else down * importance.view(-1, *(1,) * (down.ndim - 1))).to(dtype)


def _moments(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors of the parameter's shape."""
    if optimizer is None or parameter not in optimizer.state:
        return {}
    state = optimizer.state[parameter]
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}


def _linear_path(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(x, down) @ up


def _convolution_path(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The low-rank path of a convolution: the layer's own geometry with rank channels, then a 1×1 convolution.

    With groups, every group applies the same down kernels to its own channels. That is the meaning of reshaping up · down to
    the weight's shape.
    """
    convolve = next(f for kind, f in _CONVOLUTIONS.items() if isinstance(module, kind))
    stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
    mode, padding_per_side = module.padding_mode, module._reversed_padding_repeated_twice

    def path(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        pad: int | str | tuple[int, ...] = padding
        if mode != "zeros":
            x, pad = F.pad(x, padding_per_side, mode=mode), 0
        if groups > 1:
            down = down.repeat(groups, *(1,) * (down.ndim - 1))
        hidden = convolve(x, down, None, stride, pad, dilation, groups)
        pointwise = up.t().reshape(up.shape[1], up.shape[0], *(1,) * (down.ndim - 2))
        return convolve(hidden, pointwise, None, 1, 0, 1, groups)

    return path

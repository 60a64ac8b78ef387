"""One adapted layer: the frozen layer's output plus B Λ A x, with arrays that grow and shrink."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

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
"""Capacities are multiples of this: tensor cores like it, and resizing stays rare."""

HEADROOM = 1.3
"""A growing layer's arrays get this much more than it asks for, where nothing is known of how fast it grows."""

ZERO_TOLERANCE = 1e-7
"""Singular values below this share of the largest are float32's rounding."""

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def adaptable(module: nn.Module) -> bool:
    """Whether a layer of this kind can carry an adapter: linear, or a 1-, 2- or 3-dimensional convolution.

    Quantised linear layers need not be nn.Linear: any module with in_features, out_features and a weight counts.
    """
    linear = hasattr(module, "in_features") and hasattr(module, "out_features")
    return (linear or isinstance(module, tuple(_CONVOLUTIONS))) and getattr(module, "weight", None) is not None


def module_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weight that a layer stands for: (d_out, d_in) or (c_out, c_in / groups, *kernel)."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return tuple(module.weight.shape)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def round_up_capacity(rank: int) -> int:
    """The smallest capacity that holds a rank."""
    return max(GRANULE, math.ceil(rank / GRANULE) * GRANULE)


def next_capacity(capacity: int, rank: int, limit: int, soon: int | None = None) -> int:
    """The capacity to hold from now on: grows when the rank presses against it, shrinks with a granule of hysteresis.

    rank: what θ asks for now; limit: the most it may ever ask for; soon: what it is expected to ask for before the arrays can
    follow again, if that is known.
    """
    presses = max(rank, soon or 0) > capacity
    if soon is None:
        soon = math.ceil(HEADROOM * rank)
    ahead = max(round_up_capacity(rank) + GRANULE, round_up_capacity(soon))
    if presses:
        return max(capacity, min(ahead, round_up_capacity(limit)))
    return ahead if ahead <= capacity - GRANULE else capacity


class Adapter:
    """The factors of one layer and the low-rank path through them.

    down: (capacity, d_in) for a linear layer, (capacity, c_in / groups, *kernel) for a convolution.
    up: (capacity, d_out): position-major like down, so that resizing cuts or adds rows of both.
    importance: (≥ capacity,), Λ of each position, zero beyond the logical rank; written by the network, never trained
    through autograd (see network.py). None once the layer is settled: all ones.
    working: ΛA and B in the type that the model computes in, and the sums of their gradients, kept by the network
    (packed.py); None where it keeps none.
    """

    def __init__(
        self, module: nn.Module, capacity: int, std: float, device: torch.device, generator: Generator
    ) -> None:
        if not adaptable(module):
            raise LoraError(f"A layer of kind {type(module).__name__} cannot carry an adapter.")
        self.module = module
        self.shape = module_shape(module)
        self.std = std
        self.device = device
        self.down = nn.Parameter(self._new_rows(capacity, generator))
        self.up = nn.Parameter(torch.zeros(capacity, self.shape[0], device=device))
        self.importance: Tensor | None = None
        self.working: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._apply = _convolution_of(module) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else _linear

    @property
    def capacity(self) -> int:
        """How many positions the arrays hold."""
        return int(self.down.shape[0])

    @property
    def convolution(self) -> bool:
        """Whether the layer is one, rather than linear."""
        return len(self.shape) > 2

    @property
    def cost(self) -> int:
        """Parameters per position."""
        return cost(self.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """B Λ A x for the layer's input x, in x's dtype; the shape of the layer's output."""
        down = _folded(*self._parts(self.down), dtype=x.dtype)
        cast = None
        if x.dtype != self.down.dtype:
            cast = Recipe(partial(_folded, dtype=x.dtype), self._parts(self.down.detach()))
        with recompute_saved((x, self.recipe(x)), (down, cast)):
            return self._apply(x, down, self.up.to(x.dtype))

    def recipe(self, x: Tensor) -> Recipe | None:
        """How the layer's input x can be made again in the backward pass; None where it is kept."""
        return recipe_for(x, self.shape[0])

    def folded_down(self) -> Tensor:
        """Λ A, (capacity, …), detached."""
        return _folded(*self._parts(self.down.detach()), dtype=self.down.dtype)

    def _parts(self, down: Tensor) -> tuple[Tensor, ...]:
        """What ΛA is made of: A, and Λ where there is one."""
        return (down,) if self.importance is None else (down, self.importance[: self.capacity])

    def add(self, output: Tensor, x: Tensor) -> Tensor:
        """The layer's output plus B Λ A x, with as few launches as the layer's kind allows."""
        if not self.capacity:
            return output  # a cut has dropped the layer
        if self.working is not None and not output.dtype == x.dtype == self.working[0].dtype:
            # A layer that the model runs in another type: its gradients must still reach the sums.
            dtype = self.working[0].dtype
            return output + self.add(torch.zeros_like(output, dtype=dtype), x.to(dtype)).to(output.dtype)
        if self.convolution or output.dtype != x.dtype:
            return output + self(x)
        importance = None if self.importance is None else self.importance[: self.capacity]
        sums = None
        if self.working is not None:
            folded, cast, *sums = self.working
        else:
            with torch.no_grad():
                folded = _folded(*self._parts(self.down), dtype=x.dtype)
                cast = self.up.to(x.dtype)
        return AddLowRank.apply(output, x, self.down, self.up, folded, cast, importance, sums, self.recipe(x))

    def can_fuse(self, weight: object, x: Tensor) -> bool:
        """Whether `linear` can stand for the layer and its path, for a layer that is x Wᵀ + bias and no more."""
        if not self.capacity or self.working is None:
            return False
        if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
            return False
        return self.working[0].dtype == x.dtype and weight.device == x.device and weight.is_floating_point()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer and its path, x Wᵀ + bias + B Λ A x, in one operation, where `can_fuse` agrees."""
        if self.working is None:
            raise ValueError("There are no working copies to compute with.")
        folded, cast, *sums = self.working
        return LowRankLinear.apply(x, weight, bias, self.up, folded, cast, sums, self.recipe(x))

    def _new_rows(self, count: int, generator: Generator) -> Tensor:
        """Rows of a down factor that is about to grow: N(0, σ²), drawn on the CPU so that every device draws the same."""
        return (torch.randn(count, *self.shape[1:], generator=generator) * self.std).to(self.device)

    def resize(self, capacity: int, generator: Generator, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep the first positions and hold room for `capacity` of them.

        A new position has a random down row and a zero up row, so the output does not change; optimizer moments follow,
        those of new positions zero. Only between an optimizer step and the next forward.
        """
        keep = min(capacity, self.capacity)
        extra = capacity - keep
        down = torch.cat([self.down.data[:keep], self._new_rows(extra, generator)])
        up = torch.cat([self.up.data[:keep], self.up.data.new_zeros(extra, self.shape[0])])
        self._replace({"down": down, "up": up}, keep, optimizer)

    def reset_components(
        self, start: int, generator: Generator, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Drop what the positions from `start` on have learned: fresh down rows, zero up rows and moments."""
        if start >= self.capacity:
            return
        self.down.data[start:] = self._new_rows(self.capacity - start, generator)
        self.up.data[start:] = 0
        for parameter in (self.down, self.up):
            for moment in _moments(optimizer, parameter).values():
                moment[start:] = 0

    def restart_zero_components(self, generator: Generator) -> None:
        """Let positions without weight learn again, as a plain LoRA's new ones do, once settled.

        A position of singular value zero has two zero factors and so no gradient, for ever. It gets a random down row
        (variance 1 / (3 d_in)) and a zero up row; the output changes by the rounding that it held.
        """
        weight = self.down.data.flatten(1).norm(dim=1) * self.up.data.norm(dim=1)
        dead = weight <= ZERO_TOLERANCE * weight.amax() if self.capacity else weight > 0
        rows = torch.randn(self.down.shape, generator=generator) / math.sqrt(3 * math.prod(self.shape[1:]))
        self.down.data[dead] = rows.to(self.down)[dead]
        self.up.data[dead] = 0

    def rotate(self) -> None:
        """Train mixtures of the positions instead of the positions, once settled (mixing.py); the output stays.

        Not of the last ones, which have been revived: their rows are large, and mixtures would only cancel them to rounding.
        """
        live = int((self.up.data.norm(dim=1) > 0).sum())
        for parameter in (self.down, self.up):
            rows = parameter.data[:live]
            rows.copy_(on_device_or_cpu(self.device, partial(rotate, rows)))

    def load(self, factors: Factors, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take these factors as they are, at exactly their rank; moments start at zero."""
        down, up = factors.down * factors.scale, factors.up.reshape(self.shape[0], -1).t()
        self._replace({"down": self._own(down), "up": self._own(up)}, 0, optimizer)

    def load_arrays(self, down: Tensor, up: Tensor, std: float) -> None:
        """Take these arrays, (capacity, …) and (capacity, d_out), and the deviation of new rows. Start a new optimizer then."""
        self.std = std
        self._replace({"down": self._own(down), "up": self._own(up)}, 0, None)

    def _own(self, rows: Tensor) -> Tensor:
        """The same numbers in memory that is not the caller's, row by row.

        A single row counts as contiguous in other layouts too, and products of those are rounded in another way.
        """
        return rows.to(self.down, copy=True, memory_format=torch.contiguous_format)

    def factors(self, rank: int, device: torch.device | None = None) -> Factors:
        """The first `rank` positions with √Λ folded into both factors; float32 views or copies, detached.

        device: where to work that out; the adapter's own if not given.
        """
        device = device or self.device
        down, up = self.down.detach()[:rank].to(device), self.up.detach()[:rank].to(device)
        if self.importance is not None:
            root = self.importance[:rank].to(device).sqrt()
            down, up = down * root.view(-1, *(1,) * (down.ndim - 1)), up * root[:, None]
        tail = (1,) * (len(self.shape) - 2)
        return Factors(up=up.t().reshape(self.shape[0], rank, *tail), down=down, alpha=float(rank))

    def _replace(self, data: dict[str, Tensor], keep: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Put new Parameters in the places of these, and in the optimizer's, whose moments keep their first rows.

        A resized `.data` would do only while no graph of an earlier step is alive, since that one remembers the old shape.
        All memory is asked for before anything is changed: where it runs out, the layer is as it was.
        """
        moments = {}
        for name, values in data.items():
            for key, moment in _moments(optimizer, getattr(self, name)).items():
                moments[name, key] = torch.zeros_like(values)
                moments[name, key][:keep] = moment[:keep]
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


def _folded(down: Tensor, importance: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """Λ A in a type."""
    return (down if importance is None else down * importance.view(-1, *(1,) * (down.ndim - 1))).to(dtype)


def _moments(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors that have the parameter's shape."""
    if optimizer is None or parameter not in optimizer.state:
        return {}
    state = optimizer.state[parameter]
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}


def _linear(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(x, down) @ up


def _convolution_of(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The low-rank path of a convolution: the layer's own geometry at rank channels, then a 1×1 convolution.

    With groups every group sees the same down kernels on its own channels, which is what reshaping up · down to the
    weight's shape means.
    """
    convolve = next(f for kind, f in _CONVOLUTIONS.items() if isinstance(module, kind))
    stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
    mode, around = module.padding_mode, module._reversed_padding_repeated_twice

    def path(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        pad: int | str | tuple[int, ...] = padding
        if mode != "zeros":
            x, pad = F.pad(x, around, mode=mode), 0
        if groups > 1:
            down = down.repeat(groups, *(1,) * (down.ndim - 1))
        hidden = convolve(x, down, None, stride, pad, dilation, groups)
        mix = up.t().reshape(up.shape[1], up.shape[0], *(1,) * (down.ndim - 2))
        return convolve(hidden, mix, None, 1, 0, 1, groups)

    return path

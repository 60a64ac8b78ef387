"""All adapted layers of a model: their ranks as one vector θ, Λ computed from it, and the gradients of θ and the factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from ..config import TrainingConfig
from ..method import importance as imp
from ..method.allocation import next_multiplier, scaled_ranks
from ..method.factors import Factors, cost, float32
from ..method.init import init_scale, initial_ranks, rank_limit
from ..method.svd import decompose
from ..util.errors import LoraError
from ..util.memory import on_device_or_cpu
from .attach import attached, is_plain_linear
from .capacity import CapacityPolicy
from .flat_buffers import FlatBuffer, FlatBuffers
from .layer import Adapter, module_shape, round_up_capacity


@dataclass(frozen=True)
class PendingPrune:
    """A cut that has begun (prune.py). factors: the result for every layer; size_open: a smaller size may still be chosen."""

    factors: dict[str, Factors]
    size_open: bool


class AdaptiveNetwork:
    """Adapters on a model's layers, each with a learned rank.

    theta: (layers,) log of the continuous ranks, trained by the gradient from `write_theta_gradient`.
    While ranks adapt, Λ is one (layers, components) buffer, and each adapter holds its row. `refresh` recomputes it on the
    device before every step. A step copies nothing to the CPU; only `sync_capacities` does, every few dozen steps.
    After pruning (`pruned`), ranks are fixed, Λ is gone, and the adapters are a plain LoRA.

    compute: the model's compute type; the factors themselves are float32. is_plain: whether a layer computes x Wᵀ + bias and
    nothing else during training; `is_plain_linear` by default. Raises LoraError where there is no layer, and for a target or
    budget that the layers cannot have.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        config: TrainingConfig,
        device: torch.device | str = "cpu",
        compute: torch.dtype = torch.float32,
        is_plain: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        if not layers:
            raise LoraError("No layer to adapt. Choose other layers, or loosen the include and exclude patterns.")
        self.config = config
        self.names = list(layers)
        self.device = torch.device(device)
        self.compute = compute
        self._is_plain = is_plain or is_plain_linear
        self._flat: FlatBuffers | None = None
        self.generator = Generator().manual_seed(config.seed)
        shapes = [module_shape(module) for module in layers.values()]
        self.costs = [cost(shape) for shape in shapes]
        self.max_ranks = [rank_limit(shape, config) for shape in shapes]
        self.min_ranks = [min(config.min_adapting_rank, most) for most in self.max_ranks]
        self.budget = config.budget(self.costs, self.max_ranks)
        initial = initial_ranks(self.target_rank, self.max_ranks, config)
        scales = [init_scale(shape, rank, config) for shape, rank in zip(shapes, initial, strict=True)]
        self.adapters = [
            Adapter(module, round_up_capacity(rank), down_std, self.device, self.generator)
            for module, rank, (down_std, _) in zip(layers.values(), initial, scales, strict=True)
        ]
        self.gains = [gain for _, gain in scales]
        """The constant factor of each layer's Λ (importance.py, `gain`)."""
        self.theta = nn.Parameter(torch.tensor(initial, dtype=torch.float64).log().float().to(self.device))
        self.multiplier = torch.ones((), device=self.device)
        """The budget's Lagrange multiplier, used where the budget steers the ranks."""
        self.size_ratio = 1.0
        """Size over budget at the last sync."""
        self.capacity_policy = CapacityPolicy(config, initial)
        self.pruned = False
        self.pending_prune: PendingPrune | None = None
        self.built_capacities: list[int] = []
        """Capacities at the last `rebuild`."""
        self.rebuild()

    @property
    def capacities(self) -> list[int]:
        """The capacity of every layer."""
        return [a.capacity for a in self.adapters]

    # -- parameters and gradients --------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The factors of every layer, down before up, without θ."""
        return [p for a in self.adapters for p in (a.down, a.up)]

    def flat_buffers(self) -> list[FlatBuffer]:
        """The buffers that hold the factors of linear layers; none where the model computes in float32."""
        return [] if self._flat is None else self._flat.buffers

    def _separate_parameters(self) -> list[nn.Parameter]:
        """Factors outside the flat buffers."""
        return [p for i, a in enumerate(self.adapters) if i not in self._flat_layers for p in (a.down, a.up)]

    @property
    def _flat_layers(self) -> set[int]:
        """Indices of the layers whose factors lie in flat buffers."""
        return set() if self._flat is None else self._flat.layers

    def trained_tensors(self) -> list[nn.Parameter]:
        """The numbers of `parameters` in as few tensors as possible: flat buffers, then separate factors."""
        return [*(buffer.master for buffer in self.flat_buffers()), *self._separate_parameters()]

    def allocate_gradients(self) -> None:
        """Give separate factors a zero gradient where they have none; its address then stays the same from step to step.

        Factors in flat buffers receive their gradients in `finish_gradients`.
        """
        for parameter in self._separate_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clear_gradients(self) -> None:
        """After a step: zero the gradients of separate factors in place, remove all others."""
        for buffer in self.flat_buffers():
            buffer.clear_gradients()
        gradients = [p.grad for p in self._separate_parameters() if p.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)
        self.theta.grad = None

    def drop_gradients(self) -> None:
        """Remove all gradients, after an abandoned step."""
        for parameter in (*self.parameters(), self.theta):
            parameter.grad = None
        if self._flat is not None:
            self._flat.discard_gradients()

    # -- the device side of a step -----------------------------------------------------------------------------------

    def rebuild(self) -> None:
        """Allocate Λ's buffer and the flat buffers for the present capacities."""
        self._flat = None  # frees the old buffers first
        for adapter in self.adapters:
            adapter.working = None
        if not self.pruned:
            self._allocate_importance()
        for row, adapter in enumerate(self.adapters):
            adapter.importance = None if self.pruned else self._importance[row]
        # The largest allocation last: if memory runs out in it, the learned factors can still be read.
        if self.compute != torch.float32:
            self._flat = FlatBuffers(self.adapters, self.compute, self.device)
        self.refresh()
        self.built_capacities = self.capacities

    def _allocate_importance(self) -> None:
        """Λ's buffer and the constants that it is computed from."""
        self._max_theta = torch.tensor(self.max_ranks, dtype=torch.float32, device=self.device).log()
        self._min_theta = torch.tensor(self.min_ranks, dtype=torch.float32, device=self.device).log()
        self._gain = torch.tensor(self.gains, device=self.device)[:, None]
        self._components = torch.arange(max(self.capacities), device=self.device, dtype=torch.float32)
        self._capacities = torch.tensor(self.capacities, device=self.device, dtype=torch.float32)
        self._importance = torch.zeros(len(self.adapters), len(self._components), device=self.device)
        self._shares = torch.zeros_like(self._importance)
        self.peak = self._capacities.clone()
        """The largest logical rank of every layer since the last sync, (layers,)."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute gΛ from θ, zero beyond the logical rank, and the working copies; on the device, in place."""
        if not self.pruned:
            self._refresh_importance()
        if self._flat is not None:
            self._flat.refresh(None if self.pruned else self._importance)

    def _refresh_importance(self) -> None:
        self.theta.data.clamp_(self._min_theta, self._max_theta)
        nu = imp.rate(self.theta, self.config.q)[:, None]
        ranks = self.logical_ranks()
        torch.maximum(self.peak, ranks, out=self.peak)
        inside = self._components < ranks[:, None]
        torch.mul(self._gain * imp.importance(self._components, nu), inside, out=self._importance)

    def logical_ranks(self) -> Tensor:
        """D of every layer, (layers,) float on the device: what θ asks for, limited by the capacity."""
        return torch.minimum(imp.quantile_rank(self.theta.detach()), self._capacities)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """After the backward passes: complete the gradients of the factors and of θ."""
        if self.pruned:
            if self._flat is not None:
                self._flat.finish_gradients(None, None)
            return
        self._shares.zero_()
        if self._flat is not None:
            self._flat.finish_gradients(self._importance, self._shares)
        self.write_theta_gradient()

    @torch.no_grad()
    def write_theta_gradient(self) -> None:
        """θ.grad from the up factors' gradients and the rank regularizer.

        ΔW = Σ_j Λ_j b_j a_jᵀ, so Λ_j ∂L/∂Λ_j = b_j · ∂L/∂b_j, and ∂L/∂θ = Σ_{j<D} (b_j · ∂L/∂b_j) ∂lnΛ_j/∂θ, without another
        backward pass. The regularizer is λ_r Σ|ν − ν_target|, with ∂ν/∂θ = −ν.
        """
        flat = self._flat_layers
        for index, (row, adapter) in enumerate(zip(self._shares, self.adapters, strict=True)):
            if index not in flat and adapter.up.grad is not None:
                torch.sum(adapter.up * adapter.up.grad, dim=1, out=row[: adapter.capacity])
        nu = imp.rate(self.theta, self.config.q)
        slope = imp.log_importance_slope(self._components, nu[:, None])
        data = (self._shares * slope).sum(dim=1)
        self.theta.grad = data + self.config.rank_weight * self._rank_cost_gradient(nu)

    def _rank_cost_gradient(self, nu: Tensor) -> Tensor:
        """∂/∂θ of Σ|ν − ν_target|, or of μ Σ ρ / ρ_target where a budget steers the ranks.

        A budget limits Σ ρ and is not a rank that every layer should have. Its Lagrange term reduces all ranks in proportion, and
        only as much as the budget needs.
        """
        if self.steered_by_budget:
            return self.multiplier * torch.exp(self.theta) / self.target_rank
        return -nu * torch.sign(nu - self.target_nu)

    @property
    def steered_by_budget(self) -> bool:
        """Whether a budget steers the ranks: in the paper's form. Otherwise the last cut meets the budget."""
        return bool(self.config.budget_mb) and self.config.settle_at >= 1

    @property
    def target_nu(self) -> float:
        """ν_target, whose rank is `target_rank`."""
        return imp.mass_constant(self.config.q) / self.target_rank

    @property
    def target_rank(self) -> float:
        """The mean rank that the budget allows."""
        return self.budget / sum(self.costs)

    # -- the CPU side, once in a while ---------------------------------------------------------------------------------

    def ranks(self) -> dict[str, int]:
        """Every layer's rank now; one copy from the device."""
        if self.pruned:
            return dict(zip(self.names, self.capacities, strict=True))
        self.refresh()  # θ may have taken a step since, even beyond its limits
        return {name: int(d) for name, d in zip(self.names, self.logical_ranks().tolist(), strict=True)}

    def size(self) -> int:
        """Parameters of all layers at their ranks."""
        return sum(rank * c for rank, c in zip(self.ranks().values(), self.costs, strict=True))

    def nu_by_layer(self) -> dict[str, float | None]:
        """ν of every layer; None after pruning."""
        if self.pruned:
            return dict.fromkeys(self.names)
        self.refresh()
        return dict(zip(self.names, imp.rate(self.theta.detach(), self.config.q).tolist(), strict=True))

    def nonfinite_layers(self) -> list[str]:
        """Layers whose factors hold NaN or infinity."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.parameters()])).view(-1, 2)
        finite = torch.isfinite(norms).all(1).tolist()
        return [name for name, good in zip(self.names, finite, strict=True) if not good]

    @torch.no_grad()
    def export_factors(self, ordered: bool | None = None) -> dict[str, Factors]:
        """Every layer as plain factors at its rank, float32 on the CPU.

        ordered: whether components are sorted by singular value (the default after pruning); otherwise they stay in the order of
        Λ, as in the paper.
        """
        if self.pending_prune is not None:
            return dict(self.pending_prune.factors)  # layers that the cut has not reached hold more
        ordered = self.pruned if ordered is None else ordered
        found = {}
        for adapter, (name, rank) in zip(self.adapters, self.ranks().items(), strict=True):
            export = partial(_export, adapter, min(rank, adapter.capacity), ordered)
            # A full device must not prevent the learned factors from being saved.
            found[name] = on_device_or_cpu(self.device, export)
        return found

    # -- capacities follow the ranks -----------------------------------------------------------------------------------

    @torch.no_grad()
    def sync_capacities(self, optimizer: torch.optim.Optimizer | None = None, exact: bool = False) -> bool:
        """Let the arrays follow the ranks; True if any array was resized.

        Components that fell out of the rank since the last sync are reset for good. Arrays are resized a few times per run
        (capacity.py); until then, a rank that exceeds its array is limited by it. If memory runs out, nothing learned is lost,
        and a second call continues.
        exact: hold every rank that θ asks for, even where resizing does not pay.
        """
        if self.pruned:
            return False
        self.refresh()
        theta, ranks, peak = torch.stack([self.theta, imp.quantile_rank(self.theta), self.peak]).tolist()  # one copy
        wanted = [int(rank) for rank in ranks]
        self._reset_dropped_components(wanted, peak, optimizer)
        capacities = self.capacity_policy.next_capacities(
            self.capacities, wanted, [math.exp(t) for t in theta], self.max_ranks, self.costs, exact
        )
        resized = self._resize(capacities, optimizer)
        if self.steered_by_budget:
            self._update_multiplier()
        if resized:
            self.rebuild()
        return resized

    def _reset_dropped_components(
        self, ranks: Sequence[int], peak: Sequence[float], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Reset the components between each layer's rank and its peak rank since the last sync."""
        for adapter, rank, highest in zip(self.adapters, ranks, peak, strict=True):
            if highest > rank:
                adapter.reset_components(rank, self.generator, optimizer)
        self.peak.copy_(self.logical_ranks())

    def _resize(self, capacities: Sequence[int], optimizer: torch.optim.Optimizer | None) -> bool:
        """Resize arrays to these capacities; whether any changed, now or in an earlier call that ran out of memory."""
        changed = capacities != self.capacities or self.built_capacities != self.capacities
        for adapter, capacity in zip(self.adapters, capacities, strict=True):
            if capacity != adapter.capacity:
                adapter.resize(capacity, self.generator, optimizer)
        return changed

    def _update_multiplier(self) -> None:
        ratio = self.size() / self.budget
        self.multiplier.fill_(next_multiplier(float(self.multiplier), ratio, self.size_ratio))
        self.size_ratio = ratio

    @torch.no_grad()
    def freeze_ranks(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Adapt arrays to the ranks exactly, once ranks stop moving; True if any array was resized.

        A budget that has steered the ranks is met now: steering is inexact, and layers may want less than the budget, so all
        ranks are scaled by one factor. The remaining steps train the added components and compensate for the removed ones.
        """
        if self.pruned:
            return False
        if self.steered_by_budget:
            rho = self.theta.exp().tolist()
            self._set_ranks(scaled_ranks(rho, self.costs, self.min_ranks, self.max_ranks, self.budget))
        return self.sync_capacities(optimizer, exact=True)

    def _set_ranks(self, ranks: Sequence[int]) -> None:
        """Set θ to these ranks. Components that stay keep their output: the change of Λ is divided out of A."""
        self.refresh()
        before = self._importance.clone()
        self.theta.copy_(torch.tensor(ranks, dtype=torch.float64).log())
        after = self._gain * imp.importance(self._components, imp.rate(self.theta, self.config.q)[:, None])
        change = torch.where(before > 0, before / after, torch.ones_like(before))
        for adapter, row in zip(self.adapters, change, strict=True):
            adapter.down.mul_(row[: adapter.capacity].view(-1, *(1,) * (adapter.down.ndim - 1)))

    # -- restoring and attaching ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_arrays(
        self, theta: Tensor, arrays: Sequence[tuple[Tensor, Tensor]], scales: Sequence[tuple[float, float]]
    ) -> None:
        """Replace θ, (layers,), every layer's arrays (down, up), and its `init_scale` (down_std, gain)."""
        self.theta.data.copy_(theta)
        self.gains = [gain for _, gain in scales]
        for adapter, (down, up), (down_std, _) in zip(self.adapters, arrays, scales, strict=True):
            adapter.load_arrays(down, up, down_std)
        self.rebuild()

    def attached(self) -> AbstractContextManager[None]:
        """While inside, every adapted layer returns its output plus its low-rank path. On exit the model is as it was."""
        return attached(self.adapters, self._is_plain)


def _export(adapter: Adapter, rank: int, ordered: bool, device: torch.device) -> Factors:
    """A layer's factors on the CPU, computed on this device."""
    factors = adapter.factors(rank, device)
    if ordered:
        factors = float32(decompose(factors)[0])
    return Factors(factors.up.cpu(), factors.down.cpu(), factors.alpha)

"""All adapted layers of a model: their ranks as one vector θ, and everything that is decided over all layers together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Generator, Tensor, nn

from ..config import TrainingConfig
from ..method import importance as imp
from ..method.allocation import cut_to_budget, next_multiplier, scaled_ranks
from ..method.factors import Factors, cost, float32
from ..method.init import init_scale, initial_ranks, rank_limit
from ..method.svd import decompose
from ..util.errors import LoraError
from ..util.memory import on_device_or_cpu
from .attach import attached, is_plain_linear
from .capacity import CapacityPolicy
from .flat_buffers import FlatBuffer, FlatBuffers
from .layer import Adapter, module_shape, round_up_capacity
from .prune import PruneCandidates

Choose = Callable[[Callable[[int], None], int, int], int]
"""Given what makes a network hold a size in parameters, the smallest and the largest one, says which is enough."""


class AdaptiveNetwork:
    """Adapters on a model's layers, every one with a rank that is learned.

    theta: (layers,) log of the continuous rank, trained by the gradient that `write_theta_gradient` computes.
    While ranks adapt, Λ lives in one (layers, positions) buffer that `refresh` recomputes on the device before a step;
    every adapter sees its row. Nothing in a step copies to the CPU; `sync` does, once in a while.
    compute: the type that the model computes in; the factors themselves are float32. plain: which layers are x Wᵀ + bias and
    no more while the model is trained; by default those of torch itself (`is_plain_linear`).
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        config: TrainingConfig,
        device: torch.device | str = "cpu",
        compute: torch.dtype = torch.float32,
        plain: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        if not layers:
            raise LoraError("No layer to adapt. Choose other layers, or loosen the include and exclude patterns.")
        self.config = config
        self.names = list(layers)
        self.device = torch.device(device)
        self.compute = compute
        self._plain = plain or is_plain_linear
        self._packed: FlatBuffers | None = None
        self.generator = Generator().manual_seed(config.seed)
        shapes = [module_shape(module) for module in layers.values()]
        self._limits = [rank_limit(shape, config) for shape in shapes]
        self._floors = [min(config.min_adapting_rank, limit) for limit in self._limits]
        costs = [cost(shape) for shape in shapes]
        self.budget = config.budget(costs, self._limits)
        initial = initial_ranks(self.budget / sum(costs), self._limits, config)
        starts = [init_scale(shape, rank, config) for shape, rank in zip(shapes, initial, strict=True)]
        self.adapters = [
            Adapter(module, round_up_capacity(rank), deviation, self.device, self.generator)
            for module, rank, (deviation, _) in zip(layers.values(), initial, starts, strict=True)
        ]
        self.gains = [gain for _, gain in starts]
        """Every layer's constant in front of its Λ (importance.py, `gain`)."""
        self.pruned = False
        self.theta = nn.Parameter(torch.tensor(initial, dtype=torch.float64).log().float().to(self.device))
        self.multiplier = torch.ones((), device=self.device)
        """A budget's multiplier, raised and lowered while the paper's form trains."""
        self.last_ratio = 1.0
        self.capacity_policy = CapacityPolicy(config, initial)
        self._laid_out: list[int] = []
        self._settling: dict[str, Factors] | None = None
        self._choice_due = False
        self._rebuild()

    # -- parameters and gradients --------------------------------------------------------------------------------------

    @property
    def limits(self) -> list[int]:
        """The largest rank that each layer may have."""
        return self._limits

    def parameters(self) -> list[nn.Parameter]:
        """The factors of every layer, down before up; without θ."""
        return [p for a in self.adapters for p in (a.down, a.up)]

    def blocks(self) -> list[FlatBuffer]:
        """Where factors lie together (packed.py): whoever changes them all may do so by block."""
        return [] if self._packed is None else self._packed.blocks

    def trained(self) -> list[nn.Parameter]:
        """The same numbers as `parameters`, in as few tensors as they lie in."""
        packed = set() if self._packed is None else self._packed.indices
        loose = [p for i, a in enumerate(self.adapters) if i not in packed for p in (a.down, a.up)]
        return [*(b.master for b in self.blocks()), *loose]

    def allocate_gradients(self) -> None:
        """Give factors a gradient to add to, zero where they have none: its place stays the same from step to step.

        Those whose gradients are summed elsewhere (packed.py) get theirs when the step is taken.
        """
        for index, adapter in enumerate(self.adapters):
            if self._packed is None or index not in self._packed.indices:
                for parameter in (adapter.down, adapter.up):
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)

    def clear_gradients(self) -> None:
        """Start new gradients: zero where they add up in place, none where they are finished from sums."""
        kept = []
        for block in self.blocks():
            block.master.grad = None
        for index, adapter in enumerate(self.adapters):
            for parameter in (adapter.down, adapter.up):
                if self._packed is not None and index in self._packed.indices:
                    parameter.grad = None
                elif parameter.grad is not None:
                    kept.append(parameter.grad)
        if kept:
            torch._foreach_zero_(kept)
        self.theta.grad = None

    def drop_gradients(self) -> None:
        """Drop all gradients, as after a step that was given up."""
        for parameter in (*self.parameters(), self.theta):
            parameter.grad = None
        if self._packed is not None:
            self._packed.forget()

    # -- the device side of a step -----------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        """Lay Λ's buffer and the working copies out anew after capacities changed."""
        self._packed = None  # frees the old copies before there are new ones
        for adapter in self.adapters:
            adapter.working = None
        if not self.pruned:
            self._lay_out_importance()
        for row, adapter in enumerate(self.adapters):
            adapter.importance = None if self.pruned else self._importance[row]
        # The largest last: where memory runs out in it, what was learned can still be read.
        if self.compute != torch.float32:
            self._packed = FlatBuffers(self.adapters, self.compute, self.device)
        self.refresh()
        self._laid_out = [a.capacity for a in self.adapters]

    def _lay_out_importance(self) -> None:
        self._limit_theta = torch.tensor(self._limits, dtype=torch.float32, device=self.device).log()
        self._floor_theta = torch.tensor(self._floors, dtype=torch.float32, device=self.device).log()
        self._gain = torch.tensor(self.gains, device=self.device)[:, None]
        width = max(a.capacity for a in self.adapters)
        self._positions = torch.arange(width, device=self.device, dtype=torch.float32)
        self._capacities = torch.tensor([a.capacity for a in self.adapters], device=self.device, dtype=torch.float32)
        self._importance = torch.zeros(len(self.adapters), width, device=self.device)
        self._shares = torch.zeros_like(self._importance)
        self.peak = self._capacities.clone()

    @torch.no_grad()
    def refresh(self) -> None:
        """G Λ from θ, zero beyond the logical rank, and the working copies. On the device, in place."""
        if not self.pruned:
            self._refresh_importance()
        if self._packed is not None:
            self._packed.refresh(None if self.pruned else self._importance)

    def _refresh_importance(self) -> None:
        self.theta.data.clamp_(self._floor_theta, self._limit_theta)
        nu = imp.rate(self.theta, self.config.q)[:, None]
        ranks = self.logical_ranks()
        torch.maximum(self.peak, ranks, out=self.peak)
        inside = self._positions < ranks[:, None]
        torch.mul(self._gain * imp.importance(self._positions, nu), inside, out=self._importance)

    def logical_ranks(self) -> Tensor:
        """D of every layer, (layers,) float on the device: what θ asks for, as far as the arrays reach."""
        return torch.minimum(imp.quantile_rank(self.theta.detach()), self._capacities)

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """After the backward passes: the factors' and θ's gradients are complete."""
        if self.pruned:
            if self._packed is not None:
                self._packed.finish_gradients(None, None)
            return
        self._shares.zero_()
        if self._packed is not None:
            self._packed.finish_gradients(self._importance, self._shares)
        self.write_theta_gradient()

    @torch.no_grad()
    def write_theta_gradient(self) -> None:
        """θ.grad from the up factors' gradients and the rank regulariser.

        ΔW = Σ_j Λ_j b_j a_jᵀ, so Λ_j ∂L/∂Λ_j = b_j · ∂L/∂b_j, and ∂L/∂θ = Σ_{j<D} (b_j · ∂L/∂b_j) ∂lnΛ_j/∂θ: no pass of its own.
        The regulariser is λ_r Σ|ν − ν_target|, with ∂ν/∂θ = −ν.
        """
        packed = set() if self._packed is None else self._packed.indices
        for index, (row, adapter) in enumerate(zip(self._shares, self.adapters, strict=True)):
            if index not in packed and adapter.up.grad is not None:
                torch.sum(adapter.up * adapter.up.grad, dim=1, out=row[: adapter.capacity])
        nu = imp.rate(self.theta, self.config.q)
        slope = imp.log_importance_slope(self._positions, nu[:, None])
        data = (self._shares * slope).sum(dim=1)
        self.theta.grad = data + self.config.rank_weight * self._pull(nu)

    def _pull(self, nu: Tensor) -> Tensor:
        """The gradient in θ of what ranks cost, before its weight: of Σ|ν − ν_target|, or of a multiplier times the size.

        A budget is a limit on Σ ρ, not a rank that every layer should have: its Lagrange term μ Σ ρ / ρ_target pulls all
        ranks down in proportion, and only as hard as the budget needs.
        """
        if self._steered:
            return self.multiplier * torch.exp(self.theta) / self.target_rank
        return -nu * torch.sign(nu - self.target_rate)

    @property
    def _steered(self) -> bool:
        """Whether a budget steers the ranks: in the paper's own form. Where they settle, the cut meets it."""
        return bool(self.config.budget_mb) and self.config.settle_at >= 1

    @property
    def target_rate(self) -> float:
        """ν_target: the rate whose rank is the target's, or the budget's mean rank."""
        return imp.mass_constant(self.config.q) / self.target_rank

    @property
    def target_rank(self) -> float:
        """The mean rank that the budget allows."""
        return self.budget / sum(a.cost for a in self.adapters)

    # -- the CPU side, once in a while ---------------------------------------------------------------------------------

    def ranks(self) -> dict[str, int]:
        """Every layer's rank now; one copy from the device."""
        if self.pruned:
            return {name: a.capacity for name, a in zip(self.names, self.adapters, strict=True)}
        self.refresh()  # θ may have taken a step since, beyond the limits too
        return {name: int(d) for name, d in zip(self.names, self.logical_ranks().tolist(), strict=True)}

    def size(self) -> int:
        """Parameters up to every layer's rank."""
        ranks = self.ranks()
        return sum(ranks[name] * a.cost for name, a in zip(self.names, self.adapters, strict=True))

    @torch.no_grad()
    def rest(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Ranks come to rest: arrays follow them exactly, and where a budget steered them, they now meet it.

        Steering is never exact, and layers may want less than the budget: so all ranks are scaled together, and the steps
        that are left train what that adds and mend what it takes. True when any array was resized.
        """
        if self.pruned:
            return False
        if self._steered:
            costs = [a.cost for a in self.adapters]
            ranks = scaled_ranks(self.theta.exp().tolist(), costs, self._floors, self._limits, self.budget)
            self._set_ranks(ranks)
        return self.sync(optimizer, exactly=True)

    def _set_ranks(self, ranks: Sequence[int]) -> None:
        """Put θ where it asks for these ranks; positions that stay give what they gave, though their Λ changes."""
        self.refresh()
        before = self._importance.clone()
        self.theta.copy_(torch.tensor(ranks, dtype=torch.float64).log())
        after = self._gain * imp.importance(self._positions, imp.rate(self.theta, self.config.q)[:, None])
        change = torch.where(before > 0, before / after, torch.ones_like(before))
        for adapter, row in zip(self.adapters, change, strict=True):
            adapter.down.mul_(row[: adapter.capacity].view(-1, *(1,) * (adapter.down.ndim - 1)))

    @torch.no_grad()
    def sync(self, optimizer: torch.optim.Optimizer | None = None, exactly: bool = False) -> bool:
        """Let the arrays follow the ranks, from one copy of θ; True when any array was resized.

        exactly: hold every rank that θ asks for, also where resizing would not pay.
        Positions that fell out of the rank since the last sync are dropped for good: if the rank returns, they start anew.
        Arrays are resized a few times in a run (resizes.py); a rank that outgrows its arrays before that waits
        there. Where memory runs out in it, nothing learned is lost, and a second call goes on.
        """
        if self.pruned:
            return False
        self.refresh()
        theta, ranks, peak = torch.stack([self.theta, imp.quantile_rank(self.theta), self.peak]).tolist()
        wanted = [int(rank) for rank in ranks]
        for adapter, rank, reached in zip(self.adapters, wanted, peak, strict=True):
            if reached > rank:
                adapter.reset_components(rank, self.generator, optimizer)
        self.peak.copy_(self.logical_ranks())
        held, costs = [a.capacity for a in self.adapters], [a.cost for a in self.adapters]
        capacities = self.capacity_policy.sync(held, wanted, [math.exp(t) for t in theta], self._limits, costs, exactly)
        changed, unfinished = capacities != held, self._laid_out != held
        for adapter, capacity in zip(self.adapters, capacities, strict=True):
            if capacity != adapter.capacity:
                adapter.resize(capacity, self.generator, optimizer)
        if self._steered:
            ratio = self.size() / self.budget
            self.multiplier.fill_(next_multiplier(float(self.multiplier), ratio, self.last_ratio))
            self.last_ratio = ratio
        if changed or unfinished:
            self._rebuild()
        return changed or unfinished

    @torch.no_grad()
    def prune(
        self, budget: int | None = None, weights: Mapping[str, float] | None = None, choose: Choose | None = None
    ) -> None:
        """Fold Λ, cut all layers together in their singular order to a budget of parameters, go on as a plain LoRA.

        What is trained from then on are mixtures of the positions that were kept (mixing.py).

        budget: the run's own if not given; where all fits, the output changes by rounding only. weights: what a unit of each
        layer's energy is worth (sensitivity.py). choose: what finds a size below the budget that is enough. Start a new optimizer
        afterwards: the old moments belong to other directions. Where memory runs out in it, nothing learned is lost, and a second
        call goes on. May be called again with less.
        """
        if self._settling is None:
            self._settling = self._fit(self.export(ordered=False), self.budget if budget is None else budget, weights)
            self._choice_due = choose is not None
        self.pruned = True
        if choose is not None and self._choice_due:
            self._settling = self._chosen(self._settling, weights, choose)
            self._choice_due = False
        for name, adapter in zip(self.names, self.adapters, strict=True):
            adapter.load(self._settling[name])
            adapter.restart_zero_components(self.generator)
            adapter.rotate()
        self._rebuild()
        self._settling = None

    def _chosen(
        self, factors: Mapping[str, Factors], weights: Mapping[str, float] | None, choose: Choose
    ) -> dict[str, Factors]:
        """What is chosen of factors in singular order; the layers are left with one of the sizes that were shown."""
        adapters = dict(zip(self.names, self.adapters, strict=True))
        for name, adapter in adapters.items():
            adapter.load(factors[name])
        self._rebuild()
        sizes = PruneCandidates(adapters, factors, weights, self.config)

        def show(size: int) -> None:
            sizes.show(size)
            self.refresh()

        return sizes.cut(choose(show, sizes.smallest, sizes.largest))

    @torch.no_grad()
    def export(self, ordered: bool | None = None) -> dict[str, Factors]:
        """Every layer as plain factors on the CPU, at its rank, float32.

        ordered: singular order (the default once settled); otherwise positions stay in the order of Λ, as in the paper.
        """
        if self._settling is not None:
            return dict(self._settling)  # layers that were not reached yet hold more than that
        ranks = self.ranks()
        out = {}
        for name, adapter in zip(self.names, self.adapters, strict=True):
            plain = partial(
                _plain, adapter, min(ranks[name], adapter.capacity), self.pruned if ordered is None else ordered
            )
            # A device that is full up to the last byte must not keep what was learned from being saved.
            out[name] = on_device_or_cpu(self.device, plain)
        return out

    def nonfinite_layers(self) -> list[str]:
        """Layers whose factors are not finite."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.parameters()])).view(-1, 2)
        return [name for name, good in zip(self.names, torch.isfinite(norms).all(1).tolist(), strict=True) if not good]

    @torch.no_grad()
    def final_factors(self, weights: Mapping[str, float] | None = None) -> tuple[dict[str, Factors], bool]:
        """The layers as a file should hold them, and whether they are in singular order.

        The paper's form keeps the order of Λ, unless a size budget still has to be met. A run that was stopped before its
        last cut is cut to the target, by `weights` as in `prune`: its file has the size that was asked for, or the most it may.
        """
        factors = self.export()
        gone = sum(not f.rank for f in factors.values())
        room = self.budget + gone * self.config.removed_layer_parameters
        if self.pruned and sum(f.parameters for f in factors.values()) <= room:
            return factors, True
        if not self.pruned and self.config.settle_at >= 1 and not self.config.budget_mb:
            return factors, False
        return self._fit(factors, self.budget, weights), True

    def _fit(
        self, factors: Mapping[str, Factors], budget: int, weights: Mapping[str, float] | None
    ) -> dict[str, Factors]:
        config = self.config
        return cut_to_budget(factors, budget, config.min_rank, weights, self.device, config.removed_layer_parameters)

    def rates(self) -> dict[str, float | None]:
        """ν of every layer; None once settled."""
        if self.pruned:
            return dict.fromkeys(self.names)
        self.refresh()
        return dict(zip(self.names, imp.rate(self.theta.detach(), self.config.q).tolist(), strict=True))

    # -- going on ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_arrays(
        self, theta: Tensor, arrays: Sequence[tuple[Tensor, Tensor]], starts: Sequence[tuple[float, float]]
    ) -> None:
        """Take these log ranks, (layers,), these arrays of every layer, down before up, as they are, and its `init_scale`."""
        self.theta.data.copy_(theta)
        self.gains = [gain for _, gain in starts]
        for adapter, (down, up), (std, _) in zip(self.adapters, arrays, starts, strict=True):
            adapter.load_arrays(down, up, std)
        self._rebuild()

    # -- attaching -----------------------------------------------------------------------------------------------------

    def attached(self) -> AbstractContextManager[None]:
        """While inside, the adapted layers answer with their adapters' paths added; nothing is left behind after."""
        return attached(self.adapters, self._plain)


def _plain(adapter: Adapter, rank: int, ordered: bool, device: torch.device) -> Factors:
    """A layer's factors on the CPU, worked out on this device."""
    factors = adapter.factors(rank, device)
    if ordered:
        factors = float32(decompose(factors)[0])
    return Factors(factors.up.cpu(), factors.down.cpu(), factors.alpha)

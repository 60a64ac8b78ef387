"""All adapted layers together: ranks on the device, θ's gradient, capacities, pruning, budgets, export."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from small_networks import C, Model, config, frozen, network_of, pictures, randomize, relative, set_ranks
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from lora2.adapters.network import AdaptiveNetwork
from lora2.adapters.prune import final_factors, prune
from lora2.config import TrainingConfig
from lora2.method.allocation import cut_to_budget, next_multiplier, scaled_ranks
from lora2.method.factors import Factors
from lora2.training.optimizer import Optimizer
from lora2.util.errors import LoraError


def importance_of(rho: float) -> Tensor:
    """Λ of one layer in float64, from its definition."""
    nu = C / rho
    count = math.ceil(rho - 1e-9)
    return torch.tensor([math.exp(-nu * j) * (1 - math.exp(-nu)) for j in range(count)], dtype=torch.float64)


def gain_of(network: AdaptiveNetwork) -> float:
    """The gain g, with g² = D / Σ f² at the initial rank D."""
    start = importance_of(network.config.initial_rank)
    return math.sqrt(network.config.initial_rank / math.fsum(start.square().tolist()))


def deltas(network: AdaptiveNetwork, *rhos: float) -> dict[str, Tensor]:
    """ΔW = B diag(gΛ) A of every layer in float64."""
    gain, out = gain_of(network), {}
    for name, adapter, rho in zip(network.names, network.adapters, rhos, strict=True):
        values = gain * importance_of(rho)
        down, up = (p.detach().double()[: len(values)] for p in (adapter.down, adapter.up))
        out[name] = torch.einsum("jo,j,ji->oi", up, values, down.flatten(1)).reshape(adapter.shape)
    return out


def patched(model: Model, change: dict[str, Tensor], x: Tensor) -> Tensor:
    """The model's output in float64 with these changes added to its weights."""
    model = model.double()
    names = {"a": "first.weight", "b": "second.weight", "c": "third.weight"}
    weights = dict(model.named_parameters())
    changed = {names[n]: weights[names[n]] + d for n, d in change.items()}
    out = functional_call(model, changed, (x.double(),))
    model.float()
    return out


def answer(network: AdaptiveNetwork, model: Model, x: Tensor) -> Tensor:
    with network.attached(), torch.no_grad():
        return model(x)


# -- ranks on the device -------------------------------------------------------------------------------------


def test_a_rank_acts_at_once() -> None:
    """After θ moves, the next forward pass has the new rank's Λ, and components beyond the rank contribute nothing."""
    model = Model()
    network, x = randomize(network_of(model, initial_rank=16)), pictures(3, 5, 24)
    for rhos in ([16, 16, 16], [3.2, 15.9, 1], [1.5, 8, 7.01]):
        set_ranks(network, *rhos)
        network.refresh()
        assert network.logical_ranks().tolist() == [math.ceil(rho) for rho in rhos]
        assert list(network.ranks().values()) == [math.ceil(rho) for rho in rhos]
        # float32 against float64: three layers, sums of some hundred products.
        assert relative(answer(network, model, x), patched(model, deltas(network, *rhos), x)) < 1e-6
        for adapter, rho in zip(network.adapters, rhos, strict=True):
            assert adapter.importance is not None
            assert int((adapter.importance > 0).sum()) == math.ceil(rho)


def test_a_rank_is_limited_by_its_capacity_until_the_next_sync() -> None:
    network = network_of(Model(), initial_rank=12)
    set_ranks(network, 18, 19, 20)
    assert list(network.ranks().values()) == [16, 16, 16]
    assert network.sync_capacities()
    assert list(network.ranks().values()) == [18, 19, 20]


def test_ranks_stay_between_min_rank_and_max_rank_for_any_theta() -> None:
    """Even before a refresh, so that a file never has a rank above max_rank."""
    network = randomize(network_of(Model(), min_rank=2, max_rank=13, initial_rank=12))
    for theta in (10.0, 1.0, -10.0, 3.0):
        network.theta.data.fill_(theta)
        wanted = min(13, max(2, math.ceil(math.exp(theta))))
        assert list(network.ranks().values()) == [wanted] * 3
        network.theta.data.fill_(theta)
        assert {f.rank for f in network.export_factors().values()} == {wanted}
        network.theta.data.fill_(theta)
        network.sync_capacities()
        assert max(a.capacity for a in network.adapters) <= 16
        assert bool(network.theta.isfinite().all())


def test_no_layer_has_more_rank_than_its_weight() -> None:
    layers = {"small": nn.Linear(3, 50), "conv": nn.Conv2d(2, 40, 1), "large": nn.Linear(40, 40)}
    network = AdaptiveNetwork(layers, config(initial_rank=16))
    assert network.ranks() == {"small": 3, "conv": 2, "large": 16}
    network.theta.data.fill_(99.0)
    for _ in range(3):
        network.sync_capacities()
    assert network.ranks() == {"small": 3, "conv": 2, "large": 40}


class Listener(TorchDispatchMode):
    """Records every operation, and the devices of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[Any, ...]]] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        self.devices.update(t.device.type for t in made)
        self.operations.append((str(func), tuple(tuple(t.shape) for t in made)))
        return out


def device_step(network: AdaptiveNetwork, model: Model, x: Tensor) -> None:
    """A step without the optimizer's arithmetic."""
    network.refresh()
    with network.attached():
        loss = (model(x) - 1).square().mean()
    loss.backward()
    network.write_theta_gradient()


READING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal.default", "unique")


def test_a_step_copies_nothing_to_the_cpu() -> None:
    """The meta device holds no data: a copy to the CPU, .item() or a branch on a value fails there."""
    model = Model("meta")
    network = network_of(model, "meta")
    for forbidden in (lambda t: t.item(), lambda t: bool(t.sum() > 0), lambda t: t.cpu().tolist()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            forbidden(network.theta)
    with Listener() as listener:
        device_step(network, model, torch.empty(3, 5, 24, device="meta"))
    assert listener.devices == {"meta"}, "no tensor of the step is on another device"
    assert network.theta.grad is not None
    assert all(p.grad is not None for p in network.parameters())
    assert not [name for name, _ in listener.operations if any(word in name for word in READING)]


def test_a_step_launches_the_same_operations_for_all_values() -> None:
    """The same operations on the same shapes for any ranks and data, including NaN, as a CUDA graph requires."""
    model = Model()
    network = randomize(network_of(model, initial_rank=16))
    seen = []
    for rhos, x in (
        ([16, 16, 16], pictures(3, 5, 24)),
        ([1000, 1e-9, 4], torch.zeros(3, 5, 24)),
        ([3, 3, 3], torch.full((3, 5, 24), math.nan)),
    ):
        set_ranks(network, *rhos)
        network.drop_gradients()
        with Listener() as listener:
            device_step(network, model, x)
        seen.append(listener.operations)
        assert not [name for name, _ in listener.operations if any(word in name for word in READING)]
    assert len(seen[0]) > 50
    assert all(operations == seen[0] for operations in seen)


def test_a_step_keeps_the_addresses_of_theta_and_importance() -> None:
    """A captured step reads and writes fixed addresses; θ at another address would never be updated."""
    model = Model()
    network = network_of(model)
    buffers = (network.theta, *(a.importance for a in network.adapters), *network.parameters())
    addresses = [b.data_ptr() for b in buffers if b is not None]
    for _ in range(3):
        device_step(network, model, pictures(2, 5, 24))
    after = (network.theta, *(a.importance for a in network.adapters), *network.parameters())
    assert [b.data_ptr() for b in after if b is not None] == addresses


# -- the gradient of θ ---------------------------------------------------------------------------------------


def in_float64(network: AdaptiveNetwork) -> AdaptiveNetwork:
    """The same network in double precision, for finite differences."""
    for adapter in network.adapters:
        adapter.down = nn.Parameter(adapter.down.data.double())
        adapter.up = nn.Parameter(adapter.up.data.double())
    network.theta.data = network.theta.data.double()
    network._components = network._components.double()
    network._importance = network._importance.double()
    for row, adapter in zip(network._importance, network.adapters, strict=True):
        adapter.importance = row
    return network


def whole_loss(network: AdaptiveNetwork, model: Model, x: Tensor, target: float, weight: float) -> Tensor:
    """The loss on data through the adapters, plus λ Σ|ν − ν_target|."""
    network.refresh()
    with network.attached():
        data = (model(x) - 1).square().mean()
    nu = C * torch.exp(-network.theta.detach())
    return data + weight * (nu - C / target).abs().sum()


@pytest.mark.parametrize(
    ("rhos", "weight"), [([5.4, 9.7, 2.5], 0.0), ([11.6, 1.3, 15.2], 0.05), ([1.2, 1.7, 1.4], 0.05)]
)
def test_theta_gradient_by_finite_differences(rhos: list[float], weight: float) -> None:
    """A loss through a chain of adapters, at ranks away from whole numbers, where the loss is discontinuous."""
    model = Model().double()
    network = in_float64(randomize(network_of(model, initial_rank=16, rank_weight=weight)))
    x = pictures(3, 5, 24).double()
    set_ranks(network, *rhos)
    whole_loss(network, model, x, 2, weight).backward()
    network.write_theta_gradient()
    assert network.theta.grad is not None
    got, step = network.theta.grad.clone(), 1e-4
    for index in range(3):
        sides = []
        for sign in (1, -1):
            set_ranks(network, *rhos)
            network.theta.data[index] += sign * step
            sides.append(float(whole_loss(network, model, x, 2, weight).detach()))
        expected = (sides[0] - sides[1]) / (2 * step)
        # Truncation step² = 1e-8 in proportion; rounding 1e-16 · loss / step.
        assert float(got[index]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_theta_gradient_by_autograd_of_the_dense_form() -> None:
    """Float32 as in training, against autograd through B diag(Λ(θ)) A in float64, over two batches."""
    model = Model()
    rhos, weight = [5.4, 9.7, 2.5], 0.02
    network = randomize(network_of(model, initial_rank=16, rank_weight=weight, target_rank=4))
    set_ranks(network, *rhos)
    network.refresh()
    batches = [pictures(3, 5, 24, seed=s) for s in (1, 2)]
    for x in batches:
        with network.attached():
            ((model(x) - 1).square().mean() / 2).backward()
    network.write_theta_gradient()

    theta = torch.tensor(rhos, dtype=torch.float64).log().requires_grad_()
    change = {}
    for index, (name, adapter) in enumerate(zip(network.names, network.adapters, strict=True)):
        nu = C * torch.exp(-theta[index])
        count = math.ceil(rhos[index])
        values = gain_of(network) * torch.exp(-nu * torch.arange(count)) * (1 - torch.exp(-nu))
        down, up = (p.detach().double()[:count] for p in (adapter.down, adapter.up))
        change[name] = torch.einsum("jo,j,ji->oi", up, values, down.flatten(1)).reshape(adapter.shape)
    loss = torch.stack([(patched(model, change, x) - 1).square().mean() for x in batches]).mean()
    loss = loss + weight * (C * torch.exp(-theta) - C / 4).abs().sum()
    (expected,) = torch.autograd.grad(loss, theta)
    assert network.theta.grad is not None
    # float32 sums of signed terms: 1e-5 leaves two digits for cancellation.
    assert torch.allclose(network.theta.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_layer_without_gradients_follows_only_the_regularizer() -> None:
    """At B = 0, and for a layer that the loss does not depend on, the data contributes nothing to θ's gradient."""
    model = Model()
    network = network_of(model, initial_rank=12, target_rank=3, rank_weight=0.5)
    with network.attached():
        model.second(model.first(pictures(2, 24))).square().mean().backward()
    network.write_theta_gradient()
    assert network.theta.grad is not None
    assert network.adapters[2].up.grad is None
    # Above the target, ν is too small: a step down the gradient makes θ smaller. d|ν − ν_t| / dθ = +ν there.
    assert torch.allclose(network.theta.grad, torch.full((3,), 0.5 * C / 12), rtol=1e-5)


# -- working copies in another dtype --------------------------------------------------------------------------


def reference_gradients(
    network: AdaptiveNetwork, model: Model, batches: list[Tensor], rhos: list[float], weight: float
) -> tuple[Tensor, list[Tensor]]:
    """The loss's gradients with respect to θ and every factor, by autograd of the dense form in float64."""
    theta = torch.tensor(rhos, dtype=torch.float64).log().requires_grad_()
    factors = [p.detach().double().requires_grad_() for p in network.parameters()]
    change = {}
    for index, (name, adapter) in enumerate(zip(network.names, network.adapters, strict=True)):
        nu = C * torch.exp(-theta[index])
        j = torch.arange(adapter.capacity)
        values = gain_of(network) * torch.exp(-nu * j) * (1 - torch.exp(-nu)) * (j < math.ceil(rhos[index]))
        down, up = factors[2 * index], factors[2 * index + 1]
        change[name] = torch.einsum("jo,j,ji->oi", up, values, down.flatten(1)).reshape(adapter.shape)
    loss = torch.stack([(patched(model, change, x) - 1).square().mean() for x in batches]).mean()
    loss = loss + weight * (C * torch.exp(-theta) - C / network.target_rank).abs().sum()
    of_theta, *of_factors = torch.autograd.grad(loss, [theta, *factors])
    return of_theta, of_factors


# float64 checks the arithmetic, up to the float32 of Λ and of the finished gradients. bf16 keeps 8 bits of every number through
# three layers.
@pytest.mark.parametrize(("compute", "near"), [(torch.float64, 2e-6), (torch.bfloat16, 0.03), (torch.float32, 2e-6)])
def test_gradients_in_every_compute_type(compute: torch.dtype, near: float) -> None:
    """Gradients of factors and θ over two batches. The second step starts from zero."""
    model, rhos, weight = Model(), [5.4, 9.7, 2.5], 0.02
    network = AdaptiveNetwork(
        model.layers(), config(initial_rank=16, rank_weight=weight, target_rank=4), compute=compute
    )
    randomize(network)
    set_ranks(network, *rhos)
    batches = [pictures(3, 5, 24, seed=s) for s in (1, 2)]
    theta, factors = reference_gradients(network, model, batches, rhos, weight)
    model.to(compute)
    for _ in range(2):
        network.refresh()
        network.allocate_gradients()
        for x in batches:
            with network.attached():
                out = model(x.to(compute)).to(torch.promote_types(compute, torch.float32))
            ((out - 1).square().mean() / 2).backward()
        network.finish_gradients()
        assert network.theta.grad is not None
        assert relative(network.theta.grad, theta) < 2 * near
        for parameter, expected in zip(network.parameters(), factors, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert relative(parameter.grad, expected) < near
        network.clear_gradients()


@pytest.mark.parametrize("pruned", [False, True])
def test_working_copies_follow_ranks_resizing_and_pruning(pruned: bool) -> None:
    """Every refresh updates the copies, for any capacity; a rank after pruning need not be a multiple of 8."""
    model, x = Model(), pictures(3, 5, 24)
    network = randomize(AdaptiveNetwork(model.layers(), config(initial_rank=16, target_rank=5), compute=torch.float64))
    for rhos in ([16, 7.2, 3], [20, 20, 20], [2.5, 17, 1]):
        set_ranks(network, *rhos)
        network.sync_capacities()
        randomize(network)
        if pruned:
            change = {n: f.delta().double() for n, f in cut_to_budget(network.export_factors(), network.budget).items()}
            prune(network)
        else:
            change = deltas(network, *rhos)
        network.refresh()
        expected = patched(model, change, x)
        got = answer(network, model.double(), x.double())
        model.float()
        assert relative(got, expected) < 1e-6
        if pruned:
            break


# -- capacities ----------------------------------------------------------------------------------------------


def test_a_sync_resizes_in_multiples_of_eight_and_does_not_change_the_output() -> None:
    model = Model()
    network, x = randomize(network_of(model, initial_rank=20, max_rank=20)), pictures(3, 5, 24)
    assert [a.capacity for a in network.adapters] == [24, 24, 24]
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        rhos = (torch.rand(3, generator=generator, dtype=torch.float64) * 19 + 0.9).tolist()
        set_ranks(network, *rhos)
        network.refresh()
        inside = [min(math.ceil(rho), a.capacity) for rho, a in zip(rhos, network.adapters, strict=True)]
        before = answer(network, model, x)
        network.sync_capacities()
        for adapter, rho, rank in zip(network.adapters, rhos, inside, strict=True):
            assert adapter.capacity % 8 == 0
            assert adapter.capacity >= math.ceil(rho)
            assert len(adapter.up) == len(adapter.down) == adapter.capacity
            assert not adapter.up[rank:].any(), "components beyond the rank are reset"
        # Removed rows had Λ = 0 and new ones have B = 0: only the order of summation may differ.
        assert relative(answer(network, model, x), before) < 1e-6


def test_components_in_use_only_between_two_syncs_are_reset_too() -> None:
    """A rank rises and falls between two syncs; components within the rank stay bit-identical."""
    network = network_of(Model(), initial_rank=16)
    network.sync_capacities()
    for ranks in ([6, 6, 6], [14, 11, 6], [6, 6, 6]):
        set_ranks(network, *map(float, ranks))
        network.refresh()
        if ranks[0] == 6:
            network.sync_capacities()
        else:
            for adapter, rank in zip(network.adapters, ranks, strict=True):
                adapter.up.data[:rank] = 1.0
        held = [a.down.detach()[:6].clone() for a in network.adapters]
    for adapter, down in zip(network.adapters, held, strict=True):
        assert bool((adapter.up[:6] == 1).all())
        assert not adapter.up[6:].any()
        assert torch.equal(adapter.down[:6], down)


def test_a_single_layer_among_many_gets_about_the_rank_that_it_asks_for() -> None:
    """Its parameters are less than the share that pays for a resize, and it may still be the one layer that matters."""
    layers = {str(i): nn.Linear(48, 48) for i in range(100)}
    network = AdaptiveNetwork(layers, config(initial_rank=16, target_rank=8))
    resized = 0
    for wanted in range(16, 49):
        network.theta.data[7] = math.log(wanted)
        resized += network.sync_capacities()
        assert wanted / 1.3 <= network.ranks()["7"] <= wanted
    assert 1 <= resized <= 4, "without a resize for every component"


def test_capacities_have_hysteresis() -> None:
    """A rank that swings by a few does not resize; one that falls far does."""
    network = network_of(Model(), initial_rank=20)
    network.sync_capacities()
    for rank in (20, 22, 18, 23, 16, 20, 15, 22):
        set_ranks(network, *[float(rank)] * 3)
        assert not network.sync_capacities()
    set_ranks(network, 3.0, 20.0, 20.0)
    assert network.sync_capacities()
    assert [a.capacity for a in network.adapters] == [16, 24, 24]
    assert not network.sync_capacities()


def test_ranks_and_optimizer_follow_through_a_whole_run() -> None:
    """Ranks rise and fall, arrays follow, and the optimizer always holds exactly the current arrays."""
    model = Model()
    network = network_of(model, initial_rank=8, learning_rate=1e-2)
    optimizer = Optimizer(network, network.config)
    generator = torch.Generator().manual_seed(0)
    changed = 0
    for step in range(16):
        set_ranks(network, *(1 + 18 * torch.rand(3, generator=generator)).tolist())
        changed += network.sync_capacities(optimizer.inner)
        device_step(network, model, pictures(4, 5, 24, seed=step))
        before = [a.up.detach().clone() for a in network.adapters]
        assert optimizer.step(1.0, False, torch.ones(()))
        held = [p for group in optimizer.inner.param_groups for p in group["params"]]
        assert len(held) == 6
        assert all(p is q for p, q in zip(held, network.parameters(), strict=True))
        assert set(optimizer.inner.state) <= set(held)
        assert not any(torch.equal(a.up, b) for a, b in zip(network.adapters, before, strict=True))
        assert not any(p.grad.any() for p in held), "gradients are cleared"
    assert changed >= 3


def live_bytes() -> int:
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if not t.is_meta]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_memory_falls_when_ranks_fall() -> None:
    """256 components of 600 numbers in two layers fall to 16: factors and two moments of 4 bytes per number, and the gradients."""
    layers = {"a": frozen(nn.Linear(300, 300)), "b": frozen(nn.Linear(300, 300))}
    network = AdaptiveNetwork(layers, config(initial_rank=256))
    optimizer = Optimizer(network, network.config)
    torch.stack([(a.down.sum() + a.up.sum()) for a in network.adapters]).sum().backward()
    optimizer.step(1.0, False, torch.ones(()))
    before = live_bytes()
    set_ranks(network, 3, 5)
    network.sync_capacities(optimizer.inner)
    buffers = 4 * 5 * 240  # Λ and its gradient for two layers, and the component indices
    # The other reallocations are θ's limits, a few bytes.
    gradients = 4 * 2 * 256 * 600
    assert before - live_bytes() == pytest.approx(3 * 4 * 2 * (256 - 16) * 600 + gradients + buffers, abs=64)


# -- pruning -------------------------------------------------------------------------------------------------


def test_pruning_to_the_current_size_changes_the_output_by_rounding_only() -> None:
    model = Model()
    network, x, rhos = randomize(network_of(model, initial_rank=16)), pictures(3, 5, 24), [7.3, 16, 2.2]
    set_ranks(network, *rhos)
    network.refresh()
    before, change = answer(network, model, x), deltas(network, *rhos)
    prune(network, network.size())
    assert network.pruned
    assert network.ranks() == {"a": 8, "b": 16, "c": 3}
    # Factors are rounded to float32 once, after a float64 SVD.
    assert relative(answer(network, model, x), before) < 1e-6
    for name, factors in network.export_factors().items():
        assert relative(factors.delta(), change[name]) < 5e-7
    for adapter in network.adapters:
        assert adapter.importance is None
        lengths = adapter.down.detach().flatten(1).norm(dim=1)
        assert float(lengths.max() / lengths.min()) < 5, "training continues on rotated components"
    for factors in network.export_factors().values():
        up = factors.up.double().flatten(1).T
        weights = up.norm(dim=1) * factors.down.flatten(1).double().norm(dim=1)
        assert bool((weights.diff() < 1e-6).all()), "exported components are sorted by singular value"
        gram = up @ up.T
        assert float((gram - gram.diag().diag()).abs().max()) < 1e-5 * float(gram.max()), "orthogonal"


def test_pruning_meets_the_budget_with_the_best_approximation_of_every_layer() -> None:
    """Eckart and Young: the error at rank r is √Σ_{i>r} σ², with σ of the dense ΔW from another routine."""
    for budget_rank in (2, 5, 8):
        model = Model()
        network, rhos = randomize(network_of(model, initial_rank=16, target_rank=budget_rank)), [15.3, 16, 12]
        set_ranks(network, *rhos)
        change = deltas(network, *rhos)
        prune(network)
        costs = {"a": 24 + 32, "b": 32 + 20, "c": 20 * 3 + 28}
        assert network.budget == budget_rank * sum(costs.values())
        ranks = network.ranks()
        assert sum(ranks[n] * costs[n] for n in costs) == network.size()
        growable = [costs[n] for n, rho in zip(costs, rhos, strict=True) if ranks[n] < math.ceil(rho)]
        assert 0 <= network.budget - network.size() < min(growable)
        for name, factors in network.export_factors().items():
            sigma = torch.linalg.svdvals(change[name].flatten(1))
            error = (factors.delta().double() - change[name]).norm()
            best = sigma[ranks[name] :].square().sum().sqrt()
            assert factors.rank == ranks[name] >= 1
            assert float(error) == pytest.approx(float(best), rel=1e-5)


def test_all_layers_are_cut_by_one_measure() -> None:
    """With equal costs, every component that stays has more energy than every component that is removed, over all layers."""
    layers = {name: frozen(nn.Linear(24, 24)) for name in "abcd"}
    network = randomize(AdaptiveNetwork(layers, config(initial_rank=16, target_rank=4)))
    for strength, adapter in zip((3.0, 1.0, 0.5, 1e-4), network.adapters, strict=True):
        adapter.up.data *= strength
    change = deltas(network, 16, 16, 16, 16)
    prune(network)
    ranks = network.ranks()
    sigmas = {name: torch.linalg.svdvals(delta) for name, delta in change.items()}
    assert sum(ranks.values()) == 4 * 4
    assert ranks["a"] > ranks["b"] > ranks["c"] > ranks["d"] == 0, "the weakest layer is removed"
    kept = min(float(sigmas[n][ranks[n] - 1]) for n in "abc")
    assert kept >= max(float(sigmas[n][ranks[n]]) for n in "abcd")


def test_pruning_keeps_min_rank_in_every_layer() -> None:
    layers = {name: frozen(nn.Linear(24, 24)) for name in "abc"}
    network = randomize(AdaptiveNetwork(layers, config(initial_rank=16, target_rank=6, min_rank=3)))
    network.adapters[1].up.data *= 1e-6
    prune(network)
    assert network.ranks()["b"] == 3
    assert network.size() == network.budget


@pytest.mark.parametrize("cut", [True, False])
def test_pruning_before_training_gives_a_plain_lora_that_learns(cut: bool) -> None:
    """ΔW = 0 (settle_at = 0, or a layer without gradients) must not stay zero forever."""
    model = Model()
    network = network_of(model, target_rank=4, initial_rank=16)
    if not cut:
        network.adapters[0].up.data.normal_(generator=torch.Generator().manual_seed(0))
    x = pictures(3, 5, 24)
    before = answer(network, model, x)
    prune(network, None if cut else network.size())
    assert relative(answer(network, model, x), before) < 1e-6
    assert set(network.ranks().values()) == {4 if cut else 16}
    for adapter in network.adapters[0 if cut else 1 :]:
        assert not adapter.up.any()
        # A plain LoRA's initialization; the smallest layer's hundred numbers determine it to 7 %.
        d_in = math.prod(adapter.shape[1:])
        assert float(adapter.down.detach().std()) == pytest.approx(math.sqrt(1 / (3 * d_in)), rel=0.2)
    device_step_pruned(network, model, x)
    for adapter in network.adapters:
        assert adapter.up.grad is not None
        assert bool(adapter.up.grad.any(1).all()), "every component can learn"


def device_step_pruned(network: AdaptiveNetwork, model: Model, x: Tensor) -> None:
    network.refresh()
    with network.attached():
        (model(x) - 1).square().mean().backward()


def test_a_pruned_network_trains_as_a_plain_lora() -> None:
    """No θ, no Λ, no resizing; ranks stay, and there is no ν."""
    model = Model()
    network = randomize(network_of(model, target_rank=3, initial_rank=16))
    prune(network)
    ranks, optimizer = network.ranks(), Optimizer(network, config(learning_rate=1e-2))
    assert optimizer.theta is None
    assert network.nu_by_layer() == dict.fromkeys("abc")
    x, losses = pictures(8, 5, 24), []
    for _ in range(20):
        with network.attached():
            loss = (model(x) - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step(1.0, True, loss.detach())
        assert not network.sync_capacities(optimizer.inner)
    assert losses[-1] < 0.8 * losses[0]
    assert network.ranks() == ranks
    factors, ordered = final_factors(network)
    assert ordered
    change = {name: layer.delta().double() for name, layer in factors.items()}
    assert relative(answer(network, model, x), patched(model, change, x)) < 1e-6


# -- budgets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget_rank", "initial"), [(6, 24), (10, 5)])
def test_a_budget_steers_the_papers_form(budget_rank: int, initial: int) -> None:
    """settle_at = 1: from four times the budget and from half of it, the size approaches the budget during training.

    The saved factors never exceed it.
    """
    width, teachers = 32, {"a": 1, "b": 2, "c": 4, "d": 8, "e": 16}
    generator = torch.Generator().manual_seed(0)
    layers = {name: frozen(nn.Linear(width, width, bias=False)) for name in teachers}
    goals = {}
    for name, rank in teachers.items():
        up = torch.randn(width, rank, generator=generator)
        goals[name] = up @ torch.randn(rank, width, generator=generator) / math.sqrt(width * rank)
    budget = budget_rank * len(layers) * 2 * width
    steered = TrainingConfig(
        steps=700,
        budget_mb=2 * budget / 1e6,
        bytes_per_parameter=2,
        initial_rank=initial,
        settle_at=1,
        learning_rate=3e-3,
        rank_learning_rate=2e-2,
        rank_weight=1e-3,
        clip_norm=0,
        weight_decay=0.0,
    )
    network = AdaptiveNetwork(layers, steered)
    assert network.budget == budget
    optimizer = Optimizer(network, steered)
    start = network.size()
    for step in range(steered.steps):
        x = torch.randn(32, width, generator=generator)
        network.refresh()
        with network.attached():
            errors = [(m(x) - x @ (m.weight + goals[n]).T).square().mean() for n, m in layers.items()]
        torch.stack(errors).sum().backward()
        optimizer.step(1.0, step >= 15, torch.ones(()))
        if step % 10 == 9:
            network.sync_capacities(optimizer.inner)
    assert abs(start / budget - 1) > 0.4
    assert network.size() / budget == pytest.approx(1, abs=0.25)
    a, b, c, d, _ = network.ranks().values()
    assert a <= b + 1 <= c + 1 <= d + 1, "a harder task gets more of the budget; rank 16 does not fit it"
    assert a < d
    factors, _ = final_factors(network)
    assert sum(f.parameters for f in factors.values()) <= budget


def test_the_multiplier_rises_above_the_budget_and_falls_below_it() -> None:
    assert next_multiplier(1.0, 1.3, 1.3) > 1 > next_multiplier(1.0, 0.7, 0.7)
    assert next_multiplier(2.0, 1.0, 1.0) == 2.0
    assert next_multiplier(1.0, 1.3, 1.6) < next_multiplier(1.0, 1.3, 1.3), "the size is already falling"
    pressure = 1.0
    for _ in range(100):
        pressure = next_multiplier(pressure, 50, 50)
    assert pressure == 1e6
    for _ in range(100):
        pressure = next_multiplier(pressure, 0.01, 0.01)
    assert pressure == 1e-6


def test_scaled_ranks_meet_a_budget_in_proportion() -> None:
    """Between floors and limits, never above the budget, and no layer could have one more component."""
    rho, costs, floors, limits = [2.3, 4.1, 7.9, 40.0, 3.3], [24, 40, 24, 32, 8], [1] * 5, [16, 16, 16, 30, 16]
    least, most = sum(costs), sum(c * high for c, high in zip(costs, limits, strict=True))
    last: list[int] = [0] * 5
    for budget in [*range(least, most, 13), most]:
        ranks = scaled_ranks(rho, costs, floors, limits, budget)
        size = sum(r * c for r, c in zip(ranks, costs, strict=True))
        assert size <= budget
        assert all(low <= r <= high for low, r, high in zip(floors, ranks, limits, strict=True))
        assert all(size + c > budget for r, c, high in zip(ranks, costs, limits, strict=True) if r < high)
        last = ranks
    assert last == limits
    assert scaled_ranks(rho, costs, floors, limits, least - 1) == floors, "the smallest possible ranks"
    ranks = scaled_ranks([4.0, 8.0, 16.0], [10] * 3, [1] * 3, [64] * 3, 560)
    assert ranks == [8, 16, 32]


@pytest.mark.parametrize("budget_rank", [3, 18])
def test_frozen_ranks_meet_the_budget_and_growing_does_not_change_the_output(budget_rank: int) -> None:
    """From a mean of about 6 down to 3, and up to 18: components that stay keep their output, new ones add nothing yet."""
    model = Model()
    total = sum(a.cost for a in network_of(model).adapters)
    network = randomize(
        network_of(model, budget_mb=2 * budget_rank * total / 1e6, settle_at=1.0, initial_rank=8, q=0.9)
    )
    set_ranks(network, 7.5, 3.2, 7.9)
    network.sync_capacities()
    before, ranks = network.export_factors(), network.ranks()
    network.freeze_ranks()
    after = network.export_factors()
    assert 0 <= network.budget - network.size() < max(a.cost for a in network.adapters)
    assert network.size() == sum(f.parameters for f in after.values())
    for name, factors in before.items():
        kept = min(ranks[name], after[name].rank)
        # Factors of some tens of numbers in float32, times a ratio of importances and its root.
        assert relative(after[name].head(kept).delta().double(), factors.head(kept).delta().double()) < 1e-5
        assert not after[name].up.flatten(1)[:, kept:].any(), "new components add nothing yet"
    if budget_rank == 18:
        assert all(after[name].rank > rank for name, rank in ranks.items())


def test_cutting_applies_alpha_and_meets_any_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: Factors(torch.randn(10, 6, generator=generator), torch.randn(6, 14, generator=generator), alpha)
        for name, alpha in (("plain", None), ("scaled", 1.5))
    }
    for budget in range(2 * 24, 12 * 24 + 30, 72):
        cut = cut_to_budget(layers, budget)
        assert sum(f.parameters for f in cut.values()) == min(budget, 12 * 24)
        for name, factors in cut.items():
            sigma = torch.linalg.svdvals(layers[name].delta().double())
            error = (factors.delta().double() - layers[name].delta().double()).norm()
            # float32 factors: 1e-6 of the whole remains where nothing is cut.
            assert float(error) == pytest.approx(
                float(sigma[factors.rank :].norm()), rel=1e-4, abs=2e-6 * float(sigma.norm())
            )
            assert factors.scale == pytest.approx(1)


# -- export --------------------------------------------------------------------------------------------------


def test_export_folds_importance_into_both_factors_and_keeps_its_order() -> None:
    """√Λ in each factor, the order unchanged, alpha = rank; for the current θ, not that of the last refresh."""
    network, rhos = randomize(network_of(Model(), initial_rank=16, settle_at=1.0)), [3.5, 16, 9]
    network.refresh()
    set_ranks(network, *rhos)
    factors = network.export_factors()
    change = deltas(network, *rhos)
    for name, adapter, rho in zip(network.names, network.adapters, rhos, strict=True):
        layer, root = factors[name], (gain_of(network) * importance_of(rho)).sqrt()
        assert layer.rank == layer.alpha == math.ceil(rho)
        assert layer.up.dtype == layer.down.dtype == torch.float32
        down, up = (p.detach().double()[: layer.rank].flatten(1) for p in (adapter.down, adapter.up))
        assert relative(layer.down.flatten(1), down * root[:, None]) < 1e-6
        assert relative(layer.up.flatten(1).T, up * root[:, None]) < 1e-6
        assert relative(layer.delta(), change[name]) < 1e-6
    final, ordered = final_factors(network)
    assert not ordered
    assert all(torch.equal(final[n].down, factors[n].down) for n in final)
    assert list(network.nu_by_layer().values()) == pytest.approx([C / rho for rho in rhos], rel=1e-6)


def test_export_in_singular_order_is_the_same_update() -> None:
    network = randomize(network_of(Model(), initial_rank=16))
    plain, ordered = network.export_factors(), network.export_factors(ordered=True)
    for name in plain:
        assert relative(ordered[name].delta(), plain[name].delta()) < 1e-6
        assert bool((ordered[name].down.flatten(1).norm(dim=1).diff() <= 1e-6).all())


# -- start ---------------------------------------------------------------------------------------------------


def test_a_new_network_adds_nothing_and_depends_on_the_seed() -> None:
    model, x = Model(), pictures(2, 5, 24)
    one, same, other = (network_of(model, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(answer(one, model, x), model(x)), "B = 0"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(a.down, b.down) for a, b in zip(one.adapters, other.adapters, strict=True))


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({"initial_rank": 0, "target_rank": 8}, 32),
        ({"initial_rank": 0, "target_rank": 1}, 16),
        ({"initial_rank": 0, "target_rank": 8, "max_rank": 20}, 20),
        ({"initial_rank": 5, "min_rank": 7, "target_rank": 7}, 7),
        ({"initial_rank": 100}, 40),
    ],
)
def test_initial_ranks(changes: dict[str, Any], rank: int) -> None:
    network = AdaptiveNetwork({"a": nn.Linear(40, 50)}, config(**changes))
    assert network.ranks() == {"a": rank}


def test_impossible_configurations_raise() -> None:
    """Before anything is allocated or changed."""
    layers = {"a": nn.Linear(40, 50), "b": nn.Linear(8, 16)}
    with pytest.raises(LoraError, match="No layer to adapt"):
        AdaptiveNetwork({}, config())
    with pytest.raises(LoraError, match=r"target_rank = 41 .* at most 40"):
        AdaptiveNetwork(layers, config(target_rank=41))
    with pytest.raises(LoraError, match=r"budget_mb = 1e-05 is smaller than rank 1 on a single layer"):
        AdaptiveNetwork(layers, config(budget_mb=1e-5))
    with pytest.raises(LoraError, match=r"budget_mb = 0.0001 is smaller than rank 1 on all 2 layers"):
        AdaptiveNetwork(layers, config(budget_mb=1e-4, settle_at=1.0))
    with pytest.raises(LoraError, match=r"budget_mb = 1 is more than the 2 layers can hold"):
        AdaptiveNetwork(layers, config(budget_mb=1))


def test_a_run_that_stops_before_pruning_is_saved_at_the_requested_size() -> None:
    network = randomize(network_of(Model(), target_rank=3, initial_rank=16, settle_at=0.5))
    factors, ordered = final_factors(network)
    assert ordered
    assert sum(f.parameters for f in factors.values()) <= network.budget


def test_a_layer_of_another_dtype_learns_too() -> None:
    """A model in bfloat16 may keep a layer in float32: its gradients must reach the sums."""
    layer = frozen(nn.Linear(24, 16, bias=False))
    network = AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=torch.bfloat16)
    network.adapters[0].up.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    network.refresh()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    with network.attached():
        answer = layer(x)
    assert answer.dtype == torch.float32
    answer.square().mean().backward()
    network.finish_gradients()
    adapter = network.adapters[0]
    expected = adapter(x) + x @ layer.weight.T
    # The low-rank path rounds to bfloat16's 2⁻⁸.
    assert relative(answer, expected) < 1e-2
    down, up = torch.autograd.grad(expected.square().mean(), [adapter.down, adapter.up])
    for got, wanted in ((adapter.down.grad, down), (adapter.up.grad, up)):
        assert got is not None
        assert (got - wanted).norm() < 3e-2 * wanted.norm()

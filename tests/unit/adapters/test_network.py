"""All adapted layers together: ranks on the device, θ's gradient, arrays that follow, settling."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from small_networks import C, Model, config, frozen, network_of, pictures, randomise, relative, set_ranks
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from lora2.adapters.network import AdaptiveNetwork
from lora2.config import TrainingConfig
from lora2.method.allocation import cut_to_budget, next_multiplier, scaled_ranks
from lora2.method.factors import Factors
from lora2.training.optimizer import Optimizer
from lora2.util.errors import LoraError


def importance_of(rho: float) -> Tensor:
    """Λ of one layer in float64, by the formulas."""
    nu = C / rho
    count = math.ceil(rho - 1e-9)
    return torch.tensor([math.exp(-nu * j) * (1 - math.exp(-nu)) for j in range(count)], dtype=torch.float64)


def gain_of(network: AdaptiveNetwork) -> float:
    """G, with g² = D / Σ f² at the rank D that the network started at."""
    start = importance_of(network.config.initial_rank)
    return math.sqrt(network.config.initial_rank / math.fsum(start.square().tolist()))


def deltas(network: AdaptiveNetwork, *rhos: float) -> dict[str, Tensor]:
    """ΔW of every layer in float64: B diag(gΛ) A, written out."""
    gain, out = gain_of(network), {}
    for name, adapter, rho in zip(network.names, network.adapters, rhos, strict=True):
        values = gain * importance_of(rho)
        down, up = (p.detach().double()[: len(values)] for p in (adapter.down, adapter.up))
        out[name] = torch.einsum("jo,j,ji->oi", up, values, down.flatten(1)).reshape(adapter.shape)
    return out


def patched(model: Model, change: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the model answers in float64 with these changes of its weights."""
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
    """As soon as θ moves, the next forward has the new rank's Λ, and nothing beyond the rank counts."""
    model = Model()
    network, x = randomise(network_of(model, initial_rank=16)), pictures(3, 5, 24)
    for rhos in ([16, 16, 16], [3.2, 15.9, 1], [1.5, 8, 7.01], [12, 5, 16]):
        set_ranks(network, *rhos)
        network.refresh()
        assert network.logical_ranks().tolist() == [math.ceil(rho) for rho in rhos]
        assert list(network.ranks().values()) == [math.ceil(rho) for rho in rhos]
        # float32 against float64: three layers, sums of some hundred products.
        assert relative(answer(network, model, x), patched(model, deltas(network, *rhos), x)) < 1e-6
        for adapter, rho in zip(network.adapters, rhos, strict=True):
            assert adapter.importance is not None
            assert int((adapter.importance > 0).sum()) == math.ceil(rho)


def test_a_rank_waits_at_the_arrays_end_until_they_follow() -> None:
    network = network_of(Model(), initial_rank=12)
    set_ranks(network, 18, 19, 20)
    assert list(network.ranks().values()) == [16, 16, 16]
    assert network.sync()
    assert list(network.ranks().values()) == [18, 19, 20]


def test_ranks_stay_within_their_limits_whatever_theta_does() -> None:
    """Before a refresh too: a file must never have a rank above max_rank, nor a file be cut off at a zero."""
    network = randomise(network_of(Model(), min_rank=2, max_rank=13, initial_rank=12))
    for theta in (10.0, 1.0, -10.0, 3.0):
        network.theta.data.fill_(theta)
        wanted = min(13, max(2, math.ceil(math.exp(theta))))
        assert list(network.ranks().values()) == [wanted] * 3
        network.theta.data.fill_(theta)
        assert {f.rank for f in network.export().values()} == {wanted}
        network.theta.data.fill_(theta)
        network.sync()
        assert max(a.capacity for a in network.adapters) <= 16
        assert bool(network.theta.isfinite().all())


def test_no_layer_has_more_rank_than_its_weight() -> None:
    layers = {"small": nn.Linear(3, 50), "conv": nn.Conv2d(2, 40, 1), "large": nn.Linear(40, 40)}
    network = AdaptiveNetwork(layers, config(initial_rank=16))
    assert network.ranks() == {"small": 3, "conv": 2, "large": 16}
    network.theta.data.fill_(99.0)
    for _ in range(3):
        network.sync()
    assert network.ranks() == {"small": 3, "conv": 2, "large": 40}


class Listener(TorchDispatchMode):
    """Writes down every operation, and the devices of what it makes."""

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
    """All of a step but the optimizer's arithmetic."""
    network.refresh()
    with network.attached():
        loss = (model(x) - 1).square().mean()
    loss.backward()
    network.write_theta_gradient()


READING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal.default", "unique")


def test_a_step_reads_nothing_back_from_the_device() -> None:
    """On the meta device there is no data: a copy to the CPU, .item() or a branch on a value fails here."""
    model = Model("meta")
    network = network_of(model, "meta")
    for forbidden in (lambda t: t.item(), lambda t: bool(t.sum() > 0), lambda t: t.cpu().tolist()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            forbidden(network.theta)
    with Listener() as listener:
        device_step(network, model, torch.empty(3, 5, 24, device="meta"))
    assert listener.devices == {"meta"}, "no tensor of the step lives anywhere else"
    assert network.theta.grad is not None
    assert all(p.grad is not None for p in network.parameters())
    assert not [name for name, _ in listener.operations if any(word in name for word in READING)]


def test_a_step_is_the_same_work_whatever_the_values_are() -> None:
    """The same operations on the same shapes for any ranks and any data, NaN too: what a CUDA graph needs."""
    model = Model()
    network = randomise(network_of(model, initial_rank=16))
    seen = []
    for rhos, x in (
        ([16, 16, 16], pictures(3, 5, 24)),
        ([1, 7.3, 2], pictures(3, 5, 24, seed=9) * 100),
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


def test_a_step_keeps_theta_and_importance_in_their_place() -> None:
    """A captured step reads and writes fixed addresses; θ at another one would never move on."""
    model = Model()
    network = network_of(model)
    buffers = (network.theta, *(a.importance for a in network.adapters), *network.parameters())
    places = [b.data_ptr() for b in buffers if b is not None]
    for _ in range(3):
        device_step(network, model, pictures(2, 5, 24))
    after = (network.theta, *(a.importance for a in network.adapters), *network.parameters())
    assert [b.data_ptr() for b in after if b is not None] == places


# -- the gradient of θ ---------------------------------------------------------------------------------------


def in_float64(network: AdaptiveNetwork) -> AdaptiveNetwork:
    """The same network in double precision, so that finite differences mean something."""
    for adapter in network.adapters:
        adapter.down = nn.Parameter(adapter.down.data.double())
        adapter.up = nn.Parameter(adapter.up.data.double())
    network.theta.data = network.theta.data.double()
    network._positions = network._positions.double()
    network._importance = network._importance.double()
    for row, adapter in zip(network._importance, network.adapters, strict=True):
        adapter.importance = row
    return network


def whole_loss(network: AdaptiveNetwork, model: Model, x: Tensor, target: float, weight: float) -> Tensor:
    """The data's loss through the adapters, and λ Σ|ν − ν_target|, from what the network holds."""
    network.refresh()
    with network.attached():
        data = (model(x) - 1).square().mean()
    rates = C * torch.exp(-network.theta.detach())
    return data + weight * (rates - C / target).abs().sum()


@pytest.mark.parametrize("rhos", [[5.4, 9.7, 2.5], [11.6, 1.3, 15.2], [1.2, 1.7, 1.4]])
@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_theta_gradient_by_finite_differences(rhos: list[float], weight: float) -> None:
    """A real loss through a chain of adapters; ranks away from whole numbers, where the loss jumps."""
    model = Model().double()
    network = in_float64(randomise(network_of(model, initial_rank=16, rank_weight=weight)))
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
    """Float32 as it trains, against autograd through B diag(Λ(θ)) A in float64; over two batches."""
    model = Model()
    rhos, weight = [5.4, 9.7, 2.5], 0.02
    network = randomise(network_of(model, initial_rank=16, rank_weight=weight, target_rank=4))
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


def test_an_untouched_layer_feels_only_the_regulariser() -> None:
    """At B = 0, and for a layer that no loss reaches, the data says nothing about the rank."""
    model = Model()
    network = network_of(model, initial_rank=12, target_rank=3, rank_weight=0.5)
    with network.attached():
        model.second(model.first(pictures(2, 24))).square().mean().backward()
    network.write_theta_gradient()
    assert network.theta.grad is not None
    assert network.adapters[2].up.grad is None
    # Above the target, ν is too small: a step down the gradient makes θ smaller. d|ν − ν_t| / dθ = +ν there.
    assert torch.allclose(network.theta.grad, torch.full((3,), 0.5 * C / 12), rtol=1e-5)


# -- working copies in another type --------------------------------------------------------------------------


def reference_gradients(
    network: AdaptiveNetwork, model: Model, batches: list[Tensor], rhos: list[float], weight: float
) -> tuple[Tensor, list[Tensor]]:
    """The loss's gradients of θ and of every factor, by autograd of the dense form in float64."""
    theta = torch.tensor(rhos, dtype=torch.float64).log().requires_grad_()
    factors = [p.detach().double().requires_grad_() for p in network.parameters()]
    change = {}
    for index, (name, adapter) in enumerate(zip(network.names, network.adapters, strict=True)):
        nu = C * torch.exp(-theta[index])
        positions = torch.arange(adapter.capacity)
        values = (
            gain_of(network) * torch.exp(-nu * positions) * (1 - torch.exp(-nu)) * (positions < math.ceil(rhos[index]))
        )
        down, up = factors[2 * index], factors[2 * index + 1]
        change[name] = torch.einsum("jo,j,ji->oi", up, values, down.flatten(1)).reshape(adapter.shape)
    loss = torch.stack([(patched(model, change, x) - 1).square().mean() for x in batches]).mean()
    loss = loss + weight * (C * torch.exp(-theta) - C / network.target_rank).abs().sum()
    of_theta, *of_factors = torch.autograd.grad(loss, [theta, *factors])
    return of_theta, of_factors


# float64 shows that the arithmetic is right, to the float32 of Λ and of the finished gradients; bf16 keeps 8 bits of every
# number on the way through three layers.
@pytest.mark.parametrize(("compute", "near"), [(torch.float64, 2e-6), (torch.bfloat16, 0.03), (torch.float32, 2e-6)])
def test_gradients_in_every_type_that_a_model_computes_in(compute: torch.dtype, near: float) -> None:
    """Of factors and θ, over two batches; and a second step starts from nothing."""
    model, rhos, weight = Model(), [5.4, 9.7, 2.5], 0.02
    told = config(initial_rank=16, rank_weight=weight, target_rank=4)
    network = randomise(AdaptiveNetwork(model.layers(), told, compute=compute))
    set_ranks(network, *rhos)
    batches = [pictures(3, 5, 24, seed=s) for s in (1, 2)]
    theta, factors = reference_gradients(network, model, batches, rhos, weight)
    model.to(compute)
    for _ in range(2):
        network.refresh()
        network.allocate_gradients()
        for x in batches:
            with network.attached():
                (
                    (model(x.to(compute)).to(torch.promote_types(compute, torch.float32)) - 1).square().mean() / 2
                ).backward()
        network.finish_gradients()
        assert network.theta.grad is not None
        assert relative(network.theta.grad, theta) < 2 * near
        for parameter, expected in zip(network.parameters(), factors, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert relative(parameter.grad, expected) < near
        network.clear_gradients()


@pytest.mark.parametrize("settled", [False, True])
def test_outputs_in_another_type_follow_ranks_resizing_and_settling(settled: bool) -> None:
    """The copies are made anew at every refresh, for any capacity; a settled rank need not be a multiple of 8."""
    model, x = Model(), pictures(3, 5, 24)
    network = randomise(AdaptiveNetwork(model.layers(), config(initial_rank=16, target_rank=5), compute=torch.float64))
    for rhos in ([16, 7.2, 3], [20, 20, 20], [2.5, 17, 1]):
        set_ranks(network, *rhos)
        network.sync()
        randomise(network)
        if settled:
            change = {n: f.delta().double() for n, f in cut_to_budget(network.export(), network.budget).items()}
            network.prune()
        else:
            change = deltas(network, *rhos)
        network.refresh()
        expected = patched(model, change, x)
        got = answer(network, model.double(), x.double())
        model.float()
        assert relative(got, expected) < 1e-6
        if settled:
            break


# -- arrays that follow --------------------------------------------------------------------------------------


def test_sync_follows_in_multiples_of_eight_and_changes_no_output() -> None:
    model = Model()
    network, x = randomise(network_of(model, initial_rank=20, max_rank=20)), pictures(3, 5, 24)
    assert [a.capacity for a in network.adapters] == [24, 24, 24]
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        rhos = (torch.rand(3, generator=generator, dtype=torch.float64) * 19 + 0.9).tolist()
        set_ranks(network, *rhos)
        network.refresh()
        inside = [min(math.ceil(rho), a.capacity) for rho, a in zip(rhos, network.adapters, strict=True)]
        before = answer(network, model, x)
        network.sync()
        for adapter, rho, rank in zip(network.adapters, rhos, inside, strict=True):
            assert adapter.capacity % 8 == 0
            assert adapter.capacity >= math.ceil(rho)
            assert len(adapter.up) == len(adapter.down) == adapter.capacity
            assert not adapter.up[rank:].any(), "what is beyond the rank starts anew"
        # Cut rows had Λ = 0 and new ones have B = 0: only the kernels' order of summation may differ.
        assert relative(answer(network, model, x), before) < 1e-6


def test_positions_that_were_in_use_for_a_while_are_forgotten_too() -> None:
    """A rank that rises and falls again between two syncs; what lies inside the rank is kept, bit for bit."""
    network = network_of(Model(), initial_rank=16)
    network.sync()
    for ranks in ([6, 6, 6], [14, 11, 6], [6, 6, 6]):
        set_ranks(network, *map(float, ranks))
        network.refresh()
        if ranks[0] == 6:
            network.sync()
        else:
            for adapter, rank in zip(network.adapters, ranks, strict=True):
                adapter.up.data[:rank] = 1.0
        held = [a.down.detach()[:6].clone() for a in network.adapters]
    for adapter, down in zip(network.adapters, held, strict=True):
        assert bool((adapter.up[:6] == 1).all())
        assert not adapter.up[6:].any()
        assert torch.equal(adapter.down[:6], down)


def test_a_single_layer_among_hundreds_gets_about_the_rank_that_it_wants() -> None:
    """Its parameters are a thousandth of all, and it may still be the one layer that matters."""
    layers = {str(i): nn.Linear(48, 48) for i in range(300)}
    network = AdaptiveNetwork(layers, config(initial_rank=16, target_rank=8))
    resized = 0
    for wanted in range(16, 49):
        network.theta.data[7] = math.log(wanted)
        resized += network.sync()
        assert wanted / 1.3 <= network.ranks()["7"] <= wanted
    assert 1 <= resized <= 4, "without recording a step anew for each position"


def test_capacities_have_hysteresis() -> None:
    """A rank that swings by a few does not reallocate; falling far does."""
    network = network_of(Model(), initial_rank=20)
    network.sync()
    for rank in (20, 22, 18, 23, 16, 20, 15, 22):
        set_ranks(network, *[float(rank)] * 3)
        assert not network.sync()
    set_ranks(network, 3.0, 20.0, 20.0)
    assert network.sync()
    assert [a.capacity for a in network.adapters] == [16, 24, 24]
    assert not network.sync()


def test_ranks_and_optimizer_follow_through_a_whole_run() -> None:
    """Ranks up and down, arrays synced, one optimizer for all: it trains exactly the arrays there are."""
    model = Model()
    network = network_of(model, initial_rank=8, learning_rate=1e-2)
    optimizer = Optimizer(network, network.config)
    generator = torch.Generator().manual_seed(0)
    changed = 0
    for step in range(24):
        set_ranks(network, *(1 + 18 * torch.rand(3, generator=generator)).tolist())
        changed += network.sync(optimizer.inner)
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
    """256 positions of 600 numbers in two layers fall to 16: factors and two moments, 4 bytes a number; gradients go."""
    layers = {"a": frozen(nn.Linear(300, 300)), "b": frozen(nn.Linear(300, 300))}
    network = AdaptiveNetwork(layers, config(initial_rank=256))
    optimizer = Optimizer(network, network.config)
    torch.stack([(a.down.sum() + a.up.sum()) for a in network.adapters]).sum().backward()
    optimizer.step(1.0, False, torch.ones(()))
    before = live_bytes()
    set_ranks(network, 3, 5)
    network.sync(optimizer.inner)
    buffers = 4 * 5 * 240  # Λ and its gradient for two layers, and the positions
    # Beside them only θ's limits, a few bytes, are laid out anew.
    gradients = 4 * 2 * 256 * 600
    assert before - live_bytes() == pytest.approx(3 * 4 * 2 * (256 - 16) * 600 + gradients + buffers, abs=64)


# -- settling ------------------------------------------------------------------------------------------------


def test_settling_without_a_cut_changes_the_output_by_rounding_only() -> None:
    model = Model()
    network, x, rhos = randomise(network_of(model, initial_rank=16)), pictures(3, 5, 24), [7.3, 16, 2.2]
    set_ranks(network, *rhos)
    network.refresh()
    before, change = answer(network, model, x), deltas(network, *rhos)
    network.prune(network.size())
    assert network.pruned
    assert network.ranks() == {"a": 8, "b": 16, "c": 3}
    # Factors are rounded to float32 once, after a float64 SVD.
    assert relative(answer(network, model, x), before) < 1e-6
    for name, factors in network.export().items():
        assert relative(factors.delta(), change[name]) < 5e-7
    for adapter in network.adapters:
        assert adapter.importance is None
        lengths = adapter.down.detach().flatten(1).norm(dim=1)
        assert float(lengths.max() / lengths.min()) < 5, "what is trained from here on are mixtures (mixing.py)"
    for factors in network.export().values():
        up = factors.up.double().flatten(1).T
        weights = up.norm(dim=1) * factors.down.flatten(1).double().norm(dim=1)
        assert bool((weights.diff() < 1e-6).all()), "what is written is in the order of singular values"
        gram = up @ up.T
        assert float((gram - gram.diag().diag()).abs().max()) < 1e-5 * float(gram.max()), "orthogonal"


def test_settling_cuts_to_the_budget_and_every_layer_is_its_best_approximation() -> None:
    """Eckart and Young: the error at rank r is √Σ_{i>r} σ², with σ of the dense ΔW by another routine."""
    for budget_rank in (2, 3, 5, 8):
        model = Model()
        network, rhos = randomise(network_of(model, initial_rank=16, target_rank=budget_rank)), [15.3, 16, 12]
        set_ranks(network, *rhos)
        change = deltas(network, *rhos)
        network.prune()
        costs = {"a": 24 + 32, "b": 32 + 20, "c": 20 * 3 + 28}
        assert network.budget == budget_rank * sum(costs.values())
        ranks = network.ranks()
        assert sum(ranks[n] * costs[n] for n in costs) == network.size()
        growable = [costs[n] for n, rho in zip(costs, rhos, strict=True) if ranks[n] < math.ceil(rho)]
        assert 0 <= network.budget - network.size() < min(growable)
        for name, factors in network.export().items():
            sigma = torch.linalg.svdvals(change[name].flatten(1))
            error = (factors.delta().double() - change[name]).norm()
            best = sigma[ranks[name] :].square().sum().sqrt()
            assert factors.rank == ranks[name] >= 1
            assert float(error) == pytest.approx(float(best), rel=1e-5)


def test_all_layers_are_cut_by_one_measure() -> None:
    """With equal costs, whatever is kept anywhere has more energy than whatever is dropped anywhere."""
    layers = {name: frozen(nn.Linear(24, 24)) for name in "abcd"}
    network = randomise(AdaptiveNetwork(layers, config(initial_rank=16, target_rank=4)))
    for strength, adapter in zip((3.0, 1.0, 0.5, 1e-4), network.adapters, strict=True):
        adapter.up.data *= strength
    change = deltas(network, 16, 16, 16, 16)
    network.prune()
    ranks = network.ranks()
    sigmas = {name: torch.linalg.svdvals(delta) for name, delta in change.items()}
    assert sum(ranks.values()) == 4 * 4
    assert ranks["a"] > ranks["b"] > ranks["c"] > ranks["d"] == 0, "the smallest is dropped"
    kept = min(float(sigmas[n][ranks[n] - 1]) for n in "abc")
    assert kept >= max(float(sigmas[n][ranks[n]]) for n in "abcd")


def test_settling_keeps_min_rank_everywhere() -> None:
    layers = {name: frozen(nn.Linear(24, 24)) for name in "abc"}
    network = randomise(AdaptiveNetwork(layers, config(initial_rank=16, target_rank=6, min_rank=3)))
    network.adapters[1].up.data *= 1e-6
    network.prune()
    assert network.ranks()["b"] == 3
    assert network.size() == network.budget


@pytest.mark.parametrize("cut", [True, False])
def test_settling_before_anything_was_learned_gives_a_plain_lora_that_learns(cut: bool) -> None:
    """ΔW = 0 (settle_at = 0, or a layer that no gradient has reached) must not stay zero for ever."""
    model = Model()
    network = network_of(model, target_rank=4, initial_rank=16)
    if not cut:
        network.adapters[0].up.data.normal_(generator=torch.Generator().manual_seed(0))
    x = pictures(3, 5, 24)
    before = answer(network, model, x)
    network.prune(None if cut else network.size())
    assert relative(answer(network, model, x), before) < 1e-6
    assert set(network.ranks().values()) == {4 if cut else 16}
    for adapter in network.adapters[0 if cut else 1 :]:
        assert not adapter.up.any()
        # A plain LoRA's start; the hundred numbers of the smallest know their deviation to 7 %.
        d_in = math.prod(adapter.shape[1:])
        assert float(adapter.down.detach().std()) == pytest.approx(math.sqrt(1 / (3 * d_in)), rel=0.2)
    device_step_settled(network, model, x)
    for adapter in network.adapters:
        assert adapter.up.grad is not None
        assert bool(adapter.up.grad.any(1).all()), "every position can learn"


def device_step_settled(network: AdaptiveNetwork, model: Model, x: Tensor) -> None:
    network.refresh()
    with network.attached():
        (model(x) - 1).square().mean().backward()


def test_a_settled_network_trains_as_a_plain_lora() -> None:
    """No θ, no Λ, no resizing; the ranks stay and ν is no longer known."""
    model = Model()
    network = randomise(network_of(model, target_rank=3, initial_rank=16))
    network.prune()
    ranks, optimizer = network.ranks(), Optimizer(network, config(learning_rate=1e-2))
    assert optimizer.theta is None
    assert network.rates() == dict.fromkeys("abc")
    x, losses = pictures(8, 5, 24), []
    for _ in range(20):
        with network.attached():
            loss = (model(x) - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step(1.0, True, loss.detach())
        assert not network.sync(optimizer.inner)
    assert losses[-1] < 0.8 * losses[0]
    assert network.ranks() == ranks
    factors, ordered = network.final_factors()
    assert ordered
    change = {name: layer.delta().double() for name, layer in factors.items()}
    assert relative(answer(network, model, x), patched(model, change, x)) < 1e-6


# -- budgets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget_rank", "initial"), [(6, 24), (10, 5)])
def test_a_budget_steers_the_papers_form(budget_rank: int, initial: int) -> None:
    """settle_at = 1: from four times the budget and from half of it, the size while training comes near it.

    And what is saved is never above it.
    """
    width, teachers = 32, {"a": 1, "b": 2, "c": 4, "d": 8, "e": 16}
    generator = torch.Generator().manual_seed(0)
    layers = {name: frozen(nn.Linear(width, width, bias=False)) for name in teachers}
    goals = {}
    for name, rank in teachers.items():
        up = torch.randn(width, rank, generator=generator)
        goals[name] = up @ torch.randn(rank, width, generator=generator) / math.sqrt(width * rank)
    budget = budget_rank * len(layers) * 2 * width
    told = TrainingConfig(
        steps=1200,
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
    network = AdaptiveNetwork(layers, told)
    assert network.budget == budget
    optimizer = Optimizer(network, told)
    start = network.size()
    for step in range(told.steps):
        x = torch.randn(32, width, generator=generator)
        network.refresh()
        with network.attached():
            errors = [(m(x) - x @ (m.weight + goals[n]).T).square().mean() for n, m in layers.items()]
        torch.stack(errors).sum().backward()
        optimizer.step(1.0, step >= 15, torch.ones(()))
        if step % 10 == 9:
            network.sync(optimizer.inner)
    assert abs(start / budget - 1) > 0.4
    assert network.size() / budget == pytest.approx(1, abs=0.25)
    a, b, c, d, _ = network.ranks().values()
    assert a <= b + 1 <= c + 1 <= d + 1, (
        "the harder the task, the more of the budget (what rank 16 would need does not fit it)"
    )
    assert a < d
    factors, _ = network.final_factors()
    assert sum(f.parameters for f in factors.values()) <= budget


def test_the_multiplier_rises_above_the_budget_and_falls_below_it() -> None:
    assert next_multiplier(1.0, 1.3, 1.3) > 1 > next_multiplier(1.0, 0.7, 0.7)
    assert next_multiplier(2.0, 1.0, 1.0) == 2.0
    assert next_multiplier(1.0, 1.3, 1.6) < next_multiplier(1.0, 1.3, 1.3), "the size is coming down already"
    pressure = 1.0
    for _ in range(100):
        pressure = next_multiplier(pressure, 50, 50)
    assert pressure == 1e6
    for _ in range(100):
        pressure = next_multiplier(pressure, 0.01, 0.01)
    assert pressure == 1e-6


def test_resting_ranks_meet_a_budget_in_their_proportions() -> None:
    """Between floor and limit, never above, and no layer could have one position more."""
    rho, costs, floors, limits = [2.3, 4.1, 7.9, 40.0, 3.3], [24, 40, 24, 32, 8], [1] * 5, [16, 16, 16, 30, 16]
    least, most = sum(costs), sum(c * high for c, high in zip(costs, limits, strict=True))
    last: list[int] = [0] * 5
    for budget in range(least, most + 1):
        ranks = scaled_ranks(rho, costs, floors, limits, budget)
        size = sum(r * c for r, c in zip(ranks, costs, strict=True))
        assert size <= budget
        assert all(low <= r <= high for low, r, high in zip(floors, ranks, limits, strict=True))
        assert all(size + c > budget for r, c, high in zip(ranks, costs, limits, strict=True) if r < high)
        last = ranks
    assert last == limits
    assert scaled_ranks(rho, costs, floors, limits, least - 1) == floors, "the least there is"
    ranks = scaled_ranks([4.0, 8.0, 16.0], [10] * 3, [1] * 3, [64] * 3, 560)
    assert ranks == [8, 16, 32]


@pytest.mark.parametrize("budget_rank", [3, 6, 18])
def test_ranks_at_rest_meet_the_budget_and_growing_changes_no_output(budget_rank: int) -> None:
    """From a mean of about 6 down to 3, and up to 18: what stays gives what it gave, and what is new gives nothing yet."""
    model = Model()
    total = sum(a.cost for a in network_of(model).adapters)
    network = randomise(
        network_of(model, budget_mb=2 * budget_rank * total / 1e6, settle_at=1.0, initial_rank=8, q=0.9)
    )
    set_ranks(network, 7.5, 3.2, 7.9)
    network.sync()
    before, ranks = network.export(), network.ranks()
    network.rest()
    after = network.export()
    assert 0 <= network.budget - network.size() < max(a.cost for a in network.adapters)
    assert network.size() == sum(f.parameters for f in after.values())
    for name, factors in before.items():
        kept = min(ranks[name], after[name].rank)
        # Factors of some tens of numbers in float32, times a ratio of importances and its root.
        assert relative(after[name].head(kept).delta().double(), factors.head(kept).delta().double()) < 1e-5
        assert not after[name].up.flatten(1)[:, kept:].any(), "new positions give nothing yet"
    if budget_rank == 18:
        assert all(after[name].rank > rank for name, rank in ranks.items())


def test_fit_keeps_alpha_and_meets_any_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: Factors(torch.randn(10, 6, generator=generator), torch.randn(6, 14, generator=generator), alpha)
        for name, alpha in (("plain", None), ("scaled", 1.5))
    }
    for budget in range(2 * 24, 12 * 24 + 30, 24):
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


def test_export_folds_importance_evenly_and_keeps_its_order() -> None:
    """√Λ into both factors, positions as they were, alpha the rank; by θ as it is now, not at the last refresh."""
    network, rhos = randomise(network_of(Model(), initial_rank=16, settle_at=1.0)), [3.5, 16, 9]
    network.refresh()
    set_ranks(network, *rhos)
    factors = network.export()
    change = deltas(network, *rhos)
    for name, adapter, rho in zip(network.names, network.adapters, rhos, strict=True):
        layer, root = factors[name], (gain_of(network) * importance_of(rho)).sqrt()
        assert layer.rank == layer.alpha == math.ceil(rho)
        assert layer.up.dtype == layer.down.dtype == torch.float32
        down, up = (p.detach().double()[: layer.rank].flatten(1) for p in (adapter.down, adapter.up))
        assert relative(layer.down.flatten(1), down * root[:, None]) < 1e-6
        assert relative(layer.up.flatten(1).T, up * root[:, None]) < 1e-6
        assert relative(layer.delta(), change[name]) < 1e-6
    final, ordered = network.final_factors()
    assert not ordered
    assert all(torch.equal(final[n].down, factors[n].down) for n in final)
    assert list(network.rates().values()) == pytest.approx([C / rho for rho in rhos], rel=1e-6)


def test_export_in_singular_order_is_the_same_update() -> None:
    network = randomise(network_of(Model(), initial_rank=16))
    plain, ordered = network.export(), network.export(ordered=True)
    for name in plain:
        assert relative(ordered[name].delta(), plain[name].delta()) < 1e-6
        assert bool((ordered[name].down.flatten(1).norm(dim=1).diff() <= 1e-6).all())


# -- start ---------------------------------------------------------------------------------------------------


def test_a_new_network_changes_nothing_and_a_seed_decides_it() -> None:
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
def test_where_the_ranks_start(changes: dict[str, Any], rank: int) -> None:
    network = AdaptiveNetwork({"a": nn.Linear(40, 50)}, config(**changes))
    assert network.ranks() == {"a": rank}


def test_impossible_networks_are_refused_in_words() -> None:
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


def test_a_run_that_stops_before_its_ranks_settle_has_the_size_that_was_asked_for() -> None:
    network = randomise(network_of(Model(), target_rank=3, initial_rank=16, settle_at=0.5))
    factors, ordered = network.final_factors()
    assert ordered
    assert sum(f.parameters for f in factors.values()) <= network.budget


def test_a_layer_that_runs_in_another_type_learns_too() -> None:
    """A model in bfloat16 may keep a layer in float32: its gradients must not be lost beside the summed ones."""
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

"""A network that starts from factors answers as they do, and learns from there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy_trainer import Toy, kept, made, stopped, toy_of, trainer_of

from lora2.adapters.network import AdaptiveNetwork
from lora2.adapters.prune import final_factors
from lora2.config import TrainingConfig
from lora2.method.factors import Factors, full_rank
from lora2.training.trainer import Trainer
from lora2.training.warm_start import factors_from_state, warm_start

RANKS = {"into": 3, "q": 1, "k": 12, "v": 7, "out": 4}


def random_factors(
    network: AdaptiveNetwork, ranks: dict[str, int] = RANKS, alpha: float | None = 2.0
) -> dict[str, Factors]:
    """Factors of these ranks, in no order, with an alpha of their own."""
    g = torch.Generator().manual_seed(2)
    found = {}
    for name, adapter in zip(network.names, network.adapters, strict=True):
        if name in ranks:
            d_out, *inner = adapter.shape
            up = torch.randn(d_out, ranks[name], *[1] * (len(inner) - 1), generator=g)
            found[name] = Factors(up, 0.1 * torch.randn(ranks[name], *inner, generator=g), alpha)
    return found


def weight(network: AdaptiveNetwork, name: str) -> torch.Tensor:
    """What a layer adds to its weight now: its answer to every unit vector."""
    index = network.names.index(name)
    return network.export_factors()[network.names[index]].delta().double()


def network_of(**changes: Any) -> AdaptiveNetwork:
    return AdaptiveNetwork(Toy().layers(), TrainingConfig(target_rank=4, **changes))


@pytest.mark.parametrize("q", [0.5, 0.9, 0.999])
def test_the_product_is_that_of_the_factors(q: float) -> None:
    """Λ is divided out; float32 rounds once in each factor and once in Λ."""
    network = network_of(q=q)
    given = random_factors(network)
    started = warm_start(network, given)
    assert started == type(started)(list(RANKS), [], [])
    assert network.ranks() == RANKS
    for name, factors in given.items():
        wanted = factors.delta().double()
        assert (weight(network, name) - wanted).norm() < 2e-6 * wanted.norm(), name


def test_the_hooks_answer_as_a_plain_lora() -> None:
    """The network attached, against weights with the update added."""
    toy, other = Toy(), Toy()
    network = AdaptiveNetwork(toy.layers(), TrainingConfig(target_rank=4))
    given = random_factors(network)
    warm_start(network, given)
    for name, module in other.layers().items():
        module.weight.data += given[name].delta()  # type: ignore[union-attr, operator]
    g = torch.Generator().manual_seed(4)
    x, sigma = torch.randn(2, 4, 4, 4, generator=g), torch.tensor([0.5, 2.0])
    for model in (toy, other):
        model.calls.append({})
    with network.attached(), torch.no_grad():
        ours = toy.denoise(x, sigma, [0, 1])
    plain, theirs = Toy(), other.denoise(x, sigma, [0, 1])
    plain.calls.append({})
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (theirs - plain.denoise(x, sigma, [0, 1])).norm() > 1e-2 * theirs.norm(), "else this shows nothing"


def test_layers_without_factors_start_as_they_would() -> None:
    network, fresh = network_of(), network_of()
    started = warm_start(network, random_factors(network, {"q": 3}))
    assert (started.taken, started.fresh) == (["q"], ["into", "k", "v", "out"])
    for one, other, name in zip(network.adapters, fresh.adapters, network.names, strict=True):
        assert torch.equal(one.down, other.down) == torch.equal(one.up, other.up) == (name != "q"), name
    assert network.ranks() == {**fresh.ranks(), "q": 3}


def test_ranks_are_brought_within_their_bounds() -> None:
    """Below the smallest, new positions carry nothing; above the largest, the most important ones stay."""
    network = network_of(min_rank=2, max_rank=5)
    given = random_factors(network)
    started = warm_start(network, given)
    assert network.ranks() == {"into": 3, "q": 2, "k": 5, "v": 5, "out": 4}
    assert started.cut == ["k", "v"]
    assert (weight(network, "q") - given["q"].delta().double()).norm() < 1e-6 * given["q"].delta().norm()
    left = (weight(network, "k") - given["k"].delta().double()).norm() ** 2
    tail = torch.linalg.svdvals(given["k"].delta().double())[5:].square().sum()
    assert float(left) == pytest.approx(float(tail), rel=1e-5), "Eckart and Young: no cut loses less"


def test_a_file_of_more_positions_than_the_layer_has_directions_loses_nothing() -> None:
    network = network_of()
    given = random_factors(network, {"out": 40})
    warm_start(network, given)
    assert network.ranks()["out"] == full_rank(network.adapters[-1].shape) == 4
    assert (weight(network, "out") - given["out"].delta().double()).norm() < 2e-6 * given["out"].delta().norm()


@pytest.mark.parametrize("alpha", [None, 0.0, -3.0])
def test_any_alpha_counts(alpha: float | None) -> None:
    network = network_of()
    given = random_factors(network, RANKS, alpha)
    warm_start(network, given)
    for name, factors in given.items():
        assert torch.allclose(weight(network, name), factors.delta().double(), atol=1e-5)


def test_positions_that_carry_nothing_can_learn() -> None:
    """Two zero factors would have no gradient, for ever."""
    trainer = trainer_of(steps=6, settle_at=1.0, rank_weight=0.0)
    network = trainer.network
    empty = {name: Factors(torch.zeros_like(f.up), f.down) for name, f in random_factors(network).items()}
    trainer.warm_start(empty)
    assert all(float(weight(network, name).abs().max()) == 0 for name in network.names)
    trainer.run()
    assert all(float(weight(network, name).abs().max()) > 0 for name in network.names)


def test_training_goes_down_from_there() -> None:
    """The run that starts from a trained adapter begins below where a fresh one begins."""
    before = trainer_of(steps=60, accumulation=4)
    before.run()
    factors, _ = final_factors(before.network)
    again = trainer_of(steps=6, accumulation=4)
    again.warm_start(factors)
    again.run()
    fresh = trainer_of(steps=6, accumulation=4)
    fresh.run()
    assert math.fsum(again.progress.losses[:3]) < math.fsum(fresh.progress.losses[:3])


@pytest.mark.parametrize(
    ("form", "step"), [({}, 4), ({}, 9), ({"settle_at": 1.0}, 9)], ids=["adapting", "settled", "pure"]
)
def test_factors_of_a_state_are_those_of_its_network(form: dict[str, Any], step: int, tmp_path: Any) -> None:
    trainer = stopped(made(**form), step)
    found = factors_from_state(kept(trainer, tmp_path).part("network"), trainer.config.q)
    exported = trainer.network.export_factors(ordered=False)
    if trainer.network.pruned:
        exported = {
            n: a.factors(a.capacity) for n, a in zip(trainer.network.names, trainer.network.adapters, strict=True)
        }
    for name, factors in exported.items():
        assert found[name].rank == factors.rank
        # The logical rank's Λ once on the network's buffer, once per layer: the same float32 numbers but for exp's last bit.
        assert torch.allclose(found[name].delta(), factors.delta(), rtol=1e-5, atol=1e-7)


def test_a_start_from_factors_is_the_same_every_time() -> None:
    runs: list[Trainer] = []
    for _ in range(2):
        trainer = trainer_of(steps=6)
        trainer.warm_start(random_factors(trainer.network))
        trainer.run()
        runs.append(trainer)
    assert runs[0].progress.losses == runs[1].progress.losses
    assert toy_of(runs[0]).forwards == 6

"""The smallest size that keeps a share of what was learned: the search, and sizes as a network holds them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scaled_layers import inputs, network_of
from toy_trainer import fail_once, trainer_of

import lora2.adapters.layer
import lora2.adapters.network
from lora2.adapters.network import AdaptiveNetwork
from lora2.adapters.prune import final_factors, prune
from lora2.method.factors import Factors
from lora2.method.size_search import BATCH_SIZE, BISECTIONS, MAX_HALVINGS, smallest_sufficient_size
from lora2.training.progress import Progress
from lora2.training.trainer import Trainer
from lora2.util.errors import LoraError

MOST = 10_000


def falling(half: float) -> Callable[[int], float]:
    """A loss of which a size of `half` takes off one half of all that any could."""
    return lambda size: 1 - 0.5 * size / (size + half)


@given(half=st.floats(1.0, 3e4), share=st.floats(0.1, 0.99))
def test_it_is_enough_and_not_a_tenth_more_than_that(half: float, share: float) -> None:
    loss = falling(half)
    goal = 1 - share * (1 - loss(MOST))
    found = smallest_sufficient_size(loss, 0, MOST, share)
    assert found is not None
    assert loss(found) <= goal + 1e-12
    assert loss(math.floor(found / 1.1) - 1) > goal or found == MOST >> MAX_HALVINGS
    floored = smallest_sufficient_size(loss, 3000, MOST, share)
    assert floored == 3000 or (floored is not None and 3000 < floored <= 1.1 * max(found, 3000) + 1)


def test_every_size_is_judged_once_and_few_are() -> None:
    seen: list[int] = []

    def loss(size: int) -> float:
        seen.append(size)
        return falling(1)(size)

    assert smallest_sufficient_size(loss, 0, MOST, 0.9) == MOST >> MAX_HALVINGS
    assert seen == [0, *(MOST >> k for k in range(MAX_HALVINGS + 1))]
    seen.clear()
    assert smallest_sufficient_size(loss, 0, MOST, 0.9999) is not None
    assert len(seen) == len(set(seen)) <= 2 + MAX_HALVINGS + BISECTIONS
    seen.clear()
    assert smallest_sufficient_size(loss, MOST, MOST, 0.5) == MOST
    assert seen == [0, MOST], "there is nothing to choose"


def test_the_best_size_need_not_be_the_largest() -> None:
    """Positions that hold noise raise the loss; even where all together are worse than nothing, some may be worth keeping."""
    curve = {0: 1.0, 64: 1.2, 32: 1.1, 16: 0.7, 8: 0.5, 4: 0.6, 2: 0.9, 1: 0.95}
    found = smallest_sufficient_size(lambda size: curve.get(size, 0.8), 0, 64, 0.9)
    assert found == 8


@pytest.mark.parametrize("loss", [
    lambda size: 1.0, lambda size: 1.0 + size, lambda size: math.nan, lambda size: 1.0 if not size else math.nan,
    lambda size: math.inf if not size else 1.0,
], ids=["nothing learned", "worse", "no number", "no number with any", "no number without"])  # fmt: skip
def test_where_nothing_was_learned_there_is_no_size(loss: Callable[[int], float]) -> None:
    assert smallest_sufficient_size(loss, 0, MOST, 0.9) is None


def test_sizes_that_are_no_numbers_are_not_enough() -> None:
    assert (
        smallest_sufficient_size(lambda size: math.nan if 0 < size < 1250 else falling(10)(size), 0, MOST, 0.5) == 1250
    )


def test_an_unknown_loss_of_the_largest_size_does_not_hide_the_others() -> None:
    found = smallest_sufficient_size(lambda size: math.nan if size == MOST else falling(10)(size), 0, MOST, 0.5)
    assert found is not None


# -- a network at every size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_network_shows_what_a_cut_to_that_size_would_be(compute: torch.dtype) -> None:
    """Against a second network, cut to that size; and the one that is chosen is left, in whatever order sizes were shown."""
    weights = {"faint": 1.0, "plain": 2.0, "loud": 0.5}
    x = inputs(5, torch.Generator().manual_seed(1))

    def outputs(network: AdaptiveNetwork, layers: Any) -> torch.Tensor:
        with torch.no_grad(), network.attached():
            return torch.stack([layers[name](x[name].to(compute)) for name in layers]).float()

    def made() -> tuple[AdaptiveNetwork, Any]:
        torch.manual_seed(0)
        network, _, layers = network_of(compute=compute)
        for layer in layers.values():
            layer.to(compute)
        return network, layers

    sizes = [200, 700, 48, 500, 0]
    network, layers = made()
    shown = {}

    def choose(show: Callable[[int], None], least: int, most: int) -> int:
        assert (least, most) == (0, network.size())
        assert most <= 800
        for size in sizes:
            show(size)
            shown[size] = outputs(network, layers)
        return 500

    prune(network, 800, weights, choose)
    for size in sizes:
        other, others_layers = made()
        prune(other, size, weights)
        # Both round to the same type; positions are mixed in the other one.
        near = {"rtol": 1e-5, "atol": 1e-5} if compute == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(outputs(other, others_layers), shown[size], **near)
        if size == 500:
            assert network.ranks() == other.ranks()
            for one, same in zip(network.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(one, same)
    assert not torch.equal(shown[48], shown[700])


GROWING: dict[str, Any] = {"steps": 12, "settle_at": 0.5, "settle_cuts": 1, "target_rank": 4, "settle_keep": 0.5}


@pytest.mark.parametrize(("name", "at"), [("load", 2), ("rotate", 2), ("load", 6)])
def test_where_memory_runs_out_the_size_is_chosen_once_all_the_same(
    name: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:

    trainer, plenty = trainer_of(**GROWING), trainer_of(**GROWING)
    plenty.run()
    calls = fail_once(monkeypatch, lora2.adapters.layer.Adapter, name, at)
    trainer.run()
    assert len(calls) > at
    for one, other in zip(trainer.network.parameters(), plenty.network.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("most", "words"), [(4, [4]), (3, [4, 2]), (1, [4, 2, 1])])
def test_where_memory_runs_out_sizes_are_compared_on_fewer_pictures(most: int, words: list[int]) -> None:
    """The same size is found."""
    trainer, plenty = trainer_of(**GROWING), trainer_of(**GROWING)
    plenty.run()
    own, sizes = trainer.loss, list[int]()

    def loss(clean: torch.Tensor, *given: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            return own(clean, *given)
        if len(clean) not in sizes:
            sizes.append(len(clean))
        if len(clean) > most:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return own(clean, *given)

    trainer.loss = loss  # type: ignore[method-assign]
    progress = trainer.run()
    assert sizes == words
    assert progress.changes == [], "steps are made as before"
    assert trainer.network.ranks() == plenty.network.ranks()


@pytest.mark.parametrize(("trouble", "choice", "words"), [
    (torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), "stop", "memory ran out while sizes were compared"),
    (None, "retry with less", "the loss was not finite while sizes were compared"),
], ids=["no memory", "no number"])  # fmt: skip
def test_where_sizes_cannot_be_compared_the_run_goes_on_with_the_target(
    trouble: Exception | None, choice: str, words: str
) -> None:
    trainer, whole = trainer_of(**GROWING, on_out_of_memory=choice), trainer_of(**{**GROWING, "settle_keep": 1.0})
    whole.run()
    own, said, calls = trainer.loss, list[str](), list[int]()
    trainer.notify = said.append

    def loss(clean: torch.Tensor, *given: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            return own(clean, *given)
        calls.append(len(clean))
        if trouble is not None:
            raise trouble
        return torch.tensor(math.nan)

    trainer.loss = loss  # type: ignore[method-assign]
    progress = trainer.run()
    assert progress.step == GROWING["steps"]
    assert progress.changes == []
    assert [line for line in said if words in line and "target size is used" in line]
    assert trainer.network.ranks() == whole.network.ranks()
    if trouble is not None:
        assert calls[:3] == [4, 2, 1]
        assert 4 not in calls[1:], "what did not fit is not tried again"


def test_a_floor_is_kept_and_does_not_count_as_learned() -> None:
    """With min_rank, none is still the frozen model: the size that is found is that without it, or the floor."""
    found = {}
    for least in (0, 1, 4):
        trainer = trainer_of(**{**GROWING, "min_rank": least, "settle_keep": 0.9})
        said: list[str] = []
        trainer.notify = said.append
        trainer.run()
        assert not said
        ranks = trainer.network.ranks().values()
        assert min(ranks) >= least
        found[least] = trainer.network.size()
    assert found[4] == trainer.network.budget, "a floor at the target leaves nothing to choose"
    assert found[0] <= found[1] < found[4]


class Stop(Exception):
    """What a person's cancel is here."""


def stopped(trainer: Trainer, when: Callable[[Progress], bool]) -> dict[str, Factors]:
    """What a file would hold of a run that is stopped at that moment: the target's size."""

    def stop(progress: Progress) -> None:
        if when(progress):
            raise Stop

    with pytest.raises(Stop):
        trainer.run(stop)
    factors, _ = final_factors(trainer.network, trainer.optimizer.sensitivities())
    left = trainer.network.budget - sum(f.parameters for f in factors.values())
    assert 0 <= left < max(a.cost for a in trainer.network.adapters)
    return factors


def test_a_person_can_stop_it_while_sizes_are_compared() -> None:
    """What was learned is there, at the target's size."""
    trainer = trainer_of(**GROWING)
    factors = stopped(trainer, lambda progress: not torch.is_grad_enabled())
    assert all(bool(f.up.any()) for f in factors.values() if f.rank)
    with pytest.raises(LoraError, match="no state to resume from"):
        trainer.state()


def test_large_batches_are_compared_in_small_groups_too() -> None:
    """A batch is of one shape; 32 samples are of more than that."""
    trainer = trainer_of(**{**GROWING, "batch_size": 32})
    own, seen = trainer.loss, set[int]()

    def loss(clean: torch.Tensor, *given: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            seen.add(len(clean))
        return own(clean, *given)

    trainer.loss = loss  # type: ignore[method-assign]
    trainer.run()
    assert seen == {BATCH_SIZE}


def test_the_choice_does_not_touch_the_runs_own_order_of_pictures_and_noise() -> None:
    """Both runs see the same samples, before and after the choice."""
    one, other = trainer_of(**{**GROWING, "settle_keep": 1.0}), trainer_of(**GROWING)
    draws = [[], []]
    for trainer, drawn in zip((one, other), draws, strict=True):
        own = trainer.batches.sample

        def draw(own: Any = own, drawn: list[Any] = drawn) -> Any:
            drawn.append(own())
            return drawn[-1]

        trainer.batches.sample = draw  # type: ignore[method-assign]
        trainer.run()
    assert other.network.size() < one.network.size()
    for a, b in zip(itertools.chain(*draws[0]), itertools.chain(*draws[1]), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_where_nothing_was_learned_the_target_is_filled_and_that_is_said() -> None:
    said: list[str] = []
    trainer = trainer_of(**{**GROWING, "learning_rate": 1e-8})
    trainer.notify = said.append
    trainer.loss = lambda clean, noise, sigma, conditioning: torch.ones(()) + 0 * clean.sum() + _sum(trainer.network)  # type: ignore
    trainer.run()
    assert trainer.network.budget - trainer.network.size() < max(a.cost for a in trainer.network.adapters)
    assert [words for words in said if "settle_keep" in words and "target size is used" in words]


def _sum(network: AdaptiveNetwork) -> torch.Tensor:
    return sum((0 * p.sum() for p in network.parameters()), torch.zeros(()))


def test_a_run_that_is_stopped_before_its_last_cut_is_cut_to_the_target() -> None:
    stopped(trainer_of(**GROWING), lambda progress: progress.step == 3)

"""Memory that runs out in the middle of a run: the same step in smaller parts, nothing drawn twice, nothing lost."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_trainer import EVERYTHING, Toy, fail_once, hooks, learned, state, toy_of, trainer_of

import lora2.adapters.layer
import lora2.adapters.network
import lora2.util.memory
from lora2.adapters.prune import final_factors
from lora2.training.cuda_graph import GraphStepRunner
from lora2.training.trainer import Trainer
from lora2.util.memory import OutOfMemory, is_out_of_memory, try_allocating

# Rounding: a batch's mean in one kernel or as a sum over micro-batches differs by 1e-7, and Adam divides gradients near zero
# by their own size. Only without early cuts: after two or three steps, a cut keeps components that are rounding themselves
# (zero singular values), and the first step of Adam moves these by the whole learning rate in a direction set by rounding.
ROUNDING = {"rtol": 1e-4, "atol": 2e-5}

GROWING: dict[str, Any] = {
    "steps": 30, "initial_rank": 4, "target_rank": 12, "rank_weight": 1.0, "rank_learning_rate": 0.2, "settle_at": 0.5,
    "settle_cuts": 1,
}  # fmt: skip
"""Ranks that are pulled up so soon that all arrays grow before they settle."""


def limit(toy: Toy, most: Callable[[], int], held: list[weakref.ref[Tensor]] | None = None) -> list[int]:
    """From now on a forward of more than so many samples runs out of memory; returns every forward's samples as they come.

    held: gets a weak reference to what a failed forward held, both in its own frame and in the graph.
    """
    ordinary, seen = toy.denoise, []

    def denoise(noisy: Tensor, sigma: Tensor, captions: Sequence[int]) -> Tensor:
        seen.append(len(noisy))
        predicted = ordinary(noisy, sigma, captions)
        if len(noisy) > most():
            activation = predicted * 2
            if held is not None:
                held.extend([weakref.ref(activation), weakref.ref(predicted), weakref.ref(noisy)])
            raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB")
        if held is not None:
            assert not [r for r in held if r() is not None], "held through the next attempt"
        return predicted

    toy.denoise = denoise  # type: ignore[method-assign]
    return seen


def close(one: Trainer, other: Trainer) -> None:
    torch.testing.assert_close(one.progress.losses, other.progress.losses, **ROUNDING)
    assert one.progress.ranks == other.progress.ranks
    for name, factors in final_factors(one.network)[0].items():
        torch.testing.assert_close(factors.delta(), final_factors(other.network)[0][name].delta(), **ROUNDING)


@pytest.mark.parametrize(("most", "groups"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_the_batch_is_split_and_stays_the_same_batch(most: int, groups: int) -> None:
    """Halved down to what fits; the run ends as one that had the memory, to rounding."""
    words: list[str] = []
    plain, poor = (trainer_of(batch_size=6, steps=8, settle_at=1.0, **EVERYTHING) for _ in range(2))
    for trainer in (plain, poor):
        toy_of(trainer).groups = groups
    poor.recovery.notify = words.append
    plain.run()
    seen = limit(toy_of(poor), lambda: most)
    poor.run()
    close(plain, poor)
    assert max(seen[-8 * 2 * groups :]) <= most
    assert poor.progress.step == 8
    assert [w.split(":")[0] for w in words] == ["Memory ran out at step 1"] * len(poor.progress.changes)
    assert poor.progress.changes[0].startswith("3 of a batch's pictures at a time, not 6" if groups == 1 else "")
    assert torch.equal(plain.batches.generator.get_state(), poor.batches.generator.get_state()), "drawn once"
    assert torch.equal(plain.batches.buckets.generator.get_state(), poor.batches.buckets.generator.get_state())
    assert hooks(toy_of(poor)) == 0


@pytest.mark.parametrize(
    ("at", "compute"), [(1, torch.float32), (5, torch.float32), (5, torch.bfloat16), (7, torch.float32)]
)
def test_it_goes_on_at_the_step_where_it_happened(at: int, compute: torch.dtype) -> None:
    """Before settling, right after it, later; and what the run saved memory with first is asked for first.

    Nothing but a repetition: bit for bit the run that never failed.
    """
    plain, poor = (trainer_of(steps=9, settle_at=0.5, accumulation=2, compute=compute) for _ in range(2))
    toy, words = toy_of(poor), []
    toy.savings, poor.recovery.notify = ["gradient checkpointing is on"], words.append
    failures = iter([True])
    limit(toy, lambda: 0 if poor.progress.step == at - 1 and toy.forwards % 2 == 0 and next(failures, False) else 99)
    plain.run()
    poor.run()
    assert poor.progress.losses == plain.progress.losses
    assert all(torch.equal(a, b) for a, b in zip(learned(plain), learned(poor), strict=True))
    assert words == [f"Memory ran out at step {at}: gradient checkpointing is on, and the step is repeated."]
    assert poor.progress.changes == ["gradient checkpointing is on"]


def test_what_the_failed_attempt_held_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """By weak references to its tensors, without the help of the collector of cycles, and with entropy listening."""
    monkeypatch.setattr(lora2.util.memory.gc, "collect", lambda: 0)
    trainer, held = trainer_of(batch_size=4, steps=3, **EVERYTHING), []
    limit(toy_of(trainer), lambda: 1, held)
    trainer.run()
    assert len(held) == 2 * 3


def test_a_backward_that_runs_out_is_made_again_too() -> None:
    """Half of the gradients were there already."""
    plain, poor = (trainer_of(batch_size=4, steps=6, accumulation=2, settle_at=1.0) for _ in range(2))
    toy = toy_of(poor)
    ordinary = toy.denoise

    def fail(gradient: Tensor) -> Tensor:
        if len(gradient) > 2:
            raise torch.OutOfMemoryError("in the backward pass")
        return gradient

    def denoise(*given: Any) -> Tensor:
        predicted = ordinary(*given)
        predicted.register_hook(fail)
        return predicted

    toy.denoise = denoise  # type: ignore[method-assign]
    plain.run()
    poor.run()
    close(plain, poor)


def test_nothing_left_to_change_stops_with_one_message_and_keeps_what_was_learned() -> None:
    trainer = trainer_of(batch_size=2, steps=9)
    toy, kept = toy_of(trainer), []
    toy.savings = ["gradient checkpointing is on"]
    limit(toy, lambda: 0 if trainer.progress.step == 5 else 99)
    with pytest.raises(OutOfMemory) as error:
        trainer.run(lambda _: kept.append(state(trainer)))
    assert str(error.value) == (
        "Memory ran out at step 6. Train on smaller pictures, adapt fewer layers, lower initial_rank, or turn checkpointing on "
        "if it is off (already changed: gradient checkpointing is on; 1 of a batch's pictures at a time, not 2)."
    )
    assert error.value.__context__ is None, "a chain of errors would hold their tensors"
    assert trainer.progress.step == 5
    assert all(torch.equal(a, b) for a, b in zip(state(trainer), kept[-1], strict=True))
    assert hooks(toy) == 0


def test_stop_means_stop() -> None:
    trainer = trainer_of(batch_size=2, on_out_of_memory="stop")
    toy_of(trainer).savings = ["gradient checkpointing is on"]
    seen = limit(toy_of(trainer), lambda: 0)
    with pytest.raises(OutOfMemory, match=r"^Memory ran out at step 1\. Turn checkpointing on, lower batch_size"):
        trainer.run()
    assert seen == [2]


@functools.cache
def parameters_with_enough_memory(compute: torch.dtype) -> list[Tensor]:
    """The factors after an unbroken run."""
    trainer = trainer_of(compute=compute, **GROWING)
    trainer.run()
    return [p.detach() for p in trainer.network.parameters()]


@pytest.mark.parametrize(("owner", "name", "at"), [
    ("Adapter", "resize", 2), ("AdaptiveNetwork", "rebuild", 1), ("AdaptiveNetwork", "rebuild", 2), ("Adapter", "load", 3),
    ("Adapter", "rotate", 1), ("Adapter", "rotate", 3),
])  # fmt: skip
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_arrays_that_find_no_room_to_grow_or_settle_are_tried_again(
    owner: str, name: str, at: int, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of all layers; the run ends well, with as many positions as ranks, and a finite loss.

    Settled layers are those of a run with room enough, bit for bit: all of them are mixed, and none twice, which would undo it.
    """
    expected = parameters_with_enough_memory(compute)
    trainer = trainer_of(compute=compute, **GROWING)
    module = lora2.adapters.layer if owner == "Adapter" else lora2.adapters.network
    calls = fail_once(monkeypatch, getattr(module, owner), name, at)
    progress = trainer.run()
    assert len(calls) > at
    assert progress.step == 30
    assert progress.cuts == [15]
    network = trainer.network
    assert network.built_capacities == network.capacities
    assert network.size() <= network.budget
    assert progress.changes == []
    if name in ("load", "rotate"):
        for one, other in zip(network.parameters(), expected, strict=True):
            assert torch.equal(one, other)


def test_arrays_that_find_no_room_stay_as_they_are_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer has grown, the others have not: their ranks wait at the arrays that they have."""
    trainer = trainer_of(**GROWING)
    ordinary, calls = lora2.adapters.layer.Adapter.resize, []

    def resize(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) >= 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return ordinary(*args, **kwargs)

    held = []
    monkeypatch.setattr(lora2.adapters.layer.Adapter, "resize", resize)
    trainer.run(lambda progress: held.append(sorted({a.capacity for a in trainer.network.adapters})))
    assert len(calls) >= 2
    assert [8, 16] in held
    assert trainer.progress.step == 30
    assert all(torch.isfinite(torch.tensor(trainer.progress.losses)))
    assert trainer.network.size() <= trainer.network.budget


def test_layers_that_never_find_room_to_settle_end_the_run_and_all_is_still_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was learned by the layers that were changed and by those that were not."""
    trainer, whole = (trainer_of(**GROWING) for _ in range(2))
    ordinary, calls = lora2.adapters.layer.Adapter.load, []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) >= 3:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return ordinary(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lora2.adapters.layer.Adapter, "load", function)
        with pytest.raises(OutOfMemory, match="Memory ran out at step"):
            trainer.run()
    done = trainer.progress.step

    class Stop(BaseException):
        pass

    def stop(progress: Any) -> None:
        if progress.step == done:
            raise Stop

    with pytest.raises(Stop):
        whole.run(stop)
    # The same moment: after the arrays followed the ranks, before they settled.
    whole.network.sync_capacities()
    for name_, factors in final_factors(trainer.network)[0].items():
        torch.testing.assert_close(factors.delta(), final_factors(whole.network)[0][name_].delta())


def test_a_step_that_is_half_taken_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors have moved, ranks have not: twice would be wrong, so it stops."""
    trainer = trainer_of(rank_hold=0.0, settle_at=1.0)
    optimizer = trainer.optimizer
    ordinary = optimizer._update

    def move(inner: Any, *more: Any) -> None:
        if inner is optimizer.theta and trainer.progress.step == 3:
            raise torch.OutOfMemoryError("2 bytes")
        ordinary(inner, *more)

    monkeypatch.setattr(optimizer, "_update", move)
    with pytest.raises(OutOfMemory, match="at step 4"):
        trainer.run()
    assert trainer.progress.step == 3


def test_factors_are_read_on_the_cpu_where_the_device_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(steps=4, settle_at=1.0)
    trainer.run()
    expected, calls = learned(trainer), fail_once(monkeypatch, trainer.network.adapters[0], "factors", 1)
    assert all(torch.equal(a, b) for a, b in zip(learned(trainer), expected, strict=True))
    assert calls == [1, 2]


class _Graph:
    """A recording that finds no memory: what torch.cuda.graph is to the engine, on a machine without CUDA."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    def __exit__(self, *_: object) -> None: ...


class _Spoiled(_Graph):
    """One that ends with another error, as a recording that was broken off may."""

    def __enter__(self) -> None:
        try:
            super().__enter__()
        except torch.OutOfMemoryError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904


@pytest.mark.parametrize("graph", [_Graph, _Spoiled])
def test_no_memory_to_record_a_step_is_not_a_step_that_cannot_be_recorded(
    graph: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is handled like any other: first saved elsewhere, and only at the end is recording given up."""
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1), raising=False)
    plain, trainer = (trainer_of(steps=9, batch_size=2, settle_at=1.0) for _ in range(2))
    runner = trainer.runner = trainer.recovery.runner = GraphStepRunner(trainer.network, trainer.runner.loss)
    toy_of(trainer).savings = ["gradient checkpointing is on"]
    seen: list[bool] = []
    trainer.recovery.notify = lambda _: seen.append(runner.disabled)
    trainer.run()
    plain.run()
    assert [c.split(",")[0] for c in trainer.progress.changes] == [
        "gradient checkpointing is on", "1 of a batch's pictures at a time", "steps run without CUDA graphs",
    ]  # fmt: skip
    assert seen == [False, False, True]
    close(plain, trainer)


def test_what_counts_as_memory_that_ran_out() -> None:
    yes = [
        torch.OutOfMemoryError("x"), MemoryError(), OutOfMemory("x"), RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ]  # fmt: skip
    no = [RuntimeError("mat1 and mat2"), KeyboardInterrupt(), ValueError("out of memory"), OSError(28, "No space left")]
    assert [is_out_of_memory(e) for e in (*yes, *no)] == [True] * len(yes) + [False] * len(no)
    with pytest.raises(ValueError, match="x"):
        try_allocating(lambda: int("x"))


def test_an_error_while_memory_ran_out_counts_too() -> None:
    """A CUDA graph whose recording runs out of memory ends with an error of its own."""

    def record(first: Exception) -> None:
        try:
            raise first
        finally:
            raise RuntimeError("capture was invalidated")

    with pytest.raises(RuntimeError, match="capture") as error:
        record(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(error.value)
    with pytest.raises(RuntimeError, match="capture") as error:
        record(ValueError("x"))
    assert not is_out_of_memory(error.value)


def test_the_computer_s_own_message_is_recognised() -> None:
    """What torch really says on this machine, for an allocation that no machine can make."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)

"""Training states: a resumed run is the uninterrupted run bit for bit, and a corrupted state is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_trainer import (
    GROWING,
    MOST,
    RICH,
    SHRINKING,
    Stopped,
    kept,
    learned,
    made,
    same,
    state,
    stopped,
    toy_of,
    trainer_of,
)

from lora2.checkpoints.network_state import restore, state_of
from lora2.checkpoints.rules import compare_configs, config_from
from lora2.checkpoints.state import KEY, State, read_facts, read_state
from lora2.config import TrainingConfig
from lora2.files.writer import write_new
from lora2.training.monitor import Diverged
from lora2.training.progress import Progress
from lora2.training.trainer import Trainer
from lora2.util.errors import LoraError


def resumed(found: State, until: int | None = None, **changes: Any) -> Trainer:
    """A new trainer that resumes a state and runs to its end, or is cancelled after `until` steps."""
    trainer = made(**changes)
    trainer.restore(found)
    if until is None or until == trainer.config.steps:
        trainer.run()
        return trainer
    return stopped(trainer, until)


def states_of(**changes: Any) -> tuple[Trainer, dict[int, State]]:
    """An uninterrupted run, and its states by step; the last one after the end."""
    trainer, states = made(**changes), {}
    trainer.run(None, lambda: states.setdefault(trainer.progress.step, trainer.state()), 1)
    return trainer, {**states, trainer.progress.step: trainer.state()}


def assert_same_state(one: State, other: State) -> None:
    """Every tensor bit for bit, every fact except the seconds."""
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name
    facts = [json.loads(json.dumps(state.facts)) for state in (one, other)]
    for table in facts:
        del table["run"]["seconds"]
    assert facts[0] == facts[1]


def outcome(trainer: Trainer) -> list[Any]:
    progress = trainer.progress
    return [progress.losses, progress.cuts, progress.pruned, progress.ranks, progress.step]


def assert_same_run(one: Trainer, other: Trainer) -> None:
    """Everything that was trained, bit for bit, and how it went."""
    assert same(state(one), state(other))
    assert same(learned(one), learned(other))
    assert outcome(one) == outcome(other)


# -- exactness -----------------------------------------------------------------------------------------------------


FORMS: dict[str, dict[str, Any]] = {
    "settling": {**RICH},
    "settling, growing": {**GROWING, "weight_decay": 0.01, "settle_at": 0.6, "settle_cuts": 1},
    "settling, shrinking": {**SHRINKING, "settle_at": 0.6, "settle_cuts": 1},
    "settling, less than the target": {"settle_at": 0.8, "settle_cuts": 2, "settle_keep": 0.7},
    "pure": {**RICH, "settle_at": 1.0},
    "pure, growing": {**GROWING, "settle_at": 1.0, "schedule": "constant"},
    "pure, shrinking": {**SHRINKING, "settle_at": 1.0, "schedule": "constant"},
    "budget": {"settle_at": 1.0, "budget_mb": 0.002, "rank_learning_rate": 0.1},
    "settled at once": {"settle_at": 0.0},
    "sgd": {**RICH, "optimizer": "sgd"},
    "adam, constant, unclipped": {"optimizer": "adam", "schedule": "constant", "clip_norm": 0.0},
    "half precision": {**RICH, "compute": torch.bfloat16},
    "half precision, pure, growing": {**GROWING, "compute": torch.bfloat16, "settle_at": 1.0},
}


STOPS = (1, 3, 7, 8, 9, 10, 14)
"""Before and after a sync, just before a cut, just after it, near the end."""


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_is_the_uninterrupted_run(form: str, tmp_path: Path) -> None:
    """From every stop to the next, each by a trainer of its own: the same state as without a stop, and in the end the same run."""
    changes = {"steps": 16, **FORMS[form]}
    uninterrupted, states = states_of(**changes)
    assert list(states) == list(range(1, 17))
    for step, following in pairwise([*(range(1, 16) if form == "settling" else STOPS), 16]):
        trainer = resumed(kept(states[step], tmp_path), following, **changes)
        assert_same_state(trainer.state(), states[following])
    assert_same_run(trainer, uninterrupted)


@pytest.mark.parametrize("form", [form for form in FORMS if "growing" in form or "shrinking" in form])
def test_ranks_do_leave_their_arrays_in_these_tests(form: str) -> None:
    """Else the test above would not show that arrays which grew or shrank come back."""
    trainer = made(steps=16, **{**FORMS[form], "settle_at": 1.0})
    capacities: list[int] = []
    trainer.run(lambda _: capacities.append(sum(a.capacity for a in trainer.network.adapters)))
    assert len(set(capacities)) > 1
    assert (max(capacities) > capacities[0]) == ("growing" in form)
    assert min(capacities[1:]) < max(capacities)


@pytest.mark.parametrize("form", ["settling, growing", "budget", "half precision"])
def test_taking_states_changes_nothing(form: str) -> None:
    plain, watched = made(**FORMS[form]), made(**FORMS[form])
    plain.run()
    steps: list[int] = []
    watched.run(None, lambda: steps.append(watched.state().part("run").facts["step"]), 2)
    assert steps == [2, 4, 6, 8, 10], "not after the last step: that one is asked for when the file is written"
    assert_same_run(watched, plain)


def test_every_tensor_of_a_state_matters() -> None:
    """Another value in any of them gives another run, or is refused: nothing is stored that is not used, or used by chance."""
    changes = {"steps": 16, **GROWING, "budget_mb": 0.015, "settle_at": 1.0, "accumulation": 2}
    found = stopped(made(**changes), 8).state()
    expected: dict[int, tuple[list[Tensor], list[Any]]] = {}

    def seen(trainer: Trainer) -> tuple[list[Tensor], list[Any]]:
        return state(trainer), outcome(trainer)

    trainer = made(**changes)
    trainer.restore(found)
    trainer.run(lambda progress: expected.update({progress.step: seen(trainer)}))

    def compare(progress: Progress) -> None:
        tensors, values = seen(other)
        if not same(tensors, expected[progress.step][0]) or values != expected[progress.step][1]:
            raise Stopped

    for name, tensor in found.tensors.items():
        changed = State(found.tensors, found.facts)
        if tensor.dtype == torch.uint8:
            changed.tensors[name] = torch.Generator().manual_seed(77).get_state()
        elif name == "network.peak":
            changed.tensors[name] = torch.tensor([float(len(found.tensors[f"network.{i}.up"])) for i in range(5)])
        else:
            changed.tensors[name] = tensor + 1
        other = made(**changes)
        other.restore(changed)
        try:
            other.run(compare)
        except Stopped:
            continue
        pytest.fail(f"{name} does not matter")


def test_a_finished_run_resumed_with_more_steps_is_the_longer_run() -> None:
    """A finished run of 12 steps, asked for 16: the sync that its last step left out is made up for."""
    changes = {
        **GROWING,
        "settle_at": 1.0,
        "schedule": "constant",
        "warmup": 0.0,
        "rank_learning_rate": 0.1,
        "rank_rest": 0.0,
    }
    short = made(steps=12, **changes)
    short.run()
    whole = made(steps=16, **changes)
    whole.run()
    assert_same_run(resumed(short.state(), steps=16, **changes), whole)


@pytest.mark.parametrize(
    ("cuts", "step", "steps", "expected"),
    [
        (1, 4, 12, [6]), (1, 4, 20, [10]), (1, 8, 20, [6]), (1, 11, 200, [6]), (1, 5, 8, [5]),
        (3, 3, 12, [2, 4, 6]), (3, 3, 24, [2, 4, 8, 12]), (3, 5, 24, [2, 4, 8, 12]), (3, 7, 200, [2, 4, 6]), (3, 5, 8, [2, 4, 5]),
    ],
)  # fmt: skip
def test_cuts_follow_the_new_number_of_steps(cuts: int, step: int, steps: int, expected: list[int]) -> None:
    """By the new total; at once where the moment has passed; not again where the target was met."""
    told = {"settle_at": 0.5, "settle_cuts": cuts}
    found = stopped(trainer_of(steps=12, **told), step).state()
    trainer = trainer_of(steps=steps, **told)
    trainer.restore(found)
    until = min(steps, expected[-1] + 4)
    trainer = stopped(trainer, until) if until > trainer.progress.step else trainer
    assert trainer.progress.cuts == expected
    assert trainer.progress.phase == "pruned"
    assert trainer.network.size() <= trainer.network.budget


def test_a_finished_run_is_not_resumed_without_more_steps() -> None:
    trainer = trainer_of(steps=3)
    trainer.run()
    with pytest.raises(LoraError, match=r"3 steps behind it already. To continue, set steps above 3"):
        trainer_of(steps=3).restore(trainer.state())


# -- after trouble ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [2, 5, 11], ids=["first part", "second part", "after settling"])
def test_an_error_in_a_step_leaves_the_state_before_it(call: int) -> None:
    """The batch of the broken step had been drawn already: it is drawn again."""
    whole = trainer_of(**RICH)
    whole.run()
    trainer = trainer_of(**RICH)
    toy, calls = toy_of(trainer), iter(range(1, 1000))
    real = toy.denoise

    def denoise(*given: Any) -> Tensor:
        if next(calls) == call * 2:
            raise RuntimeError("no")
        return real(*given)

    toy.denoise = denoise  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no"):
        trainer.run()
    assert trainer.progress.step == call - 1
    assert_same_run(resumed(trainer.state(), **RICH), whole)


def test_a_loss_that_is_not_finite_leaves_the_state_before_its_step() -> None:
    whole = trainer_of()
    whole.run()
    trainer = trainer_of()
    toy = toy_of(trainer)
    real = toy.denoise
    toy.denoise = lambda *given: real(*given) * (float("nan") if toy.forwards == 4 else 1.0)  # type: ignore[method-assign]
    with pytest.raises(Diverged):
        trainer.run()
    assert_same_run(resumed(trainer.state()), whole)


@pytest.mark.parametrize("where", ["sync", "settle", "update"])
def test_an_error_while_factors_are_resized_leaves_no_state(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made(**GROWING)

    def fail(*_: Any, **__: Any) -> None:
        raise ArithmeticError

    part = {"sync": trainer.network, "settle": trainer.network.adapters[2], "update": trainer.network}[where]
    name = {"sync": "rebuild", "settle": "load", "update": "clear_gradients"}[where]
    with monkeypatch.context() as patch:
        patch.setattr(part, name, fail)
        with pytest.raises(ArithmeticError):
            trainer.run()
    with pytest.raises(LoraError, match="came while the factors were changing"):
        trainer.state()


# -- damaged and hostile files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> State:
    """A state before settling, with everything in it."""
    return stopped(trainer_of(**RICH, settle_cuts=1), 4).state()


def test_each_tensor_is_needed_and_checked(sound: State) -> None:
    """Missing, of another shape, of another type, or not finite: our error each time."""
    for name, tensor in sound.tensors.items():
        wrong: list[Tensor | None] = [None, tensor[None], torch.cat([tensor.reshape(-1)] * 2), tensor.to(torch.int16)]
        if tensor.is_floating_point() and name != "run.losses":
            wrong += [tensor * float("nan"), tensor * 0 + float("inf")]
        for value in wrong:
            broken = State(sound.tensors, sound.facts)
            if value is None:
                del broken.tensors[name]
            else:
                broken.tensors[name] = value
            with pytest.raises(LoraError, match="training state"):
                trainer_of(**RICH).restore(broken)


NONSENSE = [None, "x", -1, 1e300, True, [], {}, [[]], 10**400, "x" * 500]


def test_each_fact_is_needed_and_checked(sound: State) -> None:
    """Nonsense in the place of any of them is refused in our words, or was a value that may stand there."""

    def leaves(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for name, value in table.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, (*path, name))
            else:
                yield (*path, name)

    refused = 0
    paths = [path for path in leaves(sound.facts) if path[0] != "config"]
    assert len(paths) > 10
    for path in paths:
        for value in NONSENSE:
            facts = json.loads(json.dumps(sound.facts))
            table = facts
            for name in path[:-1]:
                table = table[name]
            table[path[-1]] = value
            trainer = trainer_of(**RICH)
            try:
                trainer.restore(State(sound.tensors, facts))
            except LoraError:
                refused += 1
                continue
            trainer.run()
    assert refused > 8 * len(paths)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network.0.down", torch.ones(12, 4, 3, 3)),
        ("network.0.down", torch.ones(0, 4, 3, 3)),
        ("network.1.up", torch.ones(1600, 16)),
        ("network.peak", torch.full((5,), 1e6)),
        ("network.multiplier", torch.tensor(0.0)),
        ("network.generator", torch.zeros(5056, dtype=torch.uint8)),
        ("optimizer.factors.0.exp_avg_sq", -torch.ones(16, 4, 3, 3)),
    ],
    ids=["uneven", "empty", "too many", "peak", "multiplier", "generator", "variance"],
)
def test_values_that_would_crash_a_gpu_are_refused(name: str, value: Tensor, sound: State) -> None:
    """Arrays of 12 positions would be read past their end on a GPU."""
    broken = State(sound.tensors, sound.facts)
    broken.tensors[name] = value
    if name.startswith(("network.0", "network.1")):
        index = name.split(".")[1]
        for other in ("down", "up"):
            old = sound.tensors[f"network.{index}.{other}"]
            broken.tensors[f"network.{index}.{other}"] = torch.ones(len(value), *old.shape[1:])
    with pytest.raises(LoraError, match="training state is corrupted"):
        trainer_of(**RICH).restore(broken)


def test_a_generator_that_would_be_read_past_its_end_is_refused(sound: State) -> None:
    """PyTorch checks each counter but not that they belong together."""
    for left, following in ((600, 600), (624, 624), (624, 0), (2, 0), (1, 1)):
        words = sound.tensors["network.generator"].clone()
        words[8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
        words[16:24] = torch.tensor([following]).view(torch.uint8)
        broken = State(sound.tensors, sound.facts)
        broken.tensors["network.generator"] = words
        with pytest.raises(LoraError, match="no state of a random generator"):
            trainer_of(**RICH).restore(broken)


def test_a_used_generator_is_restored() -> None:
    """Every number of words that can have been used."""
    for used in (0, 1, 2, 311, 623, 624, 625, 1248):
        trainer, other = trainer_of(steps=3), trainer_of(steps=3)
        trainer.run(None, None)
        torch.rand(used, generator=trainer.network.generator)
        found = state_of(trainer.network)
        restore(other.network, found)
        one, two = (torch.rand(2000, generator=t.network.generator) for t in (trainer, other))
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ("", "corrupted"),
        ("[]", "no format"),
        ('{"format": true}', "no format"),
        ('{"format": 4}', "has format 4, this version of LoRA² knows 3"),
        ('{"format": 2}', "has format 2, this version of LoRA² knows 3"),
        ('{"format": 3, "x": NaN}', "holds NaN"),
        ('{"format": 3, "x": 1e999}', "not finite"),
        ('{"format": 3, "x": ' + "[" * 9 + "]" * 9 + "}", "nested more than"),
        ("[" * 100_000, "corrupted"),
        ('{"format": 3, "x": "' + "y" * (12 << 20) + '"}', "the most that is read"),
    ],
    ids=["empty", "list", "flag", "newer", "older", "NaN", "infinity", "deep", "very deep", "long"],
)
def test_facts_that_cannot_be_read_are_refused(facts: str, words: str, tmp_path: Path) -> None:
    path = write_new(tmp_path, "state", {"x": torch.zeros(1)}, {KEY: facts})
    with pytest.raises(LoraError, match=words):
        read_facts(path)


def test_other_files_and_files_that_are_too_large_are_refused(tmp_path: Path, sound: State) -> None:
    with pytest.raises(LoraError, match="is not a training state"):
        read_facts(write_new(tmp_path, "lora", {"x": torch.zeros(1)}, {}))
    with pytest.raises(LoraError, match="a state of these layers has at most 1000"):
        read_state(write_new(tmp_path, "state", sound.tensors, sound.metadata()), 1000)
    with pytest.raises(LoraError, match="does not exist"):
        read_facts(tmp_path / "gone.safetensors")


def test_random_bytes_in_a_file_are_refused_or_harmless(tmp_path: Path, sound: State) -> None:
    """200 seeded mutations of the file: each is read as some state, or refused in our words."""
    chance = random.Random(5)
    whole = write_new(tmp_path, "state", sound.tensors, sound.metadata()).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "broken.safetensors"
    refused = 0
    for round_ in range(200):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3, 30))):
            # Half of them in the facts and the layout, where they can do harm.
            data[chance.randrange(header if round_ % 2 else len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.randrange(len(data))] if round_ % 10 == 0 else data)
        try:
            trainer_of(**RICH).restore(read_state(path, MOST))
        except LoraError:
            refused += 1
    assert refused > 75


def test_a_state_of_other_layers_is_refused(sound: State) -> None:
    trainer = trainer_of(**RICH)
    trainer.network.names[1] = "other"
    with pytest.raises(LoraError, match="is of other layers"):
        trainer.restore(sound)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_come_back_from_facts(sound: State) -> None:
    assert config_from(json.loads(sound.metadata()[KEY])) == trainer_of(**RICH, settle_cuts=1).config
    for config in ({"steps": 3, "novelty": 1}, None, []):
        with pytest.raises(LoraError, match="does not know"):
            config_from({"config": config})
    with pytest.raises(LoraError, match="must be a whole number"):
        config_from({"config": {"steps": "many"}})


Change = tuple[dict[str, Any], bool, str]
CHANGES: dict[str, Change] = {
    "nothing": ({}, False, ""),
    "steps": ({"steps": 900}, False, ""),
    "rate": ({"learning_rate": 1e-4}, False, "changed: learning_rate is 0.0001, it was 0.0003"),
    "batch": ({"batch_size": 4, "accumulation": 2}, True, "changed: batch_size is 4, it was 1"),
    "seed": ({"seed": 5}, False, "changed: seed is 5, it was 0: it only acts at the start"),
    "initial": ({"initial_rank": 5}, False, "changed: initial_rank is 5"),
    "adam": ({"optimizer": "adam"}, False, "changed: optimizer is adam"),
    "sgd": ({"optimizer": "sgd"}, False, "wrong: optimizer is sgd, it was adamw"),
    "q": ({"q": 0.8}, False, "wrong: q is 0.8"),
    "q settled": ({"q": 0.8}, True, "changed: q is 0.8"),
    "target": ({"target_rank": 4}, False, "changed: target_rank is 4"),
    "target settled": ({"target_rank": 4}, True, "wrong: target_rank is 4, it was 8"),
    "budget settled": ({"budget_mb": 4.0}, True, "wrong: budget_mb is 4.0"),
    "settle later": ({"settle_at": 0.7}, True, "changed: settle_at is 0.7, it was 0.45: layers that were cut stay cut"),
    "never settle": ({"settle_at": 1.0}, True, "wrong: settle_at is 1.0"),
    "never settle, in time": ({"settle_at": 1.0}, False, "changed: settle_at is 1.0"),
    "type": ({"bytes_per_parameter": 4}, True, ""),
    "header": ({"file_overhead": 4}, True, ""),
}


@pytest.mark.parametrize("case", CHANGES)
def test_which_settings_may_change(case: str) -> None:
    changes, settled, words = CHANGES[case]
    wrong, changed = compare_configs(TrainingConfig(**changes), TrainingConfig(), settled)
    said = [f"wrong: {w}" for w in wrong] + [f"changed: {c}" for c in changed]
    assert (said[0].startswith(words) and len(said) == len(changes)) if words else not said


def test_the_number_type_is_part_of_a_size_in_mb() -> None:
    old, new = TrainingConfig(budget_mb=3.0), TrainingConfig(budget_mb=3.0, bytes_per_parameter=4)
    assert "save_dtype" in compare_configs(new, old, True)[0][0]
    assert "save_dtype" in compare_configs(new, old, False)[1][0]


@pytest.mark.parametrize("name", ["rank_weight", "rank_learning_rate", "rank_hold", "rank_rest"])
def test_rank_settings_have_no_effect_once_ranks_are_final(name: str) -> None:
    """Settled or at rest; before that it acts."""
    for settled, rested in ((True, False), (False, True), (False, False)):
        old = TrainingConfig(settle_at=0.5 if settled else 1.0)
        wrong, (words,) = compare_configs(replace(old, **{name: 0.125}), old, settled, rested)
        assert wrong == []
        assert words.startswith(f"{name} is 0.125, it was ")
        assert words.endswith("do not change any more, so it has no effect now") == (settled or rested)


def test_size_settings_are_refused_once_ranks_rest_unless_layers_are_pruned() -> None:
    old = TrainingConfig(settle_at=1.0)
    new = replace(old, target_rank=4)
    assert compare_configs(new, old, False, True) == (["target_rank is 4, it was 8"], [])
    assert compare_configs(new, old, False, False) == ([], ["target_rank is 4, it was 8"])
    settling = compare_configs(replace(new, settle_at=0.5), old, False, True)
    assert settling == ([], ["target_rank is 4, it was 8", "settle_at is 0.5, it was 1.0"])


def test_a_new_learning_rate_acts_from_the_next_step_on() -> None:
    """Moments and everything else stay; the new rate acts from the next step on."""
    found = stopped(trainer_of(optimizer="sgd"), 8).state()
    slow, fast = (trainer_of(optimizer="sgd", learning_rate=rate) for rate in (1e-8, 1e-2))
    for trainer in (slow, fast):
        trainer.restore(found)
        before = learned(trainer)
        stopped(trainer, 9)
        moved = max(
            float((a - b).abs().max()) for a, b in zip(before, learned(trainer), strict=True) if a.shape == b.shape
        )
        assert (moved < 1e-5) == (trainer is slow)


def test_a_changed_bit_in_the_data_is_noticed(tmp_path: Path) -> None:
    """One bit in the data: still a state by its header, but not the one that was written."""
    found = stopped(made(steps=12), 4).state()
    path = write_new(tmp_path, "state", found.tensors, found.metadata())
    assert read_state(path, MOST).facts["digest"]
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(LoraError, match="its tensors do not match their digest"):
        read_state(path, MOST)

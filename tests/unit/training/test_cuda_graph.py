"""Recorded steps without a GPU: GraphStepRunner with tapes for graphs (cuda_graph_tapes.py) equals eager steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cuda_graph_tapes import TapeStepRunner, recordable
from torch import Tensor, nn
from toy_trainer import EVERYTHING, Stop, Toy, latents, learned, same, told

from lora2.adapters.layer import Adapter
from lora2.adapters.network import AdaptiveNetwork
from lora2.training.denoiser import EMPTY_CAPTION
from lora2.training.progress import Progress
from lora2.training.trainer import Trainer

STEPS = 40


@pytest.fixture(autouse=True)
def _as_where_steps_are_recorded() -> Iterator[None]:
    with recordable():
        yield


class Static(Toy):
    """The toy with its captions as tensors, as a host gives them, and wide enough for arrays that shrink."""

    def __init__(self, pictures: int) -> None:
        super().__init__(pictures=pictures)
        self.into, self.out = nn.Conv2d(4, 48, 3, padding=1), nn.Conv2d(48, 4, 3, padding=1)
        self.to_q, self.to_k, self.to_v = nn.Linear(48, 48), nn.Linear(12, 48), nn.Linear(12, 48)
        generator = torch.Generator().manual_seed(11)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)
        self.requires_grad_(False)

    def conditions(self, captions: Sequence[int], shape: torch.Size) -> list[tuple[list[int], Any]]:
        words = self.words[torch.tensor([len(self.words) - 1 if c == EMPTY_CAPTION else c for c in captions])]
        return [(list(range(len(captions))), {"text": words, "kind": ["plain"]})]

    def denoise(self, noisy: Tensor, sigma: Tensor, given: Any) -> Tensor:
        text = given["text"].to(self.into.weight.dtype)
        at = sigma.view(-1, 1, 1, 1)
        hidden = torch.tanh(self.into((noisy / (1 + at)).to(text.dtype)))
        q = self.to_q(hidden.flatten(2).transpose(1, 2))
        attention = torch.softmax(q @ self.to_k(text).transpose(1, 2) / 4, -1) @ self.to_v(text)
        hidden = hidden + attention.transpose(1, 2).reshape(hidden.shape)
        return noisy - at * self.out(hidden).float()


def trainer_of(recorded: bool, compute: torch.dtype, pictures: list[Tensor], **changes: Any) -> Trainer:
    config = told(**{"steps": STEPS, "settle_at": 1.0, "sync_every": 4, **changes})
    toy = Static(pictures=len(pictures)).to(compute)
    network = AdaptiveNetwork(toy.layers(), config, compute=compute)
    trainer = Trainer(network, toy, pictures, config, toy.probe())
    if recorded:
        trainer.runner = trainer.recovery.runner = TapeStepRunner(trainer)
    return trainer


SHAPES = latents()
ONE = [p for p in SHAPES if p.shape == SHAPES[0].shape]
CASES: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "ranks grow": (ONE, {"initial_rank": 4, "target_rank": 40, "rank_weight": 3.0}),
    "ranks fall": (ONE, {"initial_rank": 48, "target_rank": 2, "rank_weight": 3.0}),
    "settled half-way": (ONE, {"settle_at": 0.5}),
    "buckets": (SHAPES, {"settle_at": 0.5, "steps": 48}),
    "ranks fall in buckets": (SHAPES, {"initial_rank": 48, "target_rank": 2, "rank_weight": 3.0, "steps": 48}),
    "everything": (SHAPES, {**EVERYTHING, "settle_at": 0.5}),
    "gradient descent": (ONE, {"optimizer": "sgd", "settle_at": 0.5}),
    "ranks held, then moving": (ONE, {"rank_hold": 0.5, "schedule": "cosine"}),
}
types = pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=lambda v: str(v).removeprefix("torch."))


def pair(compute: torch.dtype, case: str) -> tuple[Trainer, Trainer]:
    pictures, changes = CASES[case]
    one, other = (trainer_of(recorded, compute, pictures, **changes) for recorded in (True, False))
    return one, other


def tapes(trainer: Trainer) -> TapeStepRunner:
    assert isinstance(trainer.runner, TapeStepRunner)
    return trainer.runner


def alike(one: Trainer, other: Trainer) -> None:
    """Bit for bit: a tape runs the very same operations."""
    assert one.progress.losses == other.progress.losses
    assert one.progress.ranks == other.progress.ranks
    assert torch.equal(one.network.theta, other.network.theta)
    assert same(learned(one), learned(other))


@pytest.mark.parametrize(
    ("case", "compute"),
    [(case, torch.bfloat16) for case in CASES]
    + [(case, torch.float32) for case in ("ranks grow", "ranks fall", "everything")],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_recorded_steps_are_the_written_steps(case: str, compute: torch.dtype, resizes: list[bool]) -> None:
    recorded, written = pair(compute, case)
    recorded.run()
    assert any(resizes) or "ranks" not in case or "held" in case
    written.run()
    alike(recorded, written)
    runner = tapes(recorded)
    assert not runner.refused
    assert runner.recorded >= (4 if "settled" in case or "grow" in case or "fall" in case else 2)
    assert runner.replayed > recorded.config.steps, "most steps, and their updates"


@pytest.mark.parametrize(
    ("case", "compute"), [("ranks fall in buckets", torch.bfloat16), ("everything", torch.float32)]
)
def test_cancelled_and_gone_on_with(case: str, compute: torch.dtype) -> None:
    """Before, at and after a recording, and in settled steps."""
    recorded, written = pair(compute, case)
    written.run()

    def cancel(progress: Progress) -> None:
        if progress.step in (2, 3, 4, 9, 25):
            raise Stop

    for _ in range(5):
        with pytest.raises(Stop):
            recorded.run(cancel)
        assert not tapes(recorded)._graphs
    recorded.run()
    alike(recorded, written)


def test_a_model_that_waits_for_a_value_runs_as_written() -> None:
    """From the first refusal on, with nothing of the half recorded step left behind."""
    recorded, written = pair(torch.bfloat16, "settled half-way")
    for trainer in (recorded, written):
        toy: Any = trainer.denoiser
        toy.out.register_forward_hook(lambda _m, _a, out: None if float(out.detach().sum()) else out)
        trainer.run()
    alike(recorded, written)
    runner = tapes(recorded)
    assert (runner.refused, runner.recorded, runner.replayed) == (1, 1, 1), (
        "an update was recorded before the model was"
    )


@pytest.fixture
def resizes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether arrays were resized, sync by sync."""
    seen: list[bool] = []
    own = AdaptiveNetwork.sync_capacities

    def sync(self: Any, *given: Any, **more: Any) -> bool:
        seen.append(own(self, *given, **more))
        return seen[-1]

    monkeypatch.setattr(AdaptiveNetwork, "sync_capacities", sync)
    return seen


# -- what the stand-in must notice -----------------------------------------------------------------------------


def stale_after_resizing(trainer: Trainer) -> None:
    """The runner is not reset after arrays were resized."""
    tapes(trainer).reset = lambda: None  # type: ignore[method-assign]


def moments_moved(trainer: Trainer) -> None:
    """The optimizer's moments are given new memory in the middle of a run."""
    own = trainer.network.refresh

    def refresh() -> None:
        own()
        if trainer.issued == 20:
            for state in trainer.optimizer.flat.state.values():
                state.update({k: v.clone() for k, v in state.items() if v.ndim})

    trainer.network.refresh = refresh  # type: ignore[method-assign]


def factors_moved(trainer: Trainer) -> None:
    """A layer's numbers are put elsewhere behind its parameter's back."""
    own = trainer.network.refresh

    def refresh() -> None:
        own()
        if trainer.issued == 20:
            adapter: Adapter = trainer.network.adapters[0]
            adapter.down.data = adapter.down.data.clone()

    trainer.network.refresh = refresh  # type: ignore[method-assign]


@types
@pytest.mark.parametrize("fault", [stale_after_resizing, moments_moved, factors_moved])
def test_a_recording_of_memory_that_is_gone_is_noticed(fault: Callable[[Trainer], None], compute: torch.dtype) -> None:
    recorded, _ = pair(compute, "ranks fall")
    fault(recorded)
    with pytest.raises(AssertionError, match="would miss"):
        recorded.run()


def test_without_the_check_of_places_results_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape trains what it was recorded with: even unnoticed, a stale one cannot give the written steps' results."""
    monkeypatch.setattr("cuda_graph_tapes.places", lambda trainer: {})
    recorded, written = pair(torch.bfloat16, "ranks fall")
    stale_after_resizing(recorded)
    recorded.run()
    written.run()
    assert recorded.progress.losses != written.progress.losses


def test_a_learning_rate_that_is_a_plain_number_is_noticed() -> None:
    """It would stay what it was at the recording: with a schedule, results differ."""
    import lora2.training.optimizer as module

    module.CAPTURABLE = ()
    recorded, written = (
        trainer_of(recorded, torch.float32, ONE, schedule="cosine", settle_at=1.0) for recorded in (True, False)
    )
    recorded.run()
    written.run()
    assert recorded.progress.losses != written.progress.losses

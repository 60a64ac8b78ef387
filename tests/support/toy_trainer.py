"""Shared by the tests of training: a denoiser of a few thousand weights, its trainer, and states of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora2.adapters.network import AdaptiveNetwork
from lora2.adapters.prune import final_factors
from lora2.checkpoints.state import State, read_state
from lora2.config import TrainingConfig
from lora2.files.writer import write_new
from lora2.method.attention_entropy import EntropyProbe
from lora2.method.losses import EPSILON, FLOW, X0, V
from lora2.training.progress import Progress
from lora2.training.trainer import Trainer


class Toy(nn.Module):
    """A denoiser of a few thousand weights: a convolution, cross-attention to a caption's two tokens, a convolution."""

    def __init__(self, prediction: str = EPSILON, pictures: int = 9) -> None:
        super().__init__()
        self.prediction, self.sigma_data, self.device = prediction, 1.0, torch.device("cpu")
        self.into, self.out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.to_q, self.to_k, self.to_v = nn.Linear(16, 16), nn.Linear(12, 16), nn.Linear(12, 16)
        generator = torch.Generator().manual_seed(11)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.2, generator=generator)
        self.requires_grad_(False)
        self.words = torch.randn(pictures + 1, 2, 12, generator=generator)  # the last one is the empty caption
        self.calls: list[dict[str, Any]] = []
        self.groups, self.forwards = 1, 0
        self.savings: list[str] = []

    def layers(self) -> dict[str, nn.Module]:
        return {"into": self.into, "q": self.to_q, "k": self.to_k, "v": self.to_v, "out": self.out}

    def probe(self) -> EntropyProbe:
        return EntropyProbe([(self.to_q, self.to_k, 2)])

    def sigma(self, time: Tensor, shifted: bool) -> Tensor:
        self.calls.append({"time": time, "shifted": shifted})
        return time if self.prediction == FLOW else 10 * time**2 + 0.05

    def add_noise(self, sigma: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
        at = sigma.view(-1, 1, 1, 1)
        noisy = (1 - at) * clean + at * noise if self.prediction == FLOW else clean + at * noise
        self.calls[-1].update(clean=clean, noise=noise, noisy=noisy)
        return noisy

    def conditions(self, captions: Sequence[int], shape: torch.Size) -> list[tuple[list[int], Any]]:
        """Captions of the same number modulo `groups` can run together."""
        kinds = [[at for at, c in enumerate(captions) if c % self.groups == kind] for kind in range(self.groups)]
        return [(places, [captions[at] for at in places]) for places in kinds if places]

    def save_memory(self) -> str | None:
        return self.savings.pop(0) if self.savings else None

    def denoise(self, noisy: Tensor, sigma: Tensor, captions: Sequence[int]) -> Tensor:
        self.forwards += 1
        self.calls[-1].update(given=noisy, sigma=sigma, captions=list(captions))
        at = sigma.view(-1, 1, 1, 1)
        dtype = self.into.weight.dtype
        context = self.words[torch.tensor(captions)].to(dtype)
        hidden = torch.tanh(self.into((noisy / (1 + at)).to(dtype)))
        q = self.to_q(hidden.flatten(2).transpose(1, 2))
        attention = torch.softmax(q @ self.to_k(context).transpose(1, 2) / 4, -1) @ self.to_v(context)
        hidden = hidden + attention.transpose(1, 2).reshape(hidden.shape)
        output = self.out(hidden).float()
        if self.prediction == X0:
            return output
        if self.prediction == V:
            return noisy / (at**2 + 1) - output * at / (at**2 + 1).sqrt()
        return noisy - at * output


def latents(count: int = 9) -> list[Tensor]:
    """Pictures of two shapes, mixed."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 4, 6 if i % 3 == 2 else 4, generator=generator) for i in range(count)]


def told(**changes: Any) -> TrainingConfig:
    return TrainingConfig(
        **{
            "steps": 12,
            "learning_rate": 1e-2,
            "rank_learning_rate": 5e-2,
            "batch_size": 2,
            "target_rank": 2,
            "initial_rank": 9,
            "sync_every": 3,
            "rank_weight": 1e-2,
            "seed": 1,
            **changes,
        }
    )


def trainer_of(toy: Toy | None = None, compute: torch.dtype = torch.float32, **changes: Any) -> Trainer:
    """compute: the type that the denoiser computes in; the adapter's factors are float32."""
    toy = (toy or Toy(changes.pop("prediction", EPSILON))).to(compute)
    config = told(**changes)
    network = AdaptiveNetwork(toy.layers(), config, compute=compute)
    return Trainer(network, toy, latents(), config, toy.probe())


def toy_of(trainer: Trainer) -> Toy:
    assert isinstance(trainer.denoiser, Toy)
    return trainer.denoiser


def state(trainer: Trainer) -> list[Tensor]:
    """All that training changes, copied."""
    return [p.detach().clone() for p in (*trainer.network.parameters(), trainer.network.theta)]


def learned(trainer: Trainer) -> list[Tensor]:
    factors, _ = final_factors(trainer.network)
    return [t for f in factors.values() for t in (f.up, f.down)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


EVERYTHING: dict[str, Any] = {
    "accumulation": 2,
    "caption_dropout": 0.3,
    "min_snr_gamma": 5.0,
    "entropy_weight": 1e-2,
    "weight_decay": 0.01,
}


class Stop(BaseException):
    """What a host raises when a person cancels."""


MOST = 1 << 30


class Wide(Toy):
    """The toy with 48 channels instead of 16: room for arrays of 40 positions."""

    def __init__(self, prediction: str = EPSILON) -> None:
        super().__init__(prediction)
        generator = torch.Generator().manual_seed(12)
        self.into, self.out = nn.Conv2d(4, 48, 3, padding=1), nn.Conv2d(48, 4, 3, padding=1)
        self.to_q, self.to_k, self.to_v = nn.Linear(48, 48), nn.Linear(12, 48), nn.Linear(12, 48)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)
        self.requires_grad_(False)


def made(**changes: Any) -> Trainer:
    """A trainer of the toy, or of the wide one where ranks are to leave their arrays."""
    toy = Wide() if changes.get("initial_rank") in (WIDE, NARROW) else None
    return trainer_of(toy, **changes)


class Stopped(BaseException):
    """A cancel."""


def stopped(trainer: Trainer, step: int) -> Trainer:
    """The trainer after this many steps, cancelled."""

    def stop(progress: Progress) -> None:
        if progress.step == step:
            raise Stopped

    with pytest.raises(Stopped):
        trainer.run(stop)
    return trainer


def kept(trainer_or_state: Trainer | State, folder: Path) -> State:
    """A state as it comes back from the disk."""
    found = trainer_or_state.state() if isinstance(trainer_or_state, Trainer) else trainer_or_state
    return read_state(write_new(folder, "state", found.tensors, found.metadata()), MOST)


RICH: dict[str, Any] = {"accumulation": 2, "caption_dropout": 0.3, "min_snr_gamma": 5.0, "entropy_weight": 1e-2}

WIDE, NARROW = 30, 4

GROWING: dict[str, Any] = {
    "rank_learning_rate": 0.2, "rank_weight": 0.02, "rank_hold": 0.0, "initial_rank": NARROW, "target_rank": 12,
}  # fmt: skip

SHRINKING: dict[str, Any] = {**GROWING, "rank_weight": 0.5, "initial_rank": WIDE, "target_rank": 2}
"""Ranks that leave their arrays: the first up and down again, the second down."""


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> list[int]:
    """The call of this number of a function runs out of memory; returns the numbers of the calls."""
    ordinary, calls = getattr(owner, name), []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return ordinary(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)
    return calls

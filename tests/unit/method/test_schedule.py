"""Learning rates, times, and which pictures make a batch."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Generator, Tensor

from lora2.method.schedule import FINAL_FRACTION, learning_rate_factor
from lora2.method.timesteps import sample_times
from lora2.training.batches import Buckets
from lora2.util.errors import LoraError

# -- learning rates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1001])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_rates_rise_then_follow_the_schedule(schedule: str, steps: int, warmup: float) -> None:
    rates = [learning_rate_factor(step, steps, warmup, schedule) for step in range(steps)]
    rising = round(steps * warmup)
    assert all(0 < rate <= 1 for rate in rates), "every step counts"
    assert rates[:rising] == pytest.approx([(i + 1) / (rising + 1) for i in range(rising)])
    after = rates[rising:]
    if schedule == "constant":
        assert after == [1.0] * len(after)
    elif after:
        assert after[0] == 1.0
        assert all(one >= other for one, other in itertools.pairwise(after))
        expected = [0.55 + 0.45 * math.cos(math.pi * i / len(after)) for i in range(len(after))]
        assert after == pytest.approx(expected), "half a cosine from 1 to a tenth"


def test_the_cosine_ends_at_a_tenth() -> None:
    assert FINAL_FRACTION == 0.1
    assert learning_rate_factor(9999, 10000, 0.0, "cosine") == pytest.approx(0.1, abs=1e-6)
    assert learning_rate_factor(500, 1000, 0.0, "cosine") == pytest.approx(0.55)


# -- times ---------------------------------------------------------------------------------------------------


def drawn(sampling: str, count: int = 50_000) -> Tensor:
    return sample_times(count, sampling, Generator().manual_seed(0)).double()


@pytest.mark.parametrize("sampling", ["auto", "uniform", "shifted"])
def test_times_are_uniform(sampling: str) -> None:
    """By the Kolmogorov–Smirnov distance: 1.63 / √n is exceeded once in a hundred times."""
    times = drawn(sampling).sort().values
    assert float(times[0]) > 0
    assert float(times[-1]) < 1
    assert float((times - torch.linspace(0, 1, len(times)).double()).abs().max()) < 1.63 / math.sqrt(len(times))


def test_logit_normal_times_have_the_papers_distribution() -> None:
    """P(t < x) = Φ(ln(x / (1 − x))), Esser et al. with m = 0 and s = 1."""
    times = drawn("logit-normal").sort().values
    assert float(times[0]) > 0
    assert float(times[-1]) < 1
    cdf = 0.5 * (1 + torch.erf(torch.log(times / (1 - times)) / math.sqrt(2)))
    assert float((cdf - torch.linspace(0, 1, len(times)).double()).abs().max()) < 1.63 / math.sqrt(len(times))


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_times_follow_the_generator_only(sampling: str) -> None:
    one, other = (sample_times(9, sampling, Generator().manual_seed(s)) for s in (1, 2))
    torch.rand(3)
    assert torch.equal(one, sample_times(9, sampling, Generator().manual_seed(1)))
    assert not torch.equal(one, other)
    assert len(set(one.tolist())) == 9, "every sample has a time of its own"


# -- batches -------------------------------------------------------------------------------------------------


def pictures(*counts: int) -> list[Tensor]:
    """Pictures of several shapes, mixed, each filled with its own number."""
    shapes = [(4, 8, 8), (4, 8, 12), (4, 12, 8), (4, 16, 16)]
    kinds = [shape for shape, count in zip(shapes, counts, strict=False) for _ in range(count)]
    order = torch.randperm(len(kinds), generator=Generator().manual_seed(0)).tolist()
    return [torch.full(kinds[at], float(index)) for index, at in enumerate(order)]


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("counts", [(1,), (6,), (5, 3, 1), (2, 2, 2, 9)])
def test_batches_are_full_and_of_one_shape(batch: int, counts: tuple[int, ...]) -> None:
    latents = pictures(*counts)
    buckets = Buckets(latents, batch, seed=0)
    for _ in range(60):
        indices = buckets.next_batch()
        assert len(indices) == batch
        assert len({latents[i].shape for i in indices}) == 1
        stacked = buckets.stack(indices)
        assert stacked.shape == (batch, *latents[indices[0]].shape)
        assert stacked[:, 0, 0, 0].tolist() == indices, "picture i stays picture i"


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
def test_every_picture_comes_once_before_any_comes_again(batch: int) -> None:
    """In each bucket, what is dealt is one whole shuffled deck after another, whatever the batch size."""
    latents = pictures(5, 3, 1)
    buckets = Buckets(latents, batch, seed=3)
    dealt: dict[torch.Size, list[int]] = {latent.shape: [] for latent in latents}
    for _ in range(200):
        indices = buckets.next_batch()
        dealt[latents[indices[0]].shape] += indices
    for shape, seen in dealt.items():
        members = sorted(i for i, latent in enumerate(latents) if latent.shape == shape)
        decks = [seen[at : at + len(members)] for at in range(0, len(seen) - len(members) + 1, len(members))]
        assert len(decks) > 5
        assert all(sorted(deck) == members for deck in decks)
        assert len(members) == 1 or len({tuple(deck) for deck in decks}) > 1, "shuffled anew each time"


def test_buckets_are_drawn_in_proportion_to_their_size() -> None:
    """So every picture of the dataset is seen equally often in the long run."""
    latents = pictures(8, 4, 1)
    buckets = Buckets(latents, 2, seed=1)
    seen = Counter(i for _ in range(6500) for i in buckets.next_batch())
    # 13,000 draws of 13 pictures: 1000 each; the smallest bucket's 500 batches vary by √500, doubled.
    assert all(abs(seen[i] - 1000) < 4 * 2 * math.sqrt(500) for i in range(13))


def test_a_seed_decides_the_order() -> None:
    def order(seed: int) -> list[list[int]]:
        buckets = Buckets(pictures(5, 4), 2, seed)
        torch.rand(1)
        return [buckets.next_batch() for _ in range(30)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_no_pictures_are_refused_in_words() -> None:
    with pytest.raises(LoraError, match="no latents"):
        Buckets([], 1, 0)

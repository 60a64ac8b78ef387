"""The loop on a small denoiser: seeds, bad losses, stopping, batches, phases, and ranks that fit their task."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy_trainer import EVERYTHING, Stop, Toy, hooks, latents, learned, same, state, told, toy_of, trainer_of

from lora2.adapters.network import AdaptiveNetwork
from lora2.adapters.prune import final_factors
from lora2.config import TrainingConfig
from lora2.method.losses import EPSILON, PREDICTIONS, X0, denoising_loss
from lora2.method.schedule import learning_rate_factor, size_factor
from lora2.training.denoiser import EMPTY_CAPTION
from lora2.training.monitor import Diverged
from lora2.training.optimizer import Optimizer, gradient_norms
from lora2.training.progress import Progress
from lora2.training.trainer import Trainer


def global_norm(tensors: list[Tensor]) -> Tensor:
    """As a step takes it, of all its gradients together."""
    return torch.linalg.vector_norm(gradient_norms(tensors))


# -- seeds ---------------------------------------------------------------------------------------------------

types = pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize(
    ("compute", "optimizer", "settle_at"),
    [
        *((torch.float32, "adamw", share) for share in (0.0, 0.5, 1.0)),
        (torch.float32, "adam", 0.5),
        (torch.float32, "sgd", 1.0),
        (torch.bfloat16, "adamw", 0.5),
    ],
)
def test_a_seed_decides_every_bit(compute: torch.dtype, optimizer: str, settle_at: float) -> None:
    runs = []
    for seed in (7, 7, 8):
        torch.rand(1)  # torch's own generator must not matter
        trainer = trainer_of(seed=seed, optimizer=optimizer, settle_at=settle_at, compute=compute, **EVERYTHING)
        progress = trainer.run()
        runs.append((learned(trainer), progress.losses, progress.ranks))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    assert runs[0][1] != runs[2][1]
    assert not same(runs[0][0], runs[2][0])


def test_a_seed_decides_the_order_of_pictures_and_the_noise() -> None:
    def drawn(seed: int) -> tuple[list[list[int]], list[float]]:
        batches = [trainer.batches.sample() for trainer in [trainer_of(seed=seed)] for _ in range(12)]
        return [captions for *_, captions in batches], [float(noise.sum()) for _, noise, *_ in batches]

    one, again, other = drawn(7), drawn(7), drawn(8)
    assert one == again
    assert one[0] != other[0]
    assert not set(one[1]) & set(other[1])


def test_a_run_leaves_torchs_generator_and_the_model_alone() -> None:
    trainer = trainer_of(**EVERYTHING)
    toy = toy_of(trainer)
    weights = {k: v.clone() for k, v in toy.state_dict().items()}
    before = torch.get_rng_state()
    trainer.run()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in toy.state_dict().items())
    assert all(p.grad is None for p in toy.parameters())
    assert hooks(toy) == 0


@pytest.mark.parametrize("seed", [0, 2**64 - 2, 2**64 - 1])
def test_every_seed_of_comfyuis_widget_works(seed: int) -> None:
    assert len(trainer_of(seed=seed, steps=2).run().losses) == 2


# -- a loss that is no number --------------------------------------------------------------------------------


def spoil_output(value: float) -> Any:
    return lambda predicted: predicted + value


def spoil_gradient(predicted: Tensor) -> Tensor:
    predicted.register_hook(lambda gradient: gradient * math.nan)
    return predicted


@pytest.mark.parametrize(
    ("spoil", "compute", "accumulation", "settle_at"),
    [
        (spoil_output(math.nan), torch.float32, 1, 0.25),
        (spoil_output(math.nan), torch.bfloat16, 3, 0.25),
        (spoil_output(math.inf), torch.bfloat16, 1, 1.0),
        (spoil_output(1e19), torch.float32, 3, 1.0),
        (spoil_gradient, torch.float32, 3, 1.0),
        (spoil_gradient, torch.bfloat16, 3, 0.25),
    ],
    ids=[
        "NaN",
        "NaN, bf16",
        "infinity",
        "a square beyond float32 with finite gradients",
        "gradients",
        "gradients, bf16",
    ],
)
def test_a_bad_step_is_not_taken(spoil: Any, compute: torch.dtype, accumulation: int, settle_at: float) -> None:
    """One bad micro-batch is enough; the adapter stays as it was, bit for bit, and can be saved."""
    trainer = trainer_of(accumulation=accumulation, settle_at=settle_at, compute=compute)
    toy, good = toy_of(trainer), 6
    ordinary, kept = toy.denoise, []

    def denoise(noisy: Tensor, sigma: Tensor, captions: Sequence[int]) -> Tensor:
        predicted = ordinary(noisy, sigma, captions)
        bad = toy.forwards == good * accumulation + accumulation // 2 + 1
        return spoil(predicted) if bad else predicted

    def remember(progress: Progress) -> None:
        kept[:] = [state(trainer), learned(trainer)]

    toy.denoise = denoise  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"at step 7.*learning rate \(now 0.01\)") as raised:
        trainer.run(remember)
    assert "not applied" in str(raised.value)
    assert ("gradients are not finite" in str(raised.value)) == (spoil is spoil_gradient)
    assert trainer.progress.step == len(trainer.progress.losses) == good
    assert all(math.isfinite(loss) for loss in trainer.progress.losses)
    assert same(state(trainer), kept[0])
    assert same(learned(trainer), kept[1])
    assert all(bool(t.isfinite().all()) for t in learned(trainer))
    moments = [v for s in trainer.optimizer.inner.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert all(bool(m.isfinite().all()) for m in moments), "the optimizer too"
    assert all(p.grad is None for p in (*trainer.network.parameters(), trainer.network.theta))
    assert hooks(toy) == 0


def test_latents_with_a_nan_stop_the_first_step() -> None:
    toy, config = Toy(), told()
    network = AdaptiveNetwork(toy.layers(), config)
    with pytest.raises(Diverged, match="step 1"):
        Trainer(network, toy, [torch.full((4, 4, 4), math.nan)], config).run()
    assert not any(f.delta().any() for f in final_factors(network)[0].values())


# -- stopping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "kind"), [(1, Stop), (5, Stop), (6, Stop), (12, Stop), (5, KeyboardInterrupt), (6, RuntimeError)]
)
def test_a_callback_that_raises_stops_at_once_and_keeps_what_was_learned(at: int, kind: type[BaseException]) -> None:
    """Before settling, right at it and after it."""
    trainer = trainer_of(settle_at=0.5)
    kept: list[Tensor] = []

    def cancel(progress: Progress) -> None:
        if progress.step == at:
            kept.extend(state(trainer))
            raise kind

    with pytest.raises(kind):
        trainer.run(cancel)
    assert len(toy_of(trainer).calls) == at, "not one forward more"
    assert len(trainer.progress.losses) == trainer.progress.step == at
    assert same(state(trainer), kept)
    assert hooks(toy_of(trainer)) == 0
    factors, _ = final_factors(trainer.network)
    assert set(factors) == set(toy_of(trainer).layers())
    assert any(bool(f.delta().any()) for f in factors.values())


@types
def test_stopping_and_going_on_is_the_same_as_not_stopping(compute: torch.dtype) -> None:
    whole, parts = (trainer_of(compute=compute, **EVERYTHING) for _ in range(2))
    whole.run()

    def cancel(progress: Progress) -> None:
        if progress.step in (2, 6, 7):
            raise Stop

    for _ in range(3):
        with pytest.raises(Stop):
            parts.run(cancel)
    parts.run()
    assert same(learned(whole), learned(parts))
    assert whole.progress.losses == parts.progress.losses


@types
def test_a_model_that_fails_in_the_middle_of_a_step_leaves_no_half_gradients(compute: torch.dtype) -> None:
    """The second of three micro-batches fails; then the run may go on."""
    trainer, plain = (trainer_of(accumulation=3, steps=1, settle_at=1.0, compute=compute) for _ in range(2))
    batches = [plain.batches.sample() for _ in range(3)]
    plain.batches.sample = iter(batches).__next__  # type: ignore[method-assign]
    trainer.batches.sample = iter([*batches, *batches]).__next__  # type: ignore[method-assign]
    toy, before = toy_of(trainer), state(trainer)
    toy.calls.append({})
    ordinary = toy.denoise

    def denoise(*given: Any) -> Tensor:
        if toy.forwards == 1:
            toy.forwards = 2
            raise RuntimeError("a kernel failed")
        return ordinary(*given)

    toy.denoise = denoise  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a kernel failed"):
        trainer.run()
    assert same(state(trainer), before)
    assert all(p.grad is None for p in trainer.network.parameters())
    assert hooks(toy) == 0
    trainer.run()
    plain.run()
    assert same(state(trainer), state(plain)), "nothing of the failed step is in the next"
    assert trainer.progress.losses == plain.progress.losses


# -- what reaches the denoiser -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_sample_has_its_own_picture_caption_noise_and_time(batch: int) -> None:
    trainer = trainer_of(batch_size=batch, steps=15, settle_at=1.0)
    trainer.run()
    pictures, times, noises = latents(), [], []
    for call in toy_of(trainer).calls:
        assert len(call["captions"]) == len(call["sigma"]) == len(call["clean"]) == batch
        for index, clean in zip(call["captions"], call["clean"], strict=True):
            assert torch.equal(clean, pictures[index]), "picture i has caption i"
        assert torch.equal(call["given"], call["noisy"])
        assert torch.equal(call["sigma"], 10 * call["time"] ** 2 + 0.05)
        assert call["noise"].shape == call["clean"].shape
        times += call["time"].tolist()
        noises += call["noise"][:, 0, 0, 0].tolist()
    assert len(set(times)) == len(times) == 15 * batch
    assert len(set(noises)) == len(noises)
    assert {i for call in toy_of(trainer).calls for i in call["captions"]} == set(range(9)) or batch == 1


@pytest.mark.parametrize(
    ("sampling", "shifted"), [("auto", True), ("shifted", True), ("uniform", False), ("logit-normal", False)]
)
def test_only_a_shifted_schedule_is_shifted(sampling: str, shifted: bool) -> None:
    trainer = trainer_of(timestep_sampling=sampling)
    trainer.batches.sample()
    assert toy_of(trainer).calls[0]["shifted"] is shifted


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_their_rate(share: float) -> None:
    """Sample by sample, independent of the picture; the other captions stay right."""
    trainer = trainer_of(caption_dropout=share, batch_size=4)
    drawn = [trainer.batches.sample() for _ in range(500)]
    captions = [c for *_, batch in drawn for c in batch]
    dropped = sum(c == EMPTY_CAPTION for c in captions)
    # 2000 draws: three deviations of a binomial.
    assert abs(dropped - 2000 * share) <= 3 * math.sqrt(2000 * share * (1 - share))
    if 0 < share < 1:
        assert any(0 < sum(c == EMPTY_CAPTION for c in batch) < 4 for *_, batch in drawn)
    pictures = latents()
    for clean, _, _, batch in drawn[:50]:
        for picture, caption in zip(clean, batch, strict=True):
            assert caption == EMPTY_CAPTION or torch.equal(picture, pictures[caption])


def test_dropped_captions_reach_the_denoiser() -> None:
    trainer = trainer_of(caption_dropout=1.0, steps=2)
    trainer.run()
    assert all(call["captions"] == [EMPTY_CAPTION] * 2 for call in toy_of(trainer).calls)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_models_own_plus_the_entropy(prediction: str) -> None:
    toy = Toy(prediction)
    for gamma, weight in ((0.0, 0.0), (0.0, 0.3), (5.0, 0.3)):
        trainer = trainer_of(toy, min_snr_gamma=gamma, entropy_weight=weight)
        clean, noise, sigma, captions = trainer.batches.sample()
        predicted = toy.denoise(toy.add_noise(sigma, noise, clean), sigma, captions)
        expected = float(denoising_loss(predicted, clean, sigma, prediction, gamma))
        probe = toy.probe()
        with probe.attached():
            toy.denoise(toy.add_noise(sigma, noise, clean), sigma, captions)
            entropy = probe.take()
        assert entropy is not None
        with trainer.entropy.attached() if trainer.entropy is not None else trainer.network.attached():
            got = float(trainer.loss(clean, noise, sigma, captions).detach())
        assert (trainer.entropy is None) == (weight == 0)
        assert got == pytest.approx(expected + weight * float(entropy), rel=1e-6)


@pytest.mark.parametrize(
    ("compute", "prediction"), [*((torch.float32, kind) for kind in PREDICTIONS), (torch.bfloat16, EPSILON)]
)
def test_every_prediction_type_learns(compute: torch.dtype, prediction: str) -> None:
    """On the same batches before and after."""
    trainer = trainer_of(
        prediction=prediction, steps=60, batch_size=3, rank_weight=1e-4, settle_at=0.5, compute=compute
    )
    toy_of(trainer).calls.append({})
    probe = [trainer_of(prediction=prediction, seed=99, batch_size=9).batches.sample() for _ in range(6)]

    def mean_loss() -> float:
        trainer.network.refresh()
        with trainer.network.attached(), torch.no_grad():
            return sum(float(trainer.loss(*batch)) for batch in probe) / len(probe)

    trainer.entropy = None
    before = mean_loss()
    trainer.run()
    assert mean_loss() < 0.8 * before


# -- steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("compute", "near"), [(torch.float32, 2e-3), (torch.bfloat16, 0.2)])
def test_micro_batches_equal_one_batch_of_the_same_samples(compute: torch.dtype, near: float, optimizer: str) -> None:
    """Four batches of two are one batch of eight, to rounding."""
    changes: dict[str, Any] = {"optimizer": optimizer, "settle_at": 0.5, "entropy_weight": 0.1, "compute": compute}
    one, four = (trainer_of(accumulation=count, **changes) for count in (1, 4))
    source = trainer_of(Toy(), batch_size=8, seed=3)
    batches = [source.batches.sample() for _ in range(12)]
    whole = iter(batches)
    parts = iter(
        [(c[i : i + 2], n[i : i + 2], s[i : i + 2], k[i : i + 2]) for c, n, s, k in batches for i in range(0, 8, 2)]
    )
    for trainer, feed in ((one, whole), (four, parts)):
        toy_of(trainer).calls.append({})
        trainer.batches.sample = feed.__next__  # type: ignore[method-assign]
        trainer.run()
    assert one.progress.losses == pytest.approx(four.progress.losses, rel=near / 20)
    if compute == torch.float32:
        assert one.progress.ranks == four.progress.ranks
    for a, b in zip(one.network.export_factors().values(), four.network.export_factors().values(), strict=True):
        # Adam divides 1e-7 (or 4e-3) of rounding by the gradient's own size, and twelve steps add up.
        assert (a.delta() - b.delta()).norm() <= near * b.delta().norm()
    assert any(f.rank for f in one.network.export_factors().values())


@pytest.mark.parametrize("entropy_weight", [0.0, 0.1])
def test_captions_that_cannot_run_together_still_make_one_batch(entropy_weight: float) -> None:
    """A batch of eight in two groups of any size: every sample counts alike, and keeps its own noise."""
    together, apart = (
        trainer_of(Toy(), batch_size=8, caption_dropout=0.2, settle_at=0.5, entropy_weight=entropy_weight)
        for _ in range(2)
    )
    toy_of(apart).groups = 2
    one, other = together.run(), apart.run()
    assert toy_of(apart).forwards > toy_of(together).forwards == 12
    assert one.losses == pytest.approx(other.losses, rel=1e-4)
    assert one.ranks == other.ranks
    for a, b in zip(together.network.export_factors().values(), apart.network.export_factors().values(), strict=True):
        assert (a.delta() - b.delta()).norm() <= 2e-3 * b.delta().norm()
    assert any(f.rank for f in together.network.export_factors().values())


def pretend_gradients(trainer: Trainer, value: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(3)
    trainer.network.refresh()
    for parameter in trainer.network.parameters():
        parameter.grad = value * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_after_a_skipped_step_the_optimizer_goes_on_as_if_it_had_not_been(optimizer: str, at: int) -> None:
    """The very first one too, when there are no moments yet; and for whatever makes a step impossible."""
    plain, skipping = (trainer_of(optimizer=optimizer, settle_at=1.0) for _ in range(2))
    for step in range(4):
        if step == at:
            for gradient, loss in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)):
                pretend_gradients(skipping, gradient)
                assert not skipping.optimizer.step(1.0, True, torch.tensor(loss))
        for trainer in (plain, skipping):
            pretend_gradients(trainer)
            assert trainer.optimizer.step(1.0, True, torch.ones(()))
    assert same(state(plain), state(skipping))
    assert not same(state(plain), state(trainer_of(optimizer=optimizer, settle_at=1.0)))


class Listener(TorchDispatchMode):
    """Writes down every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_weight_decay_is_adamws_alone(optimizer: str) -> None:
    """It takes learning rate times decay off the factors, whatever their gradients (Loshchilov & Hutter, arXiv:1711.05101)."""
    plain, pulled = (trainer_of(optimizer=optimizer, settle_at=1.0, weight_decay=decay) for decay in (0.0, 2.0))
    before = [p.detach().clone() for p in plain.network.parameters()]
    for trainer in (plain, pulled):
        for parameter in trainer.network.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        trainer.network.theta.grad = torch.zeros_like(trainer.network.theta)
        assert trainer.optimizer.step(0.5, True, torch.ones(()))
    less = 0.5 * plain.config.learning_rate * 2.0 if optimizer == "adamw" else 0.0
    for old, one, other in zip(before, plain.network.parameters(), pulled.network.parameters(), strict=True):
        # float32: a difference of numbers near 1 is right to 1e-7.
        torch.testing.assert_close((one - other).detach(), less * old, rtol=1e-4, atol=3e-7)


def test_weight_decay_goes_by_the_pictures_of_the_run() -> None:
    trainer = trainer_of()
    assert trainer.config.weight_decay == trainer.optimizer.inner.param_groups[0]["weight_decay"] == 24 / len(latents())
    assert trainer.state().part("config").facts["weight_decay"] == 24 / len(latents())


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_optimizers_step_is_the_same_work_whatever_the_values_are(optimizer: str) -> None:
    """Taken or not, clipped or not, ranks held or not: no value decides what is launched, and none is read."""
    trainer, seen = trainer_of(optimizer=optimizer), []
    for gradient, loss, move in ((1.0, 1.0, True), (1e-9, 2.0, False), (math.nan, 1.0, True), (1.0, math.inf, False)):
        pretend_gradients(trainer, gradient)
        trainer.optimizer.step(1.0, move, torch.ones(()))
        pretend_gradients(trainer, gradient)
        trainer.optimizer.prepare(0.5, move)
        given = torch.tensor(loss)
        with Listener() as listener:
            trainer.optimizer.apply(given)
        seen.append(listener.operations)
    assert len(seen[0]) > 20
    assert all(operations == seen[0] for operations in seen)
    assert not [o for o in seen[0] if "_local_scalar_dense" in o or "is_nonzero" in o]


@pytest.mark.parametrize("settle_at", [0.5, 1.0])
def test_the_learning_rate_follows_warm_up_schedule_and_size(settle_at: float) -> None:
    """Lower by the root of the size over the target's: as of the start while ranks adapt, then of the last cut."""
    trainer = trainer_of(steps=40, warmup=0.1, settle_at=settle_at, settle_cuts=2, learning_rate=0.02, target_rank=2)
    start, rates, sizes = trainer.network.size(), [], []

    def listen(progress: Progress) -> None:
        rates.append(trainer.optimizer.inner.param_groups[0]["lr"] / 0.02)
        sizes.append(trainer.network.size() if progress.cuts else start)

    trainer.run(listen)
    expected = [learning_rate_factor(i, 40, 0.1, "cosine") for i in range(40)]
    if settle_at < 1:
        budget = trainer.network.budget
        assert sizes[0] > sizes[10] > sizes[20] <= budget
        expected = [rate * min(1.0, math.sqrt(budget / size)) for rate, size in zip(expected, sizes, strict=True)]
    assert rates == pytest.approx(expected)


def test_a_size_below_the_target_is_no_reason_to_learn_faster() -> None:
    assert size_factor(100, 25) == 0.5
    assert size_factor(25, 100) == size_factor(0, 100) == 1


def test_gradients_are_clipped_together() -> None:
    """A first step of SGD moves by rate · min(norm, clip)."""
    moved = {}
    for clip in (0.0, 1e-3, 1e3):
        trainer = trainer_of(optimizer="sgd", clip_norm=clip, warmup=0.0, settle_at=1.0, learning_rate=0.5)
        before = state(trainer)[:-1]

        def stop(_: Progress) -> None:
            raise Stop

        with pytest.raises(Stop):
            trainer.run(stop)
        after = state(trainer)[:-1]
        moved[clip] = global_norm([a - b for a, b in zip(after, before, strict=True)]).item() / 0.5
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[0.0] == pytest.approx(moved[1e3], rel=1e-6)
    assert moved[0.0] > 0.01


def test_clipping_does_not_weaken_what_the_data_says_of_ranks() -> None:
    """θ's gradient is taken before clipping, so λ_r means the same at any clip_norm."""
    one, other = theta_after_a_step(clip=0.0), theta_after_a_step(clip=1e-4)
    assert torch.equal(one, other)
    assert bool(one.any())


def theta_after_a_step(clip: float) -> Tensor:
    """Adam's first moment of θ, a tenth of the gradient."""
    trainer = trainer_of(clip_norm=clip)
    network, theta = trainer.network, trainer.optimizer.theta
    for adapter in network.adapters:
        adapter.up.data.normal_(generator=torch.Generator().manual_seed(0))
    network.refresh()
    with network.attached():
        trainer.loss(*trainer.batches.sample()).backward()
    trainer.optimizer.step(1.0, True, torch.ones(()))
    assert theta is not None
    return theta.state[network.theta]["exp_avg"]


def test_global_norm() -> None:
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]), torch.tensor(12.0)]
    assert float(global_norm(tensors)) == pytest.approx(13)
    assert float(global_norm([])) == 0
    assert math.isnan(float(global_norm([torch.tensor(math.nan), torch.ones(2)])))


# -- ranks and phases ----------------------------------------------------------------------------------------


def test_ranks_hold_still_at_first() -> None:
    trainer = trainer_of(steps=20, rank_hold=0.4, settle_at=1.0)
    seen: list[Tensor] = []
    start = trainer.network.theta.detach().clone()
    trainer.run(lambda _: seen.append(trainer.network.theta.detach().clone()))
    assert all(torch.equal(theta, start) for theta in seen[:8])
    # The first step of Adam is its learning rate for every element, whatever the gradient. The last layer has four
    # outputs and starts at its full rank of 4, beyond which it cannot go.
    assert torch.allclose((seen[8] - start).abs()[:4], torch.full((4,), 5e-2), rtol=1e-3)
    assert trainer.network.ranks()["out"] <= 4


def test_ranks_stand_still_at_the_end_where_they_never_settle() -> None:
    """What the last dropped positions held is learned again; a run that settles uses all of its time before that."""
    for settle_at, moving in ((1.0, range(8, 14)), (0.5, range(8, 10))):
        trainer = trainer_of(steps=20, rank_hold=0.4, rank_rest=0.3, settle_at=settle_at, settle_cuts=1)
        seen = [trainer.network.theta.detach().clone()]
        trainer.run(lambda _, trainer=trainer, seen=seen: seen.append(trainer.network.theta.detach().clone()))
        moved = [step for step in range(20) if not torch.equal(seen[step], seen[step + 1])]
        assert moved == list(moving)


def test_theta_follows_its_gradient_and_progress_tells_the_ranks() -> None:
    """Pulled toward rank 2 from 9 with all weight, every layer falls."""
    trainer = trainer_of(steps=60, settle_at=1.0, rank_weight=100.0)
    means: list[float] = []

    def listen(progress: Progress) -> None:
        means.append(sum(progress.ranks.values()) / 5)

    progress = trainer.run(listen)
    changes = {i + 1 for i in range(1, 60) if means[i] != means[i - 1]}
    assert progress.phase == "adapting"
    assert not progress.cuts
    assert progress.ranks == trainer.network.ranks()
    assert all(rank <= 4 for rank in progress.ranks.values())
    assert changes <= set(range(3, 61, 3)), "told when the arrays follow, every sync_every steps"
    assert len(changes) > 3


@pytest.mark.parametrize("settle_at", [0.25, 0.5, 0.9])
def test_settling_meets_the_target_and_training_goes_on(settle_at: float) -> None:
    trainer = trainer_of(steps=40, settle_at=settle_at, target_rank=3, learning_rate=3e-3)
    cuts = [round(40 * settle_at * k / 3) for k in (1, 2, 3)]
    sizes: list[int] = []
    phases: list[str] = []
    optimizers: list[Optimizer] = []

    def listen(progress: Progress) -> None:
        phases.append(progress.phase)
        sizes.append(trainer.network.size())
        if trainer.optimizer not in optimizers:
            optimizers.append(trainer.optimizer)

    progress = trainer.run(listen)
    first, _, last = cuts
    assert phases == ["adapting"] * first + ["pruning"] * (last - first) + ["pruned"] * (40 - last)
    assert len(optimizers) == 4
    assert len(progress.losses) == progress.step == 40
    assert progress.cuts == cuts
    before, one, two, three = (sizes[step] for step in (first - 1, *cuts))
    ratio = (trainer.network.budget / before) ** (1 / 3)
    most = max(a.cost for a in trainer.network.adapters)  # what whole positions leave over, twice
    assert one == pytest.approx(before * ratio, abs=2 * most)
    assert two == pytest.approx(before * ratio**2, abs=2 * most)
    assert three <= trainer.network.budget
    network = trainer.network
    assert network.size() <= network.budget == 3 * sum(a.cost for a in network.adapters)
    assert network.budget - network.size() < max(a.cost for a in network.adapters)
    assert progress.ranks == network.ranks()
    factors, ordered = final_factors(network)
    assert ordered
    assert {n: f.rank for n, f in factors.items()} == progress.ranks


def test_settling_at_the_start_trains_a_plain_lora_of_one_rank() -> None:
    trainer = trainer_of(steps=60, settle_at=0.0, target_rank=4, initial_rank=0, batch_size=3)
    progress = trainer.run()
    assert set(progress.ranks.values()) == {4}
    assert all(bool(f.delta().any()) for f in trainer.network.export_factors().values())
    held = [p for group in trainer.optimizer.inner.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(held, trainer.network.parameters(), strict=True))


class Teachers(nn.Module):
    """Linear layers that must each become W + T, T of a known rank: channel i of the noisy latent goes through layer i."""

    prediction, sigma_data, device = X0, 1.0, torch.device("cpu")
    ranks = (1, 2, 4, 8, 16, 32)

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in self.ranks).requires_grad_(False)
        goals = []
        for layer, rank in zip(self.parts, self.ranks, strict=True):
            layer.weight.data.normal_(0, 0.1, generator=generator)
            left = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]
            right = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]
            goals.append((left @ right.T).float())
        self.goals = torch.stack(goals)

    def layers(self) -> dict[str, nn.Module]:
        return {str(rank): layer for rank, layer in zip(self.ranks, self.parts, strict=True)}

    def sigma(self, time: Tensor, shifted: bool) -> Tensor:
        return torch.ones_like(time)

    def add_noise(self, sigma: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
        return noise

    def conditions(self, captions: Sequence[int], shape: torch.Size) -> list[tuple[list[int], Any]]:
        return [(list(range(len(captions))), list(captions))]

    def save_memory(self) -> str | None:
        return None

    def denoise(self, noisy: Tensor, sigma: Tensor, captions: Sequence[int]) -> Tensor:
        """The clean latent is zero, so what is put out is the error."""
        errors = []
        for index, layer in enumerate(self.parts):
            z = noisy[:, index]
            errors.append(layer(z) - z @ (layer.weight + self.goals[index]).T)
        return 8 * torch.stack(errors, 1)


def teach(**changes: Any) -> Trainer:
    model = Teachers()
    config = TrainingConfig(
        **{
            "steps": 400,
            "learning_rate": 5e-3,
            "rank_learning_rate": 1.5e-2,
            "batch_size": 48,
            "target_rank": 2,
            "initial_rank": 16,
            "settle_at": 1.0,
            "rank_rest": 0.0,
            "schedule": "constant",
            "clip_norm": 0.0,
            "weight_decay": 0.0,
            **changes,
        }
    )
    trainer = Trainer(AdaptiveNetwork(model.layers(), config), model, [torch.zeros(6, 64)], config)
    trainer.run()
    return trainer


@functools.cache
def ranks_learned(rank_weight: float) -> list[int]:
    """Of the teachers of rank 1 to 32, all layers started at 16 and pulled toward 2 with this weight."""
    return list(teach(rank_weight=rank_weight).progress.ranks.values())


def test_layers_learn_the_ranks_that_their_tasks_need() -> None:
    """The trial in DESIGN."""
    ranks = ranks_learned(3e-2)
    assert ranks == sorted(ranks)
    assert len(set(ranks)) >= 4
    assert ranks[0] < 10
    assert ranks[5] > 40


def test_a_stronger_pull_gives_smaller_ranks() -> None:
    weak, strong = ranks_learned(1e-4), ranks_learned(3e-2)
    assert sum(strong) < 0.9 * sum(weak)
    assert all(s <= w for s, w in zip(strong, weak, strict=True))


def test_settling_finds_the_true_ranks() -> None:
    """Rank 11 everywhere pays for the 63 directions of all teachers and three more."""
    progress = teach(settle_at=0.75, target_rank=11, learning_rate=1e-2).progress
    ranks = list(progress.ranks.values())
    assert all(true <= rank <= true + 3 for true, rank in zip((1, 2, 4, 8, 16, 32), ranks, strict=True))
    assert sum(ranks) == 66
    # A direction that is missing costs 64 / (6 · 64) in the loss.
    assert sum(progress.losses[-50:]) / 50 < 0.25 * 64 / (6 * 64)


def test_a_target_that_is_only_the_most_is_not_filled() -> None:
    """Positions that are worth nothing are not kept; a budget is filled all the same."""
    told: dict[str, Any] = {
        "settle_at": 0.75, "learning_rate": 1e-2, "settle_keep": 0.99, "initial_rank": 40, "steps": 200,
    }  # fmt: skip
    little, much = (teach(target_rank=target, **told).progress for target in (11, 30))
    assert sum(little.ranks.values()) <= 66
    assert sum(much.ranks.values()) < 0.6 * 6 * 30
    megabytes = 6 * 30 * 128 * 2 / 1e6
    filled = teach(budget_mb=megabytes, **told).network
    assert filled.budget - filled.size() < 128

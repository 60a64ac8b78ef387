"""The loss is the error of what the network itself puts out; weights as published; entropy as defined."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora2.method.attention_entropy import MAX_QUERIES, EntropyProbe, attention_entropy
from lora2.method.losses import (
    EPSILON,
    FLOW,
    PREDICTIONS,
    X0,
    V,
    denoising_loss,
    min_snr_weight,
    prediction_weight,
    signal_to_noise,
)

BATCH = 6
# kind, the data's deviation s
KINDS = [(EPSILON, 1.0), (V, 1.0), (V, 0.5), (V, 2.0), (FLOW, 1.0), (X0, 1.0)]
every_kind = pytest.mark.parametrize(("prediction", "s"), KINDS)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmas(prediction: str) -> Tensor:
    """σ from nearly clean to nearly noise: in (0, 1) where data fades, up to 14.6 (SD's last) where noise is added."""
    return torch.tensor([0.03, 0.2, 0.5, 0.7, 0.9, 0.99] if prediction == FLOW else [0.03, 0.3, 1, 2, 5, 14.6]).double()


def wide(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)


def noised(prediction: str, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return (1 - wide(sigma)) * clean + wide(sigma) * noise if prediction == FLOW else clean + wide(sigma) * noise


def target(prediction: str, clean: Tensor, noise: Tensor, sigma: Tensor, s: float) -> Tensor:
    """What the network is trained to put out, by the papers' own definitions.

    ε: the noise (Ho et al.). Flow: noise − data (Lipman et al.; Esser et al.). v, for σ in Karras et al.'s notation and
    data of deviation s: with the rescaled time of Salimans and Ho, α = s/√(σ²+s²) and ω = σ/√(σ²+s²), the noisy latent of
    unit variance is α x0/s + ω ε, and v = α ε − ω x0/s.
    """
    if prediction == EPSILON:
        return noise
    if prediction == FLOW:
        return noise - clean
    if prediction == X0:
        return clean
    total = torch.sqrt(wide(sigma) ** 2 + s**2)
    return s / total * noise - wide(sigma) / total * clean / s


def x0_from(prediction: str, output: Tensor, noisy: Tensor, sigma: Tensor, s: float) -> Tensor:
    """The x0 that a host makes of the network's output."""
    sigma = wide(sigma)
    if prediction in (EPSILON, FLOW):
        return noisy - sigma * output
    if prediction == X0:
        return output
    total = sigma**2 + s**2
    return noisy * s**2 / total - output * sigma * s / total.sqrt()


@every_kind
def test_the_right_output_gives_the_right_picture(prediction: str, s: float) -> None:
    """The formulas of this test fit together: the ideal output leads back to x0."""
    clean, noise, sigma = s * normal(BATCH, 4, 3, 5, seed=0), normal(BATCH, 4, 3, 5, seed=1), sigmas(prediction)
    noisy = noised(prediction, clean, noise, sigma)
    ideal = target(prediction, clean, noise, sigma, s)
    assert torch.allclose(x0_from(prediction, ideal, noisy, sigma, s), clean, rtol=1e-12, atol=1e-13)


@every_kind
def test_the_loss_is_the_mean_square_error_of_the_networks_output(prediction: str, s: float) -> None:
    clean, noise, sigma = s * normal(BATCH, 4, 3, 5, seed=0), normal(BATCH, 4, 3, 5, seed=1), sigmas(prediction)
    noisy, output = noised(prediction, clean, noise, sigma), normal(BATCH, 4, 3, 5, seed=2)
    expected = (output - target(prediction, clean, noise, sigma, s)).square().mean()
    predicted = x0_from(prediction, output, noisy, sigma, s)
    # float64 but for the loss itself: pictures rounded to float32 (6e-8) and a difference divided by σ ≥ 0.03.
    got = denoising_loss(predicted, clean, sigma, prediction, sigma_data=s)
    assert float(got) == pytest.approx(float(expected), rel=2e-5)
    error = (predicted - clean).flatten(1).square().mean(1)
    weighed = (prediction_weight(sigma, prediction, s) * error).mean()
    assert float(weighed) == pytest.approx(float(expected), rel=1e-12)


@every_kind
def test_the_gradient_is_that_of_the_networks_output(prediction: str, s: float) -> None:
    """∂ loss / ∂ output = 2 (output − target) / count."""
    clean, noise, sigma = s * normal(BATCH, 2, 3, 3, seed=0), normal(BATCH, 2, 3, 3, seed=1), sigmas(prediction)
    noisy, output = noised(prediction, clean, noise, sigma), normal(BATCH, 2, 3, 3, seed=2).requires_grad_()
    predicted = x0_from(prediction, output, noisy, sigma, s)
    denoising_loss(predicted, clean, sigma, prediction, sigma_data=s).backward()
    expected = 2 * (output.detach() - target(prediction, clean, noise, sigma, s)) / output.numel()
    assert output.grad is not None
    assert torch.allclose(output.grad, expected, rtol=1e-4, atol=1e-6)


@every_kind
def test_samples_count_alike_and_on_their_own(prediction: str, s: float) -> None:
    clean, predicted, sigma = normal(BATCH, 4, 3, 5, seed=0), normal(BATCH, 4, 3, 5, seed=1), sigmas(prediction)
    for gamma in (0.0, 5.0):
        whole = denoising_loss(predicted, clean, sigma, prediction, gamma, s)
        each = [
            denoising_loss(predicted[i : i + 1], clean[i : i + 1], sigma[i : i + 1], prediction, gamma, s)
            for i in range(BATCH)
        ]
        assert float(whole) == pytest.approx(float(torch.stack(each).mean()), rel=1e-6)


def test_half_precision_is_compared_in_single() -> None:
    """300² is beyond float16."""
    clean, predicted = torch.zeros(1, 1, 2, 2).half(), torch.full((1, 1, 2, 2), 300.0).half()
    assert float(denoising_loss(predicted, clean, torch.ones(1), X0)) == 90000


def test_pictures_of_any_dimension() -> None:
    for shape in ((2, 16), (2, 3, 4), (2, 4, 3, 3), (2, 16, 2, 3, 3)):
        assert float(denoising_loss(torch.ones(shape), torch.zeros(shape), torch.ones(2), X0)) == 1


# -- Min-SNR-γ -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0, 20.0])
def test_min_snr_weights_are_the_published_ones(prediction: str, s: float, gamma: float) -> None:
    """Hang et al., section 3.4: on the network's own error min(SNR, γ) / SNR for ε, / (SNR + 1) for v, min(SNR, γ) for x0.

    SNR by the variance-preserving α² / ω² of the definitions above, not by a formula in σ alone. For flow models x0's
    weight, turned into one on v's error by (v error)² = (x0 error)² / σ².
    """
    clean, noise, sigma = s * normal(BATCH, 4, 3, 5, seed=0), normal(BATCH, 4, 3, 5, seed=1), sigmas(prediction)
    noisy, output = noised(prediction, clean, noise, sigma), normal(BATCH, 4, 3, 5, seed=2)
    own = (output - target(prediction, clean, noise, sigma, s)).flatten(1).square().mean(1)
    if prediction == FLOW:
        snr = (1 - sigma) ** 2 / sigma**2
    else:
        alpha, omega = s / torch.sqrt(sigma**2 + s**2), sigma / torch.sqrt(sigma**2 + s**2)
        snr = alpha**2 / omega**2
    least = torch.minimum(snr, torch.full_like(snr, gamma))
    factor = {EPSILON: least / snr, V: least / (snr + 1), X0: least, FLOW: least * sigma**2}[prediction]
    expected = float((factor * own).mean())
    predicted = x0_from(prediction, output, noisy, sigma, s)
    assert float(denoising_loss(predicted, clean, sigma, prediction, gamma, s)) == pytest.approx(expected, rel=2e-5)
    error = (predicted - clean).flatten(1).square().mean(1)
    weighed = (min_snr_weight(sigma, prediction, gamma, s) * error).mean()
    assert float(weighed) == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(signal_to_noise(sigma, prediction, s), snr, rtol=1e-12)


def test_a_large_gamma_gives_epsilons_own_error_back() -> None:
    sigma = sigmas(EPSILON)
    assert torch.allclose(min_snr_weight(sigma, EPSILON, 1e9), prediction_weight(sigma, EPSILON), rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gamma_zero_is_off(prediction: str) -> None:
    clean, predicted, sigma = normal(6, 4, seed=0), normal(6, 4, seed=1), sigmas(prediction)
    own = (prediction_weight(sigma, prediction) * (predicted - clean).square().mean(1)).mean()
    assert float(denoising_loss(predicted, clean, sigma, prediction, 0.0)) == pytest.approx(float(own), rel=1e-6)


# -- attention entropy ---------------------------------------------------------------------------------------


def plain_entropy(q: Tensor, k: Tensor, heads: int) -> float:
    """−Σ p ln p of softmax(q·k / √d), head by head and query by query, in float64."""
    width = q.shape[-1] // heads
    total = []
    for sample in range(q.shape[0]):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for query in q[sample, :, part].double():
                scores = torch.stack([query @ key / math.sqrt(width) for key in k[sample, :, part].double()])
                p = torch.exp(scores) / torch.exp(scores).sum()
                total.append(-float((p * p.log()).sum()))
    return math.fsum(total) / len(total)


@pytest.mark.parametrize(
    ("heads", "width", "queries", "keys"), [(1, 8, 5, 3), (2, 8, 16, 7), (4, 16, 3, 1), (8, 40, 9, 11)]
)
def test_entropy_against_a_plain_softmax(heads: int, width: int, queries: int, keys: int) -> None:
    q, k = normal(2, queries, heads * width, seed=0), normal(2, keys, heads * width, seed=1)
    expected = plain_entropy(q, k, heads)
    assert float(attention_entropy(q.float(), k.float(), heads)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # bf16 keeps 3 digits of q and k.
    assert float(attention_entropy(q.bfloat16(), k.bfloat16(), heads)) == pytest.approx(expected, rel=0.02, abs=1e-6)


@pytest.mark.parametrize("keys", [1, 2, 77, 256])
def test_uniform_attention_has_the_logarithm_of_its_keys(keys: int) -> None:
    q, k = torch.zeros(2, 9, 16), torch.randn(2, keys, 16, generator=torch.Generator().manual_seed(0))
    assert float(attention_entropy(q, k, 4)) == pytest.approx(math.log(keys), abs=1e-5)


def test_attention_to_one_key_has_none_and_extremes_stay_finite() -> None:
    k = torch.eye(8)[None]
    for strength in (1e3, 1e6):
        q = (strength * torch.eye(8))[None].requires_grad_()
        entropy = attention_entropy(q, k, 1)
        entropy.backward()
        assert float(entropy.detach()) == pytest.approx(0, abs=1e-6)
        assert q.grad is not None
        assert bool(q.grad.isfinite().all())


@pytest.mark.parametrize("queries", [1, 255, 256, 257, 1000, 4096])
def test_large_pictures_are_looked_at_in_evenly_spaced_places(queries: int) -> None:
    """At most 256 of the queries, from the first on, at one distance, spread over nearly all of the picture."""
    distance = math.ceil(queries / MAX_QUERIES)
    chosen = list(range(0, queries, distance))
    assert MAX_QUERIES / 2 < len(chosen) <= MAX_QUERIES or len(chosen) == queries
    q, k = normal(1, queries, 4, seed=0).float(), normal(1, 5, 4, seed=1).float()
    expected = plain_entropy(q[:, chosen], k, 1)
    assert float(attention_entropy(q, k, 1)) == pytest.approx(expected, rel=1e-5)


class Block(nn.Module):
    """A cross-attention block, of any width."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.to_q, self.to_k = nn.Linear(width, 16, bias=False), nn.Linear(6, 16, bias=False)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k = self.to_q(x), self.to_k(context)
        return x + (q @ k.transpose(-1, -2)).mean(-1, keepdim=True)


def blocks(heads: tuple[int, int] = (2, 4)) -> tuple[list[Block], EntropyProbe]:
    both = [Block(8, 1), Block(8, 2)]
    return both, EntropyProbe([(b.to_q, b.to_k, h) for b, h in zip(both, heads, strict=True)])


def run(both: list[Block], x: Tensor, context: Tensor, through: Callable[..., Tensor] | None = None) -> Tensor:
    for block in both:
        x = block(x, context) if through is None else through(block, x, context, use_reentrant=False)
    return x


def heard_by_hand(both: list[Block], x: Tensor, context: Tensor, heads: tuple[int, int]) -> float:
    total = 0.0
    with torch.no_grad():
        for block, count in zip(both, heads, strict=True):
            total += plain_entropy(block.to_q(x), block.to_k(context), count) / 2
            x = block(x, context)
    return total


@pytest.mark.parametrize("heads", [(2, 4), (2, 2)], ids=["computed apart", "computed together"])
def test_the_probe_hears_every_block_of_a_forward(heads: tuple[int, int]) -> None:
    both, probe = blocks(heads)
    x, context = normal(3, 5, 8, seed=0).float(), normal(3, 4, 6, seed=1).float()
    with probe.attached():
        assert probe.take() is None
        run(both, x, context)
        entropy = probe.take()
        assert entropy is not None
        assert probe.take() is None, "taken is forgotten"
    assert float(entropy.detach()) == pytest.approx(heard_by_hand(both, x, context, heads), rel=1e-4)
    run(both, x, context)
    assert probe.take() is None, "outside nothing is heard"
    assert not any(b.to_q._forward_hooks or b.to_k._forward_hooks for b in both)


def test_the_probe_counts_every_sample_alike_when_a_batch_runs_in_parts() -> None:
    """Captions that do not fit together run one group after the other."""
    both, probe = blocks()
    x, context = normal(3, 5, 8, seed=0).float(), normal(3, 4, 6, seed=1).float()
    with probe.attached():
        run(both, x, context)
        whole = probe.take()
        probe.forget()
        run(both, x[:2], context[:2])
        run(both, x[2:], context[2:])
        parts = probe.take()
    assert whole is not None
    assert parts is not None
    assert float(parts.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)


def test_entropy_has_the_same_gradient_with_checkpointing() -> None:
    """The backward runs the blocks again. What is heard then must not count in the next step, nor be kept.

    It would keep all that was computed again, which is what checkpointing saves.
    """
    gradients = []
    for through in (None, checkpoint):
        both, probe = blocks()
        x, context = normal(3, 5, 8, seed=0).float().requires_grad_(), normal(3, 4, 6, seed=1).float()
        with probe.attached():
            for _ in range(2):
                x.grad = None
                for block in both:
                    block.zero_grad()
                probe.forget()
                out = run(both, x, context, through)
                entropy = probe.take()
                assert entropy is not None
                (out.square().mean() + entropy).backward()
                assert not probe._recorded
                assert not probe._queries
        gradients.append([x.grad, *(p.grad for b in both for p in b.parameters())])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        assert again is not None
        assert torch.allclose(plain, again, rtol=1e-6, atol=1e-8)


def test_the_probe_leaves_no_hook_after_an_exception() -> None:
    both, probe = blocks()
    x, context = torch.ones(1, 5, 8), torch.ones(1, 4, 6)
    handle = both[1].to_k.register_forward_pre_hook(lambda *_: [][0])
    with pytest.raises(IndexError), probe.attached():
        run(both, x, context)
    handle.remove()
    assert not any(b.to_q._forward_hooks or b.to_k._forward_hooks for b in both)
    assert probe.take() is None

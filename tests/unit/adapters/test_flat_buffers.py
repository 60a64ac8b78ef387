"""Flat buffers: one operation per layer, a few tensors per step, arrays that are rarely resized."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from small_networks import Model, config, frozen, pictures, randomize, relative, set_ranks
from torch import Tensor, nn

from lora2.adapters.capacity import MAX_RESIZES
from lora2.adapters.network import AdaptiveNetwork
from lora2.training.optimizer import Optimizer


@pytest.mark.parametrize(
    ("bias", "weights"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
        (None, torch.float64),
        (torch.float64, torch.float32),
        (None, torch.float32),
    ],
    ids=str,
)
def test_a_plain_layer_and_its_path_are_one_operation(bias: torch.dtype | None, weights: torch.dtype) -> None:
    """Equal to the layer plus its path in float64: output, gradients of the input and of the factors.

    Weight and bias are cast separately where their dtype differs. The layer's hooks stay, and its own forward is restored.
    """
    layer = frozen(nn.Linear(24, 16, bias=bias is not None).to(weights))
    if bias is not None:
        layer.bias.data = layer.bias.data.to(bias)
    hooked: list[torch.Size] = []
    layer.register_forward_hook(lambda _m, _a, out: hooked.append(out.shape))
    network = randomize(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=torch.float64))
    adapter = network.adapters[0]
    for needs in (True, False):
        x = pictures(3, 5, 24).double().requires_grad_(needs)
        network.refresh()
        with network.attached():
            assert "forward" in vars(layer)
            got = layer(x)
        wide = x.detach().clone().requires_grad_()
        down, up = (p.detach().double().requires_grad_() for p in (adapter.down, adapter.up))
        assert adapter.importance is not None
        scale = adapter.importance[:8, None].double()
        expected = nn.functional.linear(
            wide, layer.weight.double(), None if layer.bias is None else layer.bias.double()
        )
        expected = expected + wide @ (down * scale).T @ up
        assert relative(got, expected) < 1e-6, "Λ is computed in float32"
        for out in (got, expected):
            (out - 1).square().mean().backward()
        network.finish_gradients()
        if needs:
            assert x.grad is not None
            assert wide.grad is not None
            assert relative(x.grad, wide.grad) < 1e-6
        for mine, reference in ((adapter.down, down), (adapter.up, up)):
            assert mine.grad is not None
            assert reference.grad is not None
            assert relative(mine.grad, reference.grad) < 1e-6
        network.clear_gradients()
    assert len(hooked) == 2
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory", ["contiguous", "slice", "transposed"])
def test_a_model_may_add_to_a_layers_output_in_place(bias: bool, memory: str) -> None:
    """As Flux does. Autograd forbids it if a custom operation returns a view."""
    layer = frozen(nn.Linear(24, 16, bias=bias).bfloat16())
    network = randomize(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=torch.bfloat16))
    whole = pictures(3, 5, 48).bfloat16().requires_grad_()
    part = whole[..., :24]
    x = {"contiguous": part.contiguous(), "slice": part, "transposed": part.transpose(0, 1)}[memory]
    with network.attached():
        out = layer(x)
        before = out.detach().clone()
        out += 1
    assert torch.equal(out, before + 1)
    out.float().square().mean().backward()
    assert whole.grad is not None
    assert bool(whole.grad.any())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_second_derivative_raises(compute: torch.dtype) -> None:
    layer = frozen(nn.Linear(24, 16).to(compute))
    network = randomize(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=compute))
    x = pictures(3, 24).to(compute).requires_grad_()
    with network.attached(), pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(layer(x).float().square().mean(), x, create_graph=True)


def counted(work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result of a forward pass, and how many numbers it saves for the backward pass."""
    saved: list[int] = []

    def save(value: Tensor) -> Tensor:
        saved.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
        return work(), sum(saved)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_products_of_many_rows_are_recomputed(compute: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are bit-identical: it is the same product of the same numbers."""
    seen = []
    for many in (16, 15):
        monkeypatch.setattr("lora2.adapters.functions.RECOMPUTE_ROWS", many)
        layer = frozen(nn.Linear(24, 16).to(compute))
        network = randomize(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=compute))
        network.refresh()
        adapter, x = network.adapters[0], pictures(3, 5, 24).to(compute).requires_grad_()
        with network.attached():
            out, saved = counted(partial(layer, x))
        (out.float() * pictures(3, 5, 16)).sum().backward()
        network.finish_gradients()
        seen.append((saved, out, x.grad, adapter.down.grad, adapter.up.grad))
    (saved_all, *first), (saved_less, *second) = seen
    assert saved_all - saved_less == 15 * adapter.capacity
    assert all(
        one is not None and one.any() and torch.equal(one, other) for one, other in zip(first, second, strict=True)
    )


def test_steps_over_flat_buffers_equal_steps_over_single_factors() -> None:
    """Flat buffers with joint moments against an optimizer over single tensors, through resizing and restoring."""
    models, settings = [Model().double() for _ in range(2)], config(initial_rank=16, learning_rate=1e-2)
    together, apart = (randomize(AdaptiveNetwork(m.layers(), settings, compute=torch.float64)) for m in models)
    one = Optimizer(together, settings)
    plain = torch.optim.AdamW(apart.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(9):
        if step in (3, 6):
            for network, optimizer in ((together, one.inner), (apart, plain)):
                set_ranks(network, *((4.0, 30.0, 9.0) if step == 3 else (20.0, 5.0, 9.0)))
                network.capacity_policy.resized_at.clear()  # as if the interval were over
                assert network.sync_capacities(optimizer)
        if step == 5:
            one.inner.load_state_dict(one.inner.state_dict())
        for network, model in ((together, models[0]), (apart, models[1])):
            network.refresh()
            network.allocate_gradients()
            with network.attached():
                (model(pictures(3, 5, 24).double()) - 1).square().mean().backward()
        assert one.step(1.0, False, torch.ones(()))
        apart.finish_gradients()
        torch.nn.utils.clip_grad_norm_(apart.parameters(), apart.config.clip_norm or math.inf)
        plain.step()
        apart.clear_gradients()
        assert not {id(p) for p in together.trained_tensors()[:4]} & {id(p) for p in together.parameters()}
        for a, b in zip(together.parameters(), apart.parameters(), strict=True):
            assert relative(a.detach(), b.detach()) < 1e-5


def test_gradients_are_those_of_one_step() -> None:
    """The sums that the backward pass adds to start at zero in every step."""
    model = Model().double()
    network = randomize(AdaptiveNetwork(model.layers(), config(initial_rank=16), compute=torch.float64))
    found = []
    for _ in range(2):
        with network.attached():
            (model(pictures(3, 5, 24).double()) - 1).square().mean().backward()
        network.finish_gradients()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        network.clear_gradients()
    assert relative(found[1], found[0]) < 1e-6


def test_arrays_are_resized_a_few_times_in_a_run_for_any_ranks() -> None:
    """600 steps with θ at full speed up, down, apart, or at random: resizes stay within their limit, and arrays near the ranks."""
    for kind, drift in (("up", 1.0), ("down", -1.0), ("apart", None), ("noise", 0.0)):
        network = AdaptiveNetwork(
            {str(i): nn.Linear(256, 256) for i in range(12)},
            config(initial_rank=40, target_rank=8, steps=600, settle_at=0.5, settle_cuts=1),
        )
        speed = torch.linspace(-1, 1, 12) if drift is None else torch.full((12,), drift)
        generator, resized = torch.Generator().manual_seed(0), 0
        for _ in range(15):
            network.theta.data += 0.15 * speed + 0.03 * torch.randn(12, generator=generator)
            resized += network.sync_capacities()
        assert 1 <= resized <= MAX_RESIZES, kind
        wanted = [min(256, math.exp(t)) for t in network.theta.tolist()]
        held = [a.capacity for a in network.adapters]
        assert sum(held) < 2.2 * sum(wanted) + 12 * 16, kind

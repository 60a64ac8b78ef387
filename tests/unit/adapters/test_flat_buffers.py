"""Factors that lie together: one operation a layer, a few tensors a step, arrays that are seldom resized."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from small_networks import Model, config, frozen, pictures, randomise, relative, set_ranks
from torch import Tensor, nn

from lora2.adapters.capacity import MAX_RESIZES
from lora2.adapters.network import AdaptiveNetwork
from lora2.training.optimizer import Optimizer


@pytest.mark.parametrize("bias", [torch.float64, torch.float32, None], ids=str)
@pytest.mark.parametrize("weights", [torch.float64, torch.float32], ids=str)
def test_a_plain_layer_and_its_path_are_one_operation(bias: torch.dtype | None, weights: torch.dtype) -> None:
    """The same as the layer with its path added, in float64: output, gradient of the input and of the factors.

    Weights and biases of another type are cast, each by itself. The layer keeps its hooks, and gets its own forward back.
    """
    layer = frozen(nn.Linear(24, 16, bias=bias is not None).to(weights))
    if bias is not None:
        layer.bias.data = layer.bias.data.to(bias)
    outputs, heard = [], []
    layer.register_forward_hook(lambda _m, _a, out: heard.append(out.shape))
    network = randomise(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=torch.float64))
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
        outputs.append(got)
    assert len(heard) == 2
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("place", ["contiguous", "of a wider tensor", "turned"])
def test_a_model_may_add_to_a_layers_output_in_place(bias: bool, place: str) -> None:
    """As Flux does: autograd refuses that on a view that an operation of ours gives out."""
    layer = frozen(nn.Linear(24, 16, bias=bias).bfloat16())
    network = randomise(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=torch.bfloat16))
    whole = pictures(3, 5, 48).bfloat16().requires_grad_()
    part = whole[..., :24]
    x = {"contiguous": part.contiguous(), "of a wider tensor": part, "turned": part.transpose(0, 1)}[place]
    with network.attached():
        out = layer(x)
        kept = out.detach().clone()
        out += 1
    assert torch.equal(out, kept + 1)
    out.float().square().mean().backward()
    assert whole.grad is not None
    assert bool(whole.grad.any())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_gradients_that_add_up_in_place_are_not_differentiated_again(compute: torch.dtype) -> None:
    layer = frozen(nn.Linear(24, 16).to(compute))
    network = randomise(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=compute))
    x = pictures(3, 24).to(compute).requires_grad_()
    with network.attached(), pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(layer(x).float().square().mean(), x, create_graph=True)


def counted(work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a forward pass gives, and how many numbers it keeps for the backward pass."""
    held: list[int] = []

    def keep(value: Tensor) -> Tensor:
        held.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        return work(), sum(held)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_products_of_many_rows_are_not_kept_but_worked_out_again(
    compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are the same to the last bit: it is the same product of the same numbers."""
    seen = []
    for many in (16, 15):
        monkeypatch.setattr("lora2.adapters.functions.RECOMPUTE_ROWS", many)
        layer = frozen(nn.Linear(24, 16).to(compute))
        network = randomise(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=compute))
        network.refresh()
        adapter, x = network.adapters[0], pictures(3, 5, 24).to(compute).requires_grad_()
        with network.attached():
            out, held = counted(partial(layer, x))
        (out.float() * pictures(3, 5, 16)).sum().backward()
        network.finish_gradients()
        seen.append((held, out, x.grad, adapter.down.grad, adapter.up.grad))
    (held_all, *first), (held_less, *second) = seen
    assert held_all - held_less == 15 * adapter.capacity
    assert all(
        one is not None and one.any() and torch.equal(one, other) for one, other in zip(first, second, strict=True)
    )


def test_steps_over_blocks_are_the_steps_of_each_factor() -> None:
    """Blocks, whose moments lie together, against an optimizer tensor by tensor, through resizing and restoring."""
    models, told = [Model().double() for _ in range(2)], config(initial_rank=16, learning_rate=1e-2)
    together, apart = (randomise(AdaptiveNetwork(m.layers(), told, compute=torch.float64)) for m in models)
    one = Optimizer(together, told)
    plain = torch.optim.AdamW(apart.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(9):
        if step in (3, 6):
            for network, optimizer in ((together, one.inner), (apart, plain)):
                set_ranks(network, *((4.0, 30.0, 9.0) if step == 3 else (20.0, 5.0, 9.0)))
                network.capacity_policy.at.clear()  # as if there had been time
                assert network.sync(optimizer)
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
        assert not {id(p) for p in together.trained()[:4]} & {id(p) for p in together.parameters()}
        for a, b in zip(together.parameters(), apart.parameters(), strict=True):
            assert relative(a.detach(), b.detach()) < 1e-5


def test_arrays_are_resized_a_few_times_in_a_run_however_ranks_move() -> None:
    """600 steps, θ at full speed up, down, apart, or at random: the bound holds, and arrays hold what is asked for at the end."""
    for kind, drift in (("up", 1.0), ("down", -1.0), ("apart", None), ("noise", 0.0)):
        network = AdaptiveNetwork(
            {str(i): nn.Linear(256, 256) for i in range(12)},
            config(initial_rank=40, target_rank=8, steps=600, settle_at=0.5, settle_cuts=1),
        )
        speed = torch.linspace(-1, 1, 12) if drift is None else torch.full((12,), drift)
        generator, resized = torch.Generator().manual_seed(0), 0
        for _ in range(15):
            network.theta.data += 0.15 * speed + 0.03 * torch.randn(12, generator=generator)
            resized += network.sync()
        assert 1 <= resized <= MAX_RESIZES, kind
        wanted = [min(256, math.exp(t)) for t in network.theta.tolist()]
        held = [a.capacity for a in network.adapters]
        assert sum(held) < 2.2 * sum(wanted) + 12 * 16, kind

"""Layer inputs recomputed in the backward pass: bit-identical, and not held in memory in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recomputed_layers import SIZE, layer_of
from small_networks import config, frozen, pictures, randomize, relative
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lora2.adapters import recompute as inputs
from lora2.adapters.network import AdaptiveNetwork
from lora2.adapters.recompute import recipe_for


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MIN_BYTES", 4 * SIZE * SIZE)


# operations of a host before a layer, on a tensor twice as wide
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "a gated unit": lambda wide: wide.chunk(2, dim=-1)[0] * F.gelu(wide.chunk(2, dim=-1)[1]),
    "a gated unit by SiLU": lambda wide: F.silu(wide[..., :SIZE]) * wide[..., SIZE:],
    "a broadcast product": lambda wide: wide[..., :SIZE] * wide[:1, SIZE:],
    "SiLU": lambda wide: F.silu(wide[..., :SIZE]),
    "GELU": lambda wide: F.gelu(wide[..., :SIZE]),
    "GELU by tanh": lambda wide: F.gelu(wide[..., :SIZE], approximate="tanh"),
}


KINDS = [
    (kind, dtype)
    for kind in ("linear", "linear with a hook", "convolution")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(
    ("before", "kind", "compute"),
    [*((name, "linear", torch.float32) for name in BEFORE), *(("a gated unit", *kind) for kind in KINDS[1:])],
    ids=str,
)
def test_an_input_is_recomputed(before: str, kind: str, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and all gradients are bit-identical, and the input is freed in between."""
    seen: list[list[Tensor | None]] = []
    for min_bytes, saved in ((inputs.MIN_BYTES, False), (10**12, True)):
        monkeypatch.setattr(inputs, "MIN_BYTES", min_bytes)
        layer, network = layer_of(kind, compute)
        network.refresh()
        wide = pictures(2 * SIZE, 2 * SIZE).to(compute).requires_grad_()
        x = BEFORE[before](wide)
        if kind == "convolution":
            x = x.view(8, 4, SIZE // 4, SIZE // 4)
            x = F.silu(x)  # a view itself cannot be recomputed
        storage = StorageWeakRef(x.untyped_storage())
        with network.attached():
            out = layer(x)
        del x
        assert storage.expired() != saved
        (out.float() * pictures(*out.shape)).sum().backward()
        network.finish_gradients()
        seen.append([out, wide.grad, network.adapters[0].down.grad, network.adapters[0].up.grad])
    for one, other in zip(*seen, strict=True):
        assert one is not None
        assert other is not None
        assert one.any()
        assert torch.equal(one, other)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_a_norm_is_recomputed_for_a_wide_layer(affine: bool, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to float32 rounding: gradients differ by 1e-6 of their norm, and the input is freed in between."""
    norm = frozen(nn.LayerNorm(SIZE, elementwise_affine=affine))
    if affine:
        norm.weight.data, norm.bias.data = 1 + pictures(SIZE), pictures(SIZE, seed=2)
    seen = []
    for min_bytes in (inputs.MIN_BYTES, 10**12):
        monkeypatch.setattr(inputs, "MIN_BYTES", min_bytes)
        layer = frozen(nn.Linear(SIZE, inputs.MIN_WIDTH_RATIO * SIZE - (not wide)))
        network = randomize(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8)))
        network.refresh()
        whole = (3 + pictures(SIZE, SIZE)).requires_grad_()
        x = norm(whole)
        storage = StorageWeakRef(x.untyped_storage())
        with network.attached():
            out = layer(x)
        del x
        assert storage.expired() == (wide and min_bytes < 10**12)
        (out * pictures(*out.shape)).sum().backward()
        network.finish_gradients()
        seen.append([whole.grad, network.adapters[0].down.grad, network.adapters[0].up.grad])
    for one, other in zip(*seen, strict=True):
        assert one is not None
        assert other is not None
        assert relative(one, other) <= (1e-6 if wide else 0)


def test_a_norm_with_half_precision_moments_is_not_recomputed() -> None:
    """On the CPU a bfloat16 norm saves them in bfloat16: the result would be wrong in the third digit."""
    coarse = F.layer_norm(pictures(SIZE, SIZE).bfloat16().requires_grad_(), (SIZE,), torch.ones(SIZE).bfloat16())
    assert recipe_for(coarse, 8 * SIZE) is None


def test_a_convolutions_cast_factor_is_recomputed() -> None:
    """The backward pass saves A itself and no copy in the model's dtype."""
    layer = frozen(nn.Conv2d(4, 8, 3, padding=1).bfloat16())
    network = randomize(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8), compute=torch.bfloat16))
    out = network.adapters[0](pictures(1, 4, 8, 8).bfloat16())
    path, *_ = out.grad_fn.next_functions  # type: ignore[union-attr]
    inner: Any = path[0]
    recipe, _versions = inner._raw_saved_weight.data
    assert recipe.parts[0].data_ptr() == network.adapters[0].down.data_ptr()
    with torch.no_grad():
        network.adapters[0].down.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def _in_place(wide: Tensor) -> Tensor:
    return (wide[..., :SIZE] + 0).mul_(wide[..., SIZE:].double())


def _changed(wide: Tensor) -> Tensor:
    x = F.silu(wide[..., :SIZE])
    with torch.no_grad():
        x.clamp_(-0.1, 0.1)
    return x


# inputs that cannot be recomputed
SAVED: dict[str, Callable[[Tensor], Tensor]] = {
    "no operation": lambda wide: wide[..., :SIZE].detach().clone(),
    "a factor is a number": lambda wide: wide[..., :SIZE] * 2,
    "a factor needs no gradient": lambda wide: wide[..., :SIZE] * wide[..., SIZE:].detach(),
    "a sum": lambda wide: wide[..., :SIZE] + wide[..., SIZE:],
    "small": lambda wide: F.silu(wide[:16, :SIZE]),
    "a view": lambda wide: F.silu(wide).view(-1, SIZE),
    "in place": lambda wide: F.silu(wide[..., :SIZE] + 0, inplace=True),
    "in place, by a float64 factor": _in_place,
    "changed in place": lambda wide: F.silu(wide[..., :SIZE]).add_(1),
    "changed unseen by autograd": _changed,
    "without gradients": lambda wide: F.silu(wide[..., :SIZE]).detach(),
}


@pytest.mark.parametrize(
    ("why", "kind"), [*((why, "linear") for why in SAVED), ("a sum", "convolution"), ("small", "convolution")]
)
def test_other_inputs_are_saved(why: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are those without recomputation."""
    seen = []
    for min_bytes in (inputs.MIN_BYTES, 10**12):
        monkeypatch.setattr(inputs, "MIN_BYTES", min_bytes)
        layer, network = layer_of(kind, torch.float32)
        network.refresh()
        x = SAVED[why](pictures(2 * SIZE, 2 * SIZE).requires_grad_())
        assert recipe_for(x, 8 * SIZE) is None
        with network.attached():
            out = layer(x if kind == "linear" else x.reshape(-1, 4, SIZE // 4, SIZE // 4))
        out.square().sum().backward()
        network.finish_gradients()
        seen.append((out, network.adapters[0].down.grad, network.adapters[0].up.grad))
    assert all(
        one is not None and other is not None and torch.equal(one, other) for one, other in zip(*seen, strict=True)
    )


def test_a_part_changed_before_the_forward_pass_is_not_read() -> None:
    """The forward pass succeeds, as it does without adapters; autograd raises in the backward pass."""
    layer, network = layer_of("linear", torch.float32)
    half = pictures(SIZE, SIZE).requires_grad_() + 0
    x = F.silu(half)
    half.mul_(2)
    with network.attached():
        layer(x)
    freed = F.silu(pictures(SIZE, SIZE).requires_grad_())
    freed.sum().backward()
    with network.attached():
        layer(freed)


def test_nothing_is_recomputed_where_hooks_are_forbidden() -> None:
    layer, network = layer_of("convolution", torch.float32)
    x = F.silu(pictures(8, 4, SIZE // 4, SIZE // 4).requires_grad_())
    with network.attached(), torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        layer(x).sum().backward()


def test_tensors_saved_by_a_checkpointed_block_are_not_read() -> None:
    """The backward pass unpacks them once. Reading them earlier would run the block again."""
    calls: list[int] = []
    found: list[object] = []

    def block(x: Tensor) -> Tensor:
        calls.append(1)
        y = F.silu(x)
        found.append(recipe_for(y, 8))
        return y.square().sum()

    checkpoint(block, pictures(SIZE, SIZE).requires_grad_(), use_reentrant=False).backward()
    assert len(calls) == 2
    assert found == [None, None]

    def ends(x: Tensor) -> Tensor:
        calls.append(1)
        return F.silu(x)

    layer, network = layer_of("linear", torch.float32)
    with network.attached():
        out = layer(checkpoint(ends, pictures(SIZE, SIZE).requires_grad_(), use_reentrant=False))
    assert len(calls) == 3, "neither are those of a block before the layer"
    out.sum().backward()
    assert len(calls) == 4


def test_a_part_changed_before_the_backward_pass_raises() -> None:
    """Autograd reports it, as if the operation itself had saved the input."""
    layer = frozen(nn.Linear(SIZE, 16))
    network = randomize(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8)))
    wide = pictures(SIZE, SIZE).requires_grad_() + 0
    with network.attached():
        out = layer(F.silu(wide))
    wide += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

"""Attaching low-rank paths to a model's layers, alone and together with the hooks and wrappers of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recomputed_layers import SIZE, layer_of
from small_networks import Model, config, frozen, network_of, pictures, randomize, relative
from torch import Tensor, nn

from lora2.adapters.network import AdaptiveNetwork


def hooks(model: nn.Module) -> int:
    """The number of hooks and replaced forwards in a model."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + ("forward" in vars(m))
        for m in model.modules()
    )


def test_outside_attached_the_model_is_untouched() -> None:
    model = Model()
    x = pictures(2, 5, 24)
    plain = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    network = randomize(network_of(model))
    assert torch.equal(model(x), plain)
    with network.attached():
        assert hooks(model) == 4, "a convolution has both"
        assert relative(model(x), plain) > 0.01
    assert hooks(model) == 0
    assert torch.equal(model(x), plain)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def raising(error: BaseException) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error

    return hook


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), torch.OutOfMemoryError("x")])
def test_nothing_is_left_behind_after_any_exception(error: BaseException) -> None:
    """Raised inside the model's forward pass."""
    model = Model()
    network = randomize(network_of(model))
    x = pictures(2, 5, 24)
    plain = model(x)
    handle = model.second.register_forward_hook(raising(error))
    with pytest.raises(type(error)), network.attached():
        model(x)
    handle.remove()
    for where in (model.first, model.third):
        handle = where.register_forward_pre_hook(raising(error))
        with pytest.raises(type(error)), network.attached():
            model(x)
        handle.remove()
    assert hooks(model) == 0
    assert torch.equal(model(x), plain)


def test_hooks_of_others_stay() -> None:
    model = Model()
    calls: list[int] = []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    network = network_of(model)
    with network.attached():
        model(pictures(2, 5, 24))
    model(pictures(2, 5, 24))
    assert len(calls) == 2


def test_wrappers_and_hooks_of_others_on_a_convolution_stay() -> None:
    """The host's forward receives all arguments and is restored. Hooks see the layer without its low-rank path, which is added
    after them. A wrapper that is added meanwhile stays, without the path.
    """
    layer = frozen(nn.Conv2d(4, 8, 3))
    own = layer.forward

    def scaled(x: Tensor, by: float = 2.0) -> Tensor:
        return by * own(x)

    layer.forward = scaled  # type: ignore[method-assign]
    layer.register_forward_hook(lambda _m, _a, out: out * 0)
    network = randomize(AdaptiveNetwork({"a.to_q": layer}, config(initial_rank=8)))
    x, path = pictures(2, 4, 8, 8), network.adapters[0]
    with network.attached():
        assert torch.equal(layer(x), path(x))
        assert torch.equal(layer(x, by=3.0), path(x))
    assert vars(layer)["forward"] is scaled
    with network.attached():
        inside = layer.forward
        layer.forward = lambda *args, **named: inside(*args, **named) + 1  # type: ignore[method-assign]
    assert relative(layer.forward(x), 2 * own(x) + 1) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_wrapper_added_while_attached_stays(kind: str) -> None:
    layer, network = layer_of(kind, torch.bfloat16)
    x = pictures(8, SIZE) if kind == "linear" else pictures(8, 4, 16, 16)
    expected = layer(x.bfloat16()) + 1
    with network.attached():
        inside = layer.forward
        layer.forward = lambda y: inside(y) + 1  # type: ignore[method-assign]
    assert torch.equal(layer(x.bfloat16()), expected)

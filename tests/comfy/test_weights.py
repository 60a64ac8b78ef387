"""A base model's weights while it is trained: where they are, and that the host finds them as it left them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from training import pack


@pytest.fixture
def patcher(fresh_model: Callable[[str], Any]) -> Any:
    """A small SD 1.x model."""
    with torch.inference_mode():
        return fresh_model("sd15")


def test_small_buffers_do_not_wait_elsewhere(patcher: Any) -> None:
    """A step that copies one from the CPU cannot be recorded. The meta device stands for a GPU: nothing there is on the CPU."""
    model, meta = patcher.model, torch.device("meta")
    large = torch.zeros(pack("nodes.comfy.weights").SMALL_BUFFER + 1, dtype=torch.uint8)
    model.register_buffer("large", large)  # a table of positions can take half a gigabyte
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    assert "model_sampling.sigmas" in buffers
    with torch.inference_mode(False), pack("nodes.comfy.weights").trainable_weights(model, meta):
        assert {b.device for name, b in model.named_buffers() if name != "large"} == {meta}
        assert model.large.data_ptr() == large.data_ptr()
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert not any(p.is_inference() for p in model.parameters())
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_what_waits_is_pinned_until_the_end(patcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the host's own means, which end it when a patcher of the model is gone: not while a model is trained, but then.

    (Pinned memory needs a GPU: what the host asks of it is recorded.)
    """
    import comfy.model_management as management

    held: dict[int, torch.Size] = {}

    def pin(tensor: torch.Tensor) -> bool:
        new = tensor.data_ptr() not in held
        held[tensor.data_ptr()] = tensor.shape
        return new

    def gone(one: Any) -> None:
        del one
        gc.collect()

    monkeypatch.setattr(management, "pin_memory", pin)
    monkeypatch.setattr(management, "unpin_memory", lambda tensor: bool(held.pop(tensor.data_ptr())))
    every = {w.data_ptr() for w in patcher.model.parameters()}
    patcher.load_device = torch.device("meta")  # stands for a GPU, as above
    patcher.model.register_parameter("there", nn.Parameter(torch.zeros(4, device="meta"), requires_grad=False))
    clone = patcher.clone()

    def trained() -> None:
        with pack("nodes.comfy.weights").offloaded_weights_pinned(clone):
            assert set(held) == every
            gone(patcher.clone())
            assert set(held) == every
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        trained()
    assert set(held) == every
    gone(patcher.clone())
    assert not held


def test_a_host_that_pins_nothing_is_left_alone() -> None:
    class Old:
        model = nn.Linear(2, 2)

    with pack("nodes.comfy.weights").offloaded_weights_pinned(Old()):
        pass
    assert not hasattr(Old, "pinned")


def test_weights_on_their_device_are_not_waiting(patcher: Any) -> None:
    waiting = pack("nodes.comfy.weights").offloaded_weights
    assert not waiting(patcher.model, torch.device("cpu"))
    away = waiting(patcher.model, torch.device("cuda"))
    assert sum(p.nbytes for p in away.values()) == sum(p.nbytes for p in patcher.model.parameters())

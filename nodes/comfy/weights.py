"""Base weights as tensors that autograd accepts, without a second copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

SMALL_BUFFER = 16 * 2**20
"""Buffers of up to this many bytes are moved to the device for training."""


@contextmanager
def trainable_weights(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context: the model's parameters and buffers are plain frozen tensors over the same memory.

    Nodes run in inference mode, where a loaded model's weights are inference tensors, which autograd refuses to save. A new
    tensor over the same storage is a plain one and costs no memory; the original objects return at the end. All weights are
    replaced: one that was moved between devices outside inference mode no longer reports that it is an inference tensor, and
    is refused all the same. LoRAs that the host applies in bypass mode (on quantized models) keep their weights outside the
    model; those are replaced too. Offloaded weights may be saved as well (`_separate_copies`); small buffers are moved to the
    device, as in a fully loaded model. Call with inference mode off.
    """
    swapped: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, original in slots.items():
                if original is None:
                    continue
                alias = plain_tensor(original)
                small = slots is module._buffers and alias.nbytes <= SMALL_BUFFER
                if small and alias.device.type != device.type:
                    alias = alias.to(device)
                swapped.append((slots, name, original, alias))  # type: ignore[arg-type]
    bypasses = [(adapter, adapter.weights) for module in model.modules() for adapter in bypass_adapters(module)]
    try:
        for slots, name, _, alias in swapped:
            slots[name] = alias
        for adapter, weights in bypasses:
            adapter.weights = tuple(plain_tensor(w) if isinstance(w, Tensor) else w for w in weights)
        with _separate_copies():
            yield
    finally:
        for adapter, weights in bypasses:
            adapter.weights = weights
        for slots, name, original, alias in swapped:
            if slots.get(name) is alias:
                slots[name] = original


@contextmanager
def _separate_copies() -> Iterator[None]:
    """Context: an offloaded weight is copied to memory of its own when a layer needs it.

    The host would copy it asynchronously into one of a few shared buffers, overwriting tensors that autograd has saved.
    """
    management: Any = comfy.model_management
    usual = getattr(management, "NUM_STREAMS", None)
    try:
        if usual is not None:
            management.NUM_STREAMS = 0
        yield
    finally:
        if usual is not None:
            management.NUM_STREAMS = usual


def offloaded_weights(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """A loaded model's weights that are not on its device, by key; they are copied there when needed."""
    return {key: p for key, p in model.named_parameters() if p.device.type != device.type}


@contextmanager
def offloaded_weights_pinned(patcher: Any) -> Iterator[None]:
    """Context: offloaded weights are pinned, so that copies are faster and can be recorded (lora2/training/cuda_graph.py).

    The host pins offloaded weights, but not again when the model is reloaded; and it unpins all weights of a model as soon as
    any patcher of it is collected, since patchers share the list. A recorded copy must not lose its source, so the list is
    empty while inside.
    """
    listed: set[str] | None = getattr(patcher, "pinned", None)
    if not isinstance(listed, set) or not hasattr(patcher, "pin_weight_to_device"):
        yield
        return
    for key in offloaded_weights(patcher.model, patcher.load_device):
        patcher.pin_weight_to_device(key)
    pinned = set(listed)
    listed.clear()
    try:
        yield
    finally:
        listed.update(pinned)


def bypass_adapters(module: nn.Module) -> Iterator[Any]:
    """The host's adapters around a module's forward (comfy/weight_adapter/bypass.py), outermost first."""
    forward = vars(module).get("forward")
    while (hook := getattr(forward, "__self__", None)) is not None and hasattr(hook, "original_forward"):
        if isinstance(getattr(getattr(hook, "adapter", None), "weights", None), (tuple, list)):
            yield hook.adapter
        forward = hook.original_forward


def plain_tensor(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd may save; a copy for tensor subclasses, which have no plain storage."""
    with torch.no_grad():
        if type(tensor) not in (Tensor, nn.Parameter):
            plain = tensor.clone()
        else:
            plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain

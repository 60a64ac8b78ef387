"""Base weights as autograd takes them, without a second copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

SMALL_BUFFER = 16 * 2**20
"""Bytes up to which a buffer is on the device while a model is trained, wherever the host has left it."""


@contextmanager
def trainable_weights(model: nn.Module, device: torch.device) -> Iterator[None]:
    """While inside, the model's parameters and buffers are ordinary frozen tensors over the same memory.

    Nodes run in inference mode, where a loaded model's weights are inference tensors that autograd refuses to save. A new
    tensor over the same storage is not one, and costs nothing; the original objects come back at the end, so that the
    host finds what it left. All of them, since a weight that was moved between devices outside inference mode no longer
    says that it is an inference tensor, and is refused all the same. LoRAs that the host applies in bypass mode, as it does
    to quantised models, keep their weights outside the model: the same is done for those. Weights that wait in the CPU's memory
    may be saved too (`_copies_of_their_own`); small buffers are on the device, as in a model that is loaded whole. Call with
    inference mode off.
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
        with _copies_of_their_own():
            yield
    finally:
        for adapter, weights in bypasses:
            adapter.weights = weights
        for slots, name, original, alias in swapped:
            if slots.get(name) is alias:
                slots[name] = original


@contextmanager
def _copies_of_their_own() -> Iterator[None]:
    """While inside, a weight that waits in the CPU's memory is copied to memory of its own when a layer needs it.

    The host would copy it into one of a few buffers, beside its other work: over what autograd has saved of the layers before.
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
    """A loaded model's weights that are elsewhere than on its device, by key: they are copied there when they are needed."""
    return {key: p for key, p in model.named_parameters() if p.device.type != device.type}


@contextmanager
def offloaded_weights_pinned(patcher: Any) -> Iterator[None]:
    """While inside, what waits in the CPU's memory is pinned: copies are faster then, and can be recorded (lora2/training/step.py).

    The host pins what it leaves there, but not anew when such a model is loaded again; and as soon as any patcher of a model is
    gone it lets go of all that is pinned, whose list they share. A recorded copy must not lose its source, so until the end
    the list is empty.
    """
    listed: set[str] | None = getattr(patcher, "pinned", None)
    if not isinstance(listed, set) or not hasattr(patcher, "pin_weight_to_device"):
        yield
        return
    for key in offloaded_weights(patcher.model, patcher.load_device):
        patcher.pin_weight_to_device(key)
    kept = set(listed)
    listed.clear()
    try:
        yield
    finally:
        listed.update(kept)


def bypass_adapters(module: nn.Module) -> Iterator[Any]:
    """The host's adapters around a module's forward (comfy/weight_adapter/bypass.py), from the outermost one in."""
    forward = vars(module).get("forward")
    while (hook := getattr(forward, "__self__", None)) is not None and hasattr(hook, "original_forward"):
        if isinstance(getattr(getattr(hook, "adapter", None), "weights", None), (tuple, list)):
            yield hook.adapter
        forward = hook.original_forward


def plain_tensor(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd may save; a copy only for tensor kinds that have no plain storage."""
    with torch.no_grad():
        if type(tensor) not in (Tensor, nn.Parameter):
            plain = tensor.clone()
        else:
            plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain

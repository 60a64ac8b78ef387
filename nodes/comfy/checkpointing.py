"""Gradient checkpointing of a model's repeated blocks: less memory for a second forward in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...lora2.adapters.attach import replaced_forward


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules to recompute: items of lists and sequences, the innermost ones that contain several layers.

    A list inside a block (SDXL's ten transformer blocks in one) counts instead of the block around it. Sequences
    themselves never count: the host's UNet walks through them without calling them.
    """
    found: list[nn.Module] = []

    def has_list(module: nn.Module) -> bool:
        return any(isinstance(m, nn.ModuleList) for m in module.modules() if m is not module)

    def visit(module: nn.Module, listed: bool) -> None:
        container = isinstance(module, (nn.ModuleList, nn.Sequential))
        if listed and not container and not has_list(module) and sum(1 for _ in module.children()) > 1:
            found.append(module)
            return
        for child in module.children():
            visit(child, listed or container)

    visit(model, False)
    return found


@contextmanager
def checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Context: these blocks keep only their inputs in the forward pass."""
    if blocks:
        _warm_up_attention()
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, _recomputed))
        yield


@cache
def _warm_up_attention() -> None:
    """Run one attention before any block does; once per process.

    On Hopper GPUs torch prefers cuDNN's kernel in the very first call, whatever order the host asks for, and in no later call.
    The first block would be recomputed by another kernel, which checkpointing refuses.
    """
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        with suppress(torch.cuda.OutOfMemoryError):  # blocks are checkpointed to save memory: there may be none left
            q = torch.zeros(1, 1, 8, 64, dtype=torch.float16, device=device)
            comfy.ops.scaled_dot_product_attention(q, q, q)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # Some blocks add to their input in place. Recomputation must start from the original input, and an in-place
        # operation would turn it into a tensor that requires a gradient.
        def fresh(*inner: Any, **named: Any) -> Any:
            return forward(*map(_cloned, inner), **{k: _cloned(v) for k, v in named.items()})

        return checkpoint(fresh, *args, use_reentrant=False, **kwargs)

    return wrapped


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def norm_inputs_copied(model: nn.Module) -> Iterator[None]:
    """Context: normalization layers save a copy of their input for the backward pass.

    The host's transformers add to their residual stream in place, which would change a norm's saved input. (Its UNet does not.)
    """

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_cloned(a) if isinstance(a, Tensor) and a.requires_grad else a for a in args)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__ in ("RMSNorm", "LayerNorm"):
                handle = module.register_forward_pre_hook(keep)
                stack.callback(handle.remove)
        yield

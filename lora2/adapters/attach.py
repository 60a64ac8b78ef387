"""Adds the low-rank paths to a model's layers while they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layer import Adapter
from .recompute import recompute_saved


@contextmanager
def attached(adapters: Sequence[Adapter], is_plain: Callable[[nn.Module], bool]) -> Iterator[None]:
    """While inside, every adapted layer returns its output plus its low-rank path. On exit the model is as it was.

    is_plain: whether a layer computes x Wᵀ + bias from its own weight and bias, and nothing else.
    """
    with ExitStack() as stack:
        for adapter in adapters:
            if adapter.working is not None and is_plain(adapter.module):
                stack.enter_context(replaced_forward(adapter.module, partial(_fused_forward, adapter)))
                continue
            if adapter.is_convolution:
                stack.enter_context(replaced_forward(adapter.module, partial(_recomputing_forward, adapter)))
            stack.callback(adapter.module.register_forward_hook(_adding_hook(adapter)).remove)
        yield


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer computes x Wᵀ + bias from its own weight and bias, and nothing else."""
    return type(module) is nn.Linear and "forward" not in vars(module)


@contextmanager
def replaced_forward(module: Any, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While inside, `change(module.forward)` replaces the module's forward.

    A wrapper that others put around it meanwhile stays, and calls the module's own forward afterwards.
    """
    own, found, inside = module.forward, vars(module).get("forward"), True
    changed = change(own)

    def forward(*args: Any, **named: Any) -> Any:
        return (changed if inside else own)(*args, **named)

    module.forward = forward
    try:
        yield
    finally:
        inside = False
        if vars(module).get("forward") is forward:
            if found is None:
                del module.forward
            else:  # a wrapper of the host or of another pack
                module.forward = found


def _fused_forward(adapter: Adapter, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A plain layer's forward with its low-rank path, in one operation where the types allow it."""
    module: Any = adapter.module

    def forward(x: Tensor) -> Tensor:
        if adapter.can_fuse(module.weight, x):
            return adapter.fused_linear(x, module.weight, module.bias)
        return adapter.add(own(x), x)

    return forward


def _recomputing_forward(adapter: Adapter, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A convolution's forward that does not save its input where it can be recomputed; torch's saves it even if frozen."""

    def forward(x: Tensor, *args: Any, **named: Any) -> Tensor:
        with recompute_saved((x, adapter.recipe(x))):
            return own(x, *args, **named)

    return forward


def _adding_hook(adapter: Adapter) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return adapter.add(output, args[0])

    return add

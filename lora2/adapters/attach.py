"""A model's layers with their adapters' paths, for as long as they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layer import Adapter
from .recompute import recompute_saved


@contextmanager
def attached(adapters: Sequence[Adapter], plain: Callable[[nn.Module], bool]) -> Iterator[None]:
    """While inside, the adapted layers answer with their adapters' paths added; nothing is left behind after.

    plain: which layers compute x Wᵀ + bias from their own weight and bias, and no more.
    """
    with ExitStack() as stack:
        for adapter in adapters:
            if adapter.working is not None and plain(adapter.module):
                stack.enter_context(replaced_forward(adapter.module, partial(_together, adapter)))
                continue
            if adapter.convolution:
                stack.enter_context(replaced_forward(adapter.module, partial(_without_its_input, adapter)))
            stack.callback(adapter.module.register_forward_hook(_hook(adapter)).remove)
        yield


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer computes x Wᵀ + bias from its own weight and bias, and nothing else."""
    return type(module) is nn.Linear and "forward" not in vars(module)


@contextmanager
def replaced_forward(module: Any, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While inside, `change` of a module's forward stands in its place.

    What others have put around it meanwhile stays, and comes to the module's own forward after that.
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
            else:  # the host's or another pack's, around a layer that they change
                module.forward = found


def _together(adapter: Adapter, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A plain layer's forward with its adapter's path, in one operation where types allow."""
    module: Any = adapter.module

    def forward(x: Tensor) -> Tensor:
        if adapter.can_fuse(module.weight, x):
            return adapter.linear(x, module.weight, module.bias)
        return adapter.add(own(x), x)

    return forward


def _without_its_input(adapter: Adapter, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A convolution's forward, which keeps its input also where it is frozen, and makes it again where it can."""

    def forward(x: Tensor, *args: Any, **named: Any) -> Tensor:
        with recompute_saved((x, adapter.recipe(x))):
            return own(x, *args, **named)

    return forward


def _hook(adapter: Adapter) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return adapter.add(output, args[0])

    return add

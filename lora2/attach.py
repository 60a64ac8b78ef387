"""A model's layers with their adapters' paths, for as long as they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .adapter import Adapter
from .inputs import made_again, recipe_of


@contextmanager
def attached(adapters: Sequence[Adapter], plain: Callable[[nn.Module], bool]) -> Iterator[None]:
    """While inside, the adapted layers answer with their adapters' paths added; nothing is left behind after.

    plain: which layers compute x Wᵀ + bias from their own weight and bias, and no more.
    """
    with ExitStack() as stack:
        for adapter in adapters:
            if adapter.convolution or (adapter.working is not None and plain(adapter.module)):
                stack.enter_context(_in_place_of(adapter))
            else:
                stack.callback(adapter.module.register_forward_hook(_hook(adapter)).remove)
        yield


def plain_linear(module: nn.Module) -> bool:
    """Whether a layer computes x Wᵀ + bias from its own weight and bias, and nothing else."""
    return type(module) is nn.Linear and "forward" not in vars(module)


@contextmanager
def _in_place_of(adapter: Adapter) -> Iterator[None]:
    """While inside, a layer's own forward is computed together with its adapter's path.

    In one operation for a plain layer where types allow. A convolution keeps its input also where it is frozen; both make it
    again where they can.
    """
    module: Any = adapter.module
    own, found = module.forward, vars(module).get("forward")

    def forward(x: Tensor) -> Tensor:
        if adapter.convolution:
            with made_again((x, recipe_of(x, adapter.shape[0]))):
                output = own(x)
            return adapter.add(output, x)
        if adapter.replaces(module.weight, x):
            return adapter.linear(x, module.weight, module.bias)
        return adapter.add(own(x), x)

    module.forward = forward
    try:
        yield
    finally:
        if found is None:
            del module.forward
        else:  # the host's, around a layer that it changes
            module.forward = found


def _hook(adapter: Adapter) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return adapter.add(output, args[0])

    return add

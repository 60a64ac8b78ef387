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
            if adapter.working is not None and plain(adapter.module):
                stack.enter_context(_in_place_of(adapter))
                continue
            if adapter.convolution:
                stack.enter_context(_input_made_again(adapter))
            stack.callback(adapter.module.register_forward_hook(_hook(adapter)).remove)
        yield


def plain_linear(module: nn.Module) -> bool:
    """Whether a layer computes x Wᵀ + bias from its own weight and bias, and nothing else."""
    return type(module) is nn.Linear and "forward" not in vars(module)


@contextmanager
def _forward(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While inside, this is the module's forward. What others have put around it meanwhile stays."""
    found = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if vars(module).get("forward") is forward:
            if found is None:
                del module.forward
            else:  # the host's, around a layer that it changes
                module.forward = found


@contextmanager
def _in_place_of(adapter: Adapter) -> Iterator[None]:
    """While inside, a plain layer is computed together with its adapter's path, in one operation where types allow."""
    module: Any = adapter.module
    own, inside = module.forward, True

    def forward(x: Tensor) -> Tensor:
        if not inside:
            return own(x)
        if adapter.replaces(module.weight, x):
            return adapter.linear(x, module.weight, module.bias)
        return adapter.add(own(x), x)

    try:
        with _forward(module, forward):
            yield
    finally:
        inside = False


@contextmanager
def _input_made_again(adapter: Adapter) -> Iterator[None]:
    """While inside, a convolution, which keeps its input also where it is frozen, makes it again where it can."""
    own = adapter.module.forward

    def forward(x: Tensor, *args: Any, **named: Any) -> Tensor:
        with made_again((x, recipe_of(x, adapter.shape[0]))):
            return own(x, *args, **named)

    with _forward(adapter.module, forward):
        yield


def _hook(adapter: Adapter) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return adapter.add(output, args[0])

    return add

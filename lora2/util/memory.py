"""Out-of-memory errors: how to recognize them, and how to free memory after one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import LoraError

T = TypeVar("T")

_MESSAGES = ("out of memory", "alloc_failed", "can't allocate memory")
"""How libraries below torch report it, in plain RuntimeErrors."""


class OutOfMemory(LoraError):
    """Out of memory, with no setting left that would need less. The network is unharmed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, by its type or message, or was raised while such an error was handled."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(message in str(error).lower() for message in _MESSAGES):
        return True
    # For example a CUDA graph whose capture cannot be ended properly after the first error.
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def free_cached_memory() -> None:
    """Collect reference cycles, which may hold tensors, then empty the CUDA allocator's cache."""
    gc.collect()
    torch.cuda.empty_cache()


def try_allocating(work: Callable[[], T]) -> tuple[T] | None:
    """Run `work` and return its result in a tuple, or None on out-of-memory.

    The exception is dropped so that it keeps no tensors alive. Other exceptions pass.
    """
    try:
        return (work(),)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def on_device_or_cpu(device: torch.device, work: Callable[[torch.device], T]) -> T:
    """Run `work` on the device, or on the CPU if the device is out of memory."""
    done = try_allocating(lambda: work(device))
    return done[0] if done else work(torch.device("cpu"))

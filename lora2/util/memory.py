"""When memory runs out: how that is known, and how what a failed attempt held is let go."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import LoraError

T = TypeVar("T")

_WORDS = ("out of memory", "alloc_failed", "can't allocate memory")
"""What libraries below torch say, in errors that are plain RuntimeErrors."""


class OutOfMemory(LoraError):
    """Memory ran out, and nothing is left that could be changed. What was learned is still there."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: torch's own kind, a library's by its words, or one on the way out of such."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(words in str(error).lower() for words in _WORDS):
        return True
    return error.__context__ is not None and is_out_of_memory(
        error.__context__
    )  # a recording that cannot be ended well, say


def free_cached_memory() -> None:
    """Give back what nobody refers to any more: cycles first, which hold tensors too, then the allocator's cache."""
    gc.collect()
    torch.cuda.empty_cache()


def try_allocating(work: Callable[[], T]) -> list[T]:
    """What `work` gives, or nothing where memory ran out: the error ends here, and with it what it held."""
    try:
        return [work()]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return []


def on_device_or_cpu(device: torch.device, work: Callable[[torch.device], T]) -> T:
    """What `work` gives on this device; on the CPU where its memory runs out."""
    done = try_allocating(lambda: work(device))
    return done[0] if done else work(torch.device("cpu"))

"""Many small pieces of work shared out over the CPU's cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

MOST_WORKERS = 16


def workers() -> int:
    """How many pieces are worked on at once: as many as torch uses cores."""
    return min(torch.get_num_threads(), MOST_WORKERS)


def shared_out(works: Iterable[Callable[[], T]]) -> list[T]:
    """What these give, in their order.

    Each keeps one core busy: torch would use all of them for every small operation, and wait longer for them than they work.
    What a piece raises is raised here, that of the first one in order. Works are asked for here, in their order, while others
    are under way.
    """
    cores = torch.get_num_threads()
    if cores == 1:
        return [work() for work in works]
    try:
        with ThreadPoolExecutor(workers(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return [waiting.result() for waiting in [pool.submit(torch.no_grad()(work)) for work in works]]
    finally:
        torch.set_num_threads(cores)  # threads to come take the number that was set last

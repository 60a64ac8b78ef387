"""Many small pieces of work shared out over the CPU's cores."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

T = TypeVar("T")

MAX_WORKERS = 16


def workers() -> int:
    """How many pieces are worked on at once: as many as torch uses cores."""
    return min(torch.get_num_threads(), MAX_WORKERS)


def run_parallel(works: Iterable[Callable[[], T]]) -> list[T]:
    """What these give, in their order.

    Each keeps one core busy: torch would use all of them for every small operation, and wait longer for them than they work.
    What a piece raises is raised here, that of the first one in order. Works are asked for here, in their order, while others
    are under way.
    """
    if workers() == 1:
        return [work() for work in works]
    cores, waiting, more = torch.get_num_threads(), deque[tuple[int, Callable[[], T]]](), threading.Condition()
    results, errors, open_ = dict[int, T](), dict[int, Exception](), [True]

    def keep_working() -> None:
        torch.set_num_threads(1)
        while True:
            with more:
                more.wait_for(lambda: waiting or not open_)
                if not waiting:
                    return
                index, work = waiting.popleft()
            try:
                with torch.no_grad():
                    results[index] = work()
            except Exception as error:
                errors[index] = error

    threads = [threading.Thread(target=keep_working, daemon=True) for _ in range(workers())]
    try:
        for thread in threads:
            thread.start()
        for index, work in enumerate(works):
            with more:
                waiting.append((index, work))
                more.notify()
    except BaseException:
        waiting.clear()
        raise
    finally:
        with more:
            open_.clear()
            more.notify_all()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(cores)  # threads to come take the number that was set last
    if errors:
        raise errors[min(errors)]
    return [results[index] for index in range(len(results))]

"""Many small CPU tasks in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

MAX_WORKERS = 16


def worker_count() -> int:
    """Number of tasks that run at once: one per thread of torch."""
    return min(torch.get_num_threads(), MAX_WORKERS)


def run_parallel(tasks: Iterable[Callable[[], T]]) -> list[T]:
    """Run the tasks in parallel, without gradients; return their results in order.

    Each task runs on one thread: torch would split every small operation over all cores and lose more time to
    synchronization than it gains. `tasks` is iterated in the calling thread while earlier tasks run. If tasks raise, the
    exception of the first one in order is raised here.
    """
    if worker_count() == 1:
        return [task() for task in tasks]
    threads = torch.get_num_threads()

    def run(task: Callable[[], T]) -> T:
        with torch.no_grad():
            return task()

    try:
        with ThreadPoolExecutor(worker_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                futures = [pool.submit(run, task) for task in tasks]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]
    finally:
        torch.set_num_threads(threads)  # new threads take the number that was set last

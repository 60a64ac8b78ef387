"""Tasks in parallel threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from lora2.util.thread_pool import run_parallel


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads that torch uses."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    """It takes the number that was set last by any thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def fail(at: int, index: int) -> int:
    if index >= at:
        raise ValueError(f"task {index}")
    return index * index


def test_results_are_in_order(threads: int) -> None:
    assert run_parallel(partial(fail, 100, i) for i in range(50)) == [i * i for i in range(50)]
    assert run_parallel([]) == []
    assert torch.get_num_threads() == threads
    assert threads_of_a_new_thread() == threads


def test_tasks_run_at_once_on_one_thread_each(threads: int) -> None:
    barrier = threading.Barrier(threads)

    def meet() -> tuple[int, bool]:
        barrier.wait(60)  # passes only if all run at once
        return torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        assert run_parallel([meet] * threads) == [(1, False)] * threads


def test_the_first_error_in_order_is_raised(threads: int) -> None:
    with pytest.raises(ValueError, match="task 7"):
        run_parallel(partial(fail, 7, i) for i in range(20))
    assert torch.get_num_threads() == threads


def test_an_error_of_the_iterator_ends_the_threads(threads: int) -> None:
    done: list[int] = []

    def tasks() -> Iterator[Callable[[], None]]:
        yield partial(done.append, 1)
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run_parallel(tasks())
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_queued_tasks_are_dropped_after_an_error_of_the_iterator() -> None:
    torch.set_num_threads(2)
    started, release = threading.Barrier(3), threading.Event()
    done: list[int] = []

    def block() -> None:
        started.wait(60)
        release.wait(60)

    def tasks() -> Iterator[Callable[[], None]]:
        yield from [block, block, partial(done.append, 1)]
        started.wait(60)
        threading.Timer(0.1, release.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parallel(tasks())
    assert not done

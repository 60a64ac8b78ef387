"""Work shared out over cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from lora2.util.thread_pool import run_parallel


@pytest.fixture(params=[1, 2, 5])
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many cores as torch believes in."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def fail(at: int, index: int) -> int:
    if index >= at:
        raise ValueError(f"piece {index}")
    return index * index


def test_results_come_in_order(cores: int) -> None:
    assert run_parallel(partial(fail, 100, i) for i in range(50)) == [i * i for i in range(50)]
    assert run_parallel([]) == []
    assert torch.get_num_threads() == cores


def test_pieces_run_at_once_and_use_one_core_each(cores: int) -> None:
    meeting = threading.Barrier(cores)

    def meet() -> tuple[int, bool]:
        meeting.wait(60)  # all are there only if all run at once
        return torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        assert run_parallel([meet] * cores) == [(1, False)] * cores


def test_the_first_error_in_order_is_raised(cores: int) -> None:
    with pytest.raises(ValueError, match="piece 7"):
        run_parallel(partial(fail, 7, i) for i in range(20))
    assert torch.get_num_threads() == cores


def test_whoever_stops_asking_stops_the_work(cores: int) -> None:
    done: list[int] = []

    def works() -> Iterator[Callable[[], None]]:
        yield partial(done.append, 1)
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run_parallel(works())
    assert threading.active_count() == before
    assert torch.get_num_threads() == cores

"""Work that nothing waits for until a step ends, on a stream of its own beside the work that the next layer waits for.

A layer's low-rank products are so small that most of a GPU rests while one of them runs. Launched kernel by kernel that makes no
difference; a recorded step has the time of its longest chain, and the gradients of factors need not be in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

BEHIND = 3
"""Pieces of work that may be open: their inputs are held until the main stream has waited for them."""

Work = Callable[[], object]


class Beside:
    """A second stream of a GPU. Inside `around`, `alongside` in this module hands work to it.

    Memory that the main stream frees is used again in the main stream's order, which knows nothing of this one: so tensors
    that a piece of work reads are kept until the main stream has waited for that piece.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = _stream(device)
        self._open: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def run(self, work: Work, reads: tuple[Tensor, ...]) -> None:
        """Let this run after all that the current stream has been given; it may allocate nothing that outlives it."""
        while len(self._open) >= BEHIND:
            self._wait_for_oldest()
        self.stream.wait_stream(self._main())
        with torch.cuda.stream(self.stream):
            work()
        self._open.append((self.stream.record_event(), reads))

    def join(self) -> None:
        """What the current stream is given from here on runs after all of it."""
        while self._open:
            self._wait_for_oldest()

    def abandon(self) -> None:
        """After an error: nothing of what is open is wanted any more. What was being recorded has not run at all."""
        self._open.clear()
        if not torch.cuda.is_current_stream_capturing():
            self._main().wait_stream(self.stream)

    def _wait_for_oldest(self) -> None:
        event, _ = self._open.popleft()
        self._main().wait_event(event)

    def _main(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.stream.device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: libraries keep a buffer for every stream that they have worked on."""
    return torch.cuda.Stream(device)


_beside: Beside | None = None


@contextmanager
def around(beside: Beside | None) -> Iterator[None]:
    """While inside, in every thread, work is handed to `beside`; all of it is joined at the end. None: it runs at once.

    The backward pass runs in a thread of autograd's own, so this is the module's, not a thread's.
    """
    global _beside
    _beside = beside
    try:
        yield
    except BaseException:
        if beside is not None:
            beside.abandon()
        raise
    else:
        if beside is not None:
            beside.join()
    finally:
        _beside = None


def alongside(work: Work, *reads: Tensor) -> None:
    """Run work that only reads these tensors and adds to others that nobody looks at before the step's end."""
    if _beside is None:
        work()
    else:
        _beside.run(work, reads)

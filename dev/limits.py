"""Work that may take so long and no longer."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from typing import Any

AGAIN = 20
"""Seconds after which a piece of work that caught the error is told again."""


class Overrun(Exception):
    """Work took longer than it may."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise Overrun inside after so many seconds, and again and again until it is over; where there are no signals, never."""

    def ring(_number: int, _frame: Any) -> None:
        raise Overrun(f"not done after {seconds:.0f} s")

    if not math.isfinite(seconds) or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

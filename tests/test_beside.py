"""Work beside the main line: what is put off to a step's end, and that nothing needs it before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recording import TapeEngine, recordable
from test_recording import CASES, trainer_of
from test_trainer import learned, same
from torch import Tensor

from lora2 import beside
from lora2.beside import Beside, alongside, around


class Late(Beside):
    """The slowest second stream that there can be: it does nothing until it is waited for. Sees whether inputs stay."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Any, tuple[Tensor, ...], list[int]]] = []
        self.done = self.abandoned = 0

    def run(self, work: Any, reads: tuple[Tensor, ...]) -> None:
        self.waiting.append((work, reads, [t._version for t in reads]))

    def join(self) -> None:
        for work, reads, versions in self.waiting:
            assert [t._version for t in reads] == versions, "an input was written over"
            work()
            self.done += 1
        self.waiting.clear()

    def abandon(self) -> None:
        self.waiting.clear()
        self.abandoned += 1


@pytest.mark.parametrize("case", ["ranks fall", "settled half-way", "buckets", "everything"])
def test_steps_do_not_need_the_factors_gradients_before_their_end(case: str) -> None:
    """Recorded or as written: bit for bit the run that works them out at once, since the products are the same."""
    pictures, changes = CASES[case]
    with recordable():
        at_once = trainer_of(True, torch.bfloat16, pictures, **changes)
        at_once.run()
        trainer = trainer_of(True, torch.bfloat16, pictures, **changes)
        assert isinstance(trainer.engine, TapeEngine)
        trainer.engine.beside = late = Late()
        trainer.run()
    assert late.done > 0
    assert not late.waiting
    assert trainer.engine.refused == 0
    assert trainer.progress.losses == at_once.progress.losses
    assert same(learned(trainer), learned(at_once))


def broken(late: Late, work: Any) -> None:
    """A step that fails after it has put this off."""
    with around(late):
        alongside(work)
        raise ZeroDivisionError


def test_work_is_joined_at_the_end_and_given_up_after_an_error() -> None:
    done: list[int] = []
    alongside(lambda: done.append(0))
    assert done == [0], "at once where there is no second stream"
    late = Late()
    with around(late):
        alongside(lambda: done.append(1), torch.zeros(1))
        assert done == [0]
    assert done == [0, 1]
    with pytest.raises(ZeroDivisionError):
        broken(late, lambda: done.append(2))
    assert (done, late.abandoned, beside._beside) == ([0, 1], 1, None)
    with around(None):
        alongside(lambda: done.append(3))
    assert done == [0, 1, 3]

"""What each setting of the method does: one change at a time, on the subjects that settings are tuned on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence.comparison import Config, job, tuning_names
from benchmarks.evidence.personal import PAPER, SETTLING, Job

RANK, PICTURES = 4, 24

CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rank_weight 0": {"rank_weight": 0.0},
    "rank_weight 1e-3": {"rank_weight": 1e-3},
    "rank_weight 1e-2": {"rank_weight": 1e-2},
    "init paper": {"init": "paper"},
    "rank_hold 0": {"rank_hold": 0.0},
    "rank_hold 0.2": {"rank_hold": 0.2},
    "rank_learning_rate 0.003": {"rank_learning_rate": 3e-3},
    "rank_learning_rate 0.03": {"rank_learning_rate": 3e-2},
    "q 0.5": {"q": 0.5},
    "q 0.99": {"q": 0.99},
    "settle_at 0.1": {"settle_at": 0.1},
    "settle_at 0.25": {"settle_at": 0.25},
    "settle_at 0.75": {"settle_at": 0.75},
    "initial_rank 8": {"initial_rank": 8},
    "initial_rank 32": {"initial_rank": 32},
    "initial_rank 64": {"initial_rank": 64},
}
PAPER_CHANGES: dict[str, dict[str, Any]] = {
    "paper, as it is": {},
    "paper, rank_weight 0": {"rank_weight": 0.0},
    "paper, rank_weight 1e-3": {"rank_weight": 1e-3},
    "paper, init paper": {"init": "paper"},
}
SEEDS = (0, 1)


def jobs(tuned: dict[Config, tuple[float, int]]) -> Iterator[Job]:
    """Every change at the learning rate that is best without it."""
    for method, changes in ((SETTLING, CHANGES), (PAPER, PAPER_CHANGES)):
        config = (method, RANK if method == SETTLING else 8, PICTURES)
        for change in changes.values():
            for name in tuning_names():
                for seed in SEEDS:
                    yield job(config, name, tuned[config][0], seed, changes=tuple(change.items()))

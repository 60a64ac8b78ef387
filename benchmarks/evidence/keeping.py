"""A target that is only the most: the last cut keeps as few positions as hold a share of what all are worth (settle_keep)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.evidence.comparison import COUNTS, SEEDS, Tuned, job, tuning_names
from benchmarks.evidence.personal import SETTLING, Job
from dev.painter.subjects import SUBJECTS

MOST = 32
"""The target."""
KEEPS = (0.8, 0.9, 0.95, 0.98)
"""Shares, on the subjects that settings are tuned on."""
REPORTED = (0.9, 0.95)
"""Shares, on those that are reported."""


def keep_job(subject: str, count: int, keep: float, tuned: Tuned, seed: int) -> Job | None:
    """An adaptation at the learning rate of the whole target; None where that is not known."""
    choice = tuned.get((SETTLING, MOST, count))
    if choice is None:
        return None
    return job((SETTLING, MOST, count), subject, choice.rate, seed, changes=(("settle_keep", keep),))


def jobs(tuned: Tuned, counts: Sequence[int] = COUNTS) -> Iterator[Job]:
    """Everything."""
    wanted = [(name, keep, 0) for keep in KEEPS for name in tuning_names()]
    wanted += [(subject.name, keep, seed) for keep in REPORTED for seed in SEEDS for subject in SUBJECTS]
    for count in counts:
        for name, keep, seed in wanted:
            if found := keep_job(name, count, keep, tuned, seed):
                yield found

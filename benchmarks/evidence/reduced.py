"""The reduced form of the experiments on subjects: a few short adaptations on a CPU, shared by those that ask for the same."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.comparison import ALLOCATED, RESIZED, Choice, Config
from benchmarks.evidence.personal import FIXED, PAPER, SETTLING, Job
from benchmarks.evidence.pool import Pool, Record

SUBJECTS = ("grid 3x3", "grid 8x8")
PICTURES, STEPS, RANK, LARGE = 24, 100, 4, 32
RATES = {SETTLING: 10**-2.5, FIXED: 10**-2.5, PAPER: 10**-2.0}
"""Near what tuning chooses in the full run."""
PROCESSES = 2
LONGEST = 600.0
"""Seconds for one adaptation: a slow machine that does other work too."""

_DONE: dict[str, Record] = {}


def job(
    config: Config,
    subject: str,
    seed: int = 0,
    cuts: bool = True,
    steps: int = STEPS,
    changes: tuple[tuple[str, Any], ...] = (),
) -> Job:
    """An adaptation of this size; with the cuts that are compared."""
    method, rank, count = config
    if method in (RESIZED, ALLOCATED):
        method, rank = FIXED, LARGE
    more: tuple[str, ...] = ()
    if cuts and method in (FIXED, SETTLING):
        more = (RESIZED,) if rank == LARGE else ("shortened",)
    return Job(subject, count, method, rank, RATES[method], seed, steps, changes, more=more)


def choice(config: Config) -> Choice:
    """Its learning rate, and its last step."""
    method = FIXED if config[0] in (RESIZED, ALLOCATED) else config[0]
    return Choice(RATES[method], STEPS)


def records(jobs: Sequence[Job]) -> dict[str, Record]:
    """The records of these jobs by key; those that this process has made already are not made again.

    Raises RuntimeError where a job failed.
    """
    missing = [one for one in dict.fromkeys(jobs) if one.key not in _DONE]
    if missing:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        with tempfile.TemporaryDirectory() as folder:
            pool = Pool(Path(folder) / "records.jsonl", PROCESSES, longest=LONGEST)
            try:
                pool.run(missing)
            finally:
                pool.close()
            if pool.failed:
                raise RuntimeError(f"{len(pool.failed)} of {len(missing)} adaptations failed")
            _DONE.update(pool.records)
    return {one.key: _DONE[one.key] for one in jobs}

"""Records of the full run, as docs/evidence/records.jsonl.gz holds them (keep_records.py writes that file)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.evidence import comparison
from benchmarks.evidence.comparison import Tuned
from benchmarks.evidence.experiment import FOLDER
from benchmarks.evidence.personal import Job
from benchmarks.evidence.pool import Record

FILE = FOLDER / "records.jsonl.gz"
WHERE = ("device", "torch", "date")
"""What a record says of the machine that made it."""


class Stored:
    """Records that are there, where a `Pool` would make those that are missing."""

    out_of_time = False

    def __init__(self, records: Mapping[str, Record]) -> None:
        self.records = dict(records)
        self.failed: dict[str, str] = {}
        self.asked: set[str] = set()
        """The keys of all jobs that were asked for."""

    def run(self, jobs: Iterable[Job]) -> list[Record]:
        """The records of those jobs that are there."""
        jobs = list(jobs)
        self.asked |= {job.key for job in jobs}
        return [self.records[job.key] for job in jobs if job.key in self.records]


def choices(stored: Stored) -> dict[comparison.Config, comparison.Choice]:
    """What tuning chose."""
    return comparison.tune(stored, comparison.configs(), comparison.tuning_names())


@lru_cache(maxsize=1)
def read(path: Path = FILE) -> tuple[dict[str, Any], dict[str, Record]]:
    """What `write` wrote: where and when, and the records by key."""
    first, *lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return json.loads(first), {record["key"]: record for record in map(json.loads, lines)}


@lru_cache(maxsize=1)
def full() -> tuple[dict[str, Any], dict[str, Record], Tuned]:
    """Where and when the full run was made, its records, and what tuning chose."""
    about, records = read()
    return about, records, choices(Stored(records))

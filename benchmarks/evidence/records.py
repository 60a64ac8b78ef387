"""The records of the full run, kept in docs/evidence/ without what no page uses.

`python -m benchmarks.evidence.records RECORDS` writes them from the file that the GPU run made: only those of the jobs that its
stages ask for. Prints what is missing. `--begin` makes such a file instead, to go on from: all that is kept, or with `--changed`,
after a change of ours, all but ours.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.evidence import comparison, complexity, decay, keeping, longer, variants
from benchmarks.evidence.comparison import Tuned
from benchmarks.evidence.experiment import FOLDER
from benchmarks.evidence.personal import SETTLING, Job
from benchmarks.evidence.pool import Record, read_records

FILE = FOLDER / "records.jsonl.gz"
WHERE = ("device", "torch", "date")
"""What a record says of the machine that made it."""
_LEFT_OUT = ("subject", "pictures", "rank", "rate", "seed", "steps", "twist", "file", "seconds")
"""What the key says too, or no page uses."""

_LOADERS_CUTS = ("shortened", "shared_out")
"""They are told of the reported subjects alone."""


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


def compact(records: Mapping[str, Record]) -> tuple[dict[str, Any], list[Record], set[str]]:
    """Where and when they were made, the records that pages use, and the keys of those that are missing."""
    stored = Stored(records)
    tuned = choices(stored)
    stored.run(variants.jobs(tuned))
    stored.run(comparison.reported(tuned))
    stored.run(keeping.jobs(tuned))
    stored.run(complexity.jobs(tuned))
    stored.run(decay.jobs())
    stored.run(longer.jobs(tuned))
    used = [records[key] for key in sorted(stored.asked & set(records))]
    about = {
        **{name: ", ".join(sorted({r[name] for r in used})) for name in WHERE},
        "devices": dict(sorted(Counter(r["device"] for r in used).items())),
        "size": "full",
        "runs": len(used),
    }
    return about, [_slim(r) for r in used], stored.asked - set(records)


def _slim(record: Record) -> Record:
    slim = {name: value for name, value in record.items() if name not in _LEFT_OUT}
    if record["subject"] in comparison.tuning_names():
        slim["marks"] = [{k: v for k, v in mark.items() if k not in _LOADERS_CUTS} for mark in slim["marks"]]
    if "ranks" in slim:
        slim["ranks"] = _values(slim["ranks"])
    if "use" in slim:
        slim["use"] = dict(slim["use"], layers=_values(slim["use"]["layers"]))
    return slim


def _values(layers: Any) -> list[Any]:
    """By layer, in their order; a record that was kept has no names any more."""
    return list(layers.values()) if isinstance(layers, dict) else list(layers)


def job_of(key: str) -> Job:
    """The job whose key this is."""
    call = ast.parse(key, mode="eval").body
    assert isinstance(call, ast.Call)
    told: dict[str, Any] = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    return Job(**told)


def beginning(kept: Mapping[str, Record], changed: bool) -> list[Record]:
    """What is kept as a pool has it. changed: without ours, which a pool then makes anew."""
    found = []
    for key, record in kept.items():
        job = job_of(key)
        told = {name: getattr(job, name) for name in ("subject", "pictures", "rank", "rate", "seed", "steps", "twist")}
        if not changed or job.method != SETTLING:
            found.append({**told, **record})
    return found


def write(path: Path, about: Mapping[str, Any], records: Iterable[Record]) -> None:
    """The same bytes for the same records."""
    lines = [json.dumps(about), *(json.dumps(record, separators=(",", ":")) for record in records)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode(), 9, mtime=0))


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


def main() -> None:
    """Write docs/evidence/records.jsonl.gz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--to", type=Path, default=FILE)
    parser.add_argument("--begin", action="store_true", help="write RECORDS from what is kept")
    parser.add_argument("--changed", action="store_true", help="with --begin: without ours")
    options = parser.parse_args()
    if options.begin:
        begun = beginning(read(options.to)[1], options.changed)
        with options.records.open("x", encoding="utf-8") as file:  # never over hours of work
            file.writelines(f"{json.dumps(record)}\n" for record in begun)
        print(f"{len(begun)} records")
        return
    about, found, missing = compact(read_records(options.records))
    write(options.to, about, found)
    print(f"{len(found)} records, {options.to.stat().st_size / 1e6:.2f} MB, {about['device']}; {len(missing)} missing")


if __name__ == "__main__":
    main()

"""Keeps the records of a full run in docs/evidence/, without the fields that no page uses.

`python -m benchmarks.evidence.keep_records RECORDS` writes them from the file that the GPU run made: only those of the jobs that
its stages ask for. It prints the missing ones. `--begin` writes such a file instead, to continue from: all records, or with
`--changed`, after a change of the method, all but those of the method.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence import comparison, complexity, decay, keeping, longer, variants
from benchmarks.evidence.personal import SETTLING, Job
from benchmarks.evidence.pool import Record, read_records
from benchmarks.evidence.records import FILE, WHERE, Stored, choices, read

_LEFT_OUT = ("subject", "pictures", "rank", "rate", "seed", "steps", "twist", "file", "seconds")
"""What the key says too, or no page uses."""

_LOADERS_CUTS = ("shortened", "shared_out")
"""They are told of the reported subjects alone."""


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

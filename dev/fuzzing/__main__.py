"""`make fuzz ARGS="--seconds 600"`: coverage-guided fuzzing with atheris until the time is over or something breaks.

Files that lead to new code are kept below .host/fuzz/corpus and used again; one that breaks a promise is written there as
crash-… and named. --replay FILE … runs such files again.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dev.host import HOST, ROOT

SLOW_SECONDS = 10
"""The processor's time that one input may take; of the clock's it gets ten times as much, since others may use the machine."""

MEMORY_MB = 2048
"""The process may take this much, with torch in it."""

READERS = (
    "files.document", "files.reader", "files.rank_info", "files.metadata", "files.resize", "files.keys", "files.writer",
    "report.ranks", "report.markdown", "report.layer_names", "report.layer_rank", "report.rank_map", "report.rank_map_drawing",
    "report.summary", "report.canvas", "method.svd", "method.factors", "util.text", "util.errors", "util.safe_json",
)  # fmt: skip
"""Modules below lora2 whose branches guide the fuzzer."""


def _child(folder: Path, seconds: int, seed: int) -> None:
    """The fuzzer itself: libFuzzer takes over the process, and ends it."""
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import torch

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["lora2_pack"]):
        from dev.fuzzing import oracle
        from dev.packs import pack

        for name in READERS:
            pack(f"lora2.{name}")
    from dev.fuzzing import mutate

    path = Path(tempfile.mkdtemp(dir=_memory())) / "fuzz.safetensors"
    ends: Counter[str] = Counter()
    said = [time.monotonic()]

    def one(data: bytes) -> None:
        path.write_bytes(data)
        # A picture takes longer than all the rest: one input in eight gets one.
        started = time.process_time()
        ends[oracle.exercise(path, picture=sum(data) % 8 == 0)] += 1
        if time.process_time() - started > SLOW_SECONDS:
            raise oracle.Broken(f"it took {time.process_time() - started:.0f} seconds")
        if time.monotonic() > said[0] + 60:
            said[0] = time.monotonic()
            read, all_ = ends["read"], sum(ends.values())
            print(f"{all_} inputs, {read} read, {len(ends) - 1} different errors", flush=True)

    def another(data: bytes, max_size: int, mutation: int) -> bytes:
        rng = random.Random(mutation)  # noqa: S311 (files, not secrets)
        changed = atheris.Mutate(data, max_size) if rng.random() < 0.1 else mutate.mutated(data, rng)
        return bytes(changed[:max_size])

    options = [
        f"-max_total_time={seconds}",
        f"-timeout={10 * SLOW_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-seed={seed}",
    ]
    options += [
        f"-max_len={mutate.MOST_BYTES}",
        f"-artifact_prefix={folder}/crash-",
        "-print_final_stats=1",
        "-len_control=0",
    ]
    atheris.Setup([sys.argv[0], str(folder / "corpus"), *options], one, custom_mutator=another)
    atheris.Fuzz()


def _memory() -> str | None:
    """A folder that is not on a disk, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108


def main() -> int:
    """Fill the corpus, run the fuzzer at low priority, and say what it found."""
    parser = argparse.ArgumentParser(prog="make fuzz ARGS=…", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="how long (600)")
    parser.add_argument("--seed", type=int, default=0, help="0 takes another one each time")
    parser.add_argument("--folder", type=Path, default=HOST / "fuzz", help="where files are kept (.host/fuzz)")
    parser.add_argument("--replay", type=Path, nargs="+", help="run these files and no others")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        _child(chosen.folder, chosen.seconds, chosen.seed or time.time_ns() % (1 << 31) + 1)
    if chosen.replay:
        from dev.fuzzing.oracle import exercise

        for path in chosen.replay:
            print(f"{path.name}: {exercise(path.resolve())}")
        return 0
    from dev.fuzzing.corpus import good, hostile
    from dev.fuzzing.mutate import MOST_BYTES

    corpus = chosen.folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, data in (good() | hostile()).items():
        if len(data) <= MOST_BYTES:
            (corpus / re.sub(r"\W+", "_", name)).write_bytes(data)
    os.nice(10)
    command = [
        sys.executable,
        "-m",
        "dev.fuzzing",
        "--child",
        "--seconds",
        str(chosen.seconds),
        "--seed",
        str(chosen.seed),
    ]
    command += ["--folder", str(chosen.folder)]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(f"fuzzed for {(time.monotonic() - started) / 60:.1f} minutes, exit status {done.returncode}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

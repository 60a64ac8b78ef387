"""Many adaptations at once: processes that each hold a workbench, and a file that remembers what is done."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.evidence.personal import Job

Record = dict[str, Any]


class Pool:
    """Runs jobs; records are kept in a file of JSON lines, so that a run that was stopped goes on where it was.

    seconds: after this time no job is begun, and `run` returns what there is.
    """

    def __init__(self, path: Path, processes: int = 1, seconds: float = float("inf")) -> None:
        self.path = path
        self.until = time.monotonic() + seconds
        self.records: dict[str, Record] = {}
        if path.exists():
            lines = path.read_text().splitlines()
            self.records = {r["key"]: r for r in map(json.loads, lines)}
        self._folder = tempfile.TemporaryDirectory()
        checkpoint = Path(self._folder.name) / "painter.safetensors"
        from dev.painter.model import write_checkpoint

        write_checkpoint(checkpoint)
        context = multiprocessing.get_context("spawn")
        self._jobs: Any = context.Queue()
        self._done: Any = context.Queue()
        self._workers = [context.Process(target=_work, args=(checkpoint, self._jobs, self._done)) for _ in range(processes)]
        for worker in self._workers:
            worker.start()

    def run(self, jobs: Iterable[Job]) -> list[Record]:
        """The records of the jobs, in their order; those that time did not allow are missing."""
        jobs = list(jobs)
        waiting = [job for job in dict.fromkeys(jobs) if job.key not in self.records][::-1]
        busy, start, before, said = 0, time.monotonic(), len(self.records), time.monotonic()
        while busy or (waiting and time.monotonic() < self.until):
            while waiting and busy < len(self._workers) and time.monotonic() < self.until:
                self._jobs.put(waiting.pop())
                busy += 1
            with contextlib.suppress(queue.Empty):
                key, record, error = self._done.get(timeout=1)
                busy -= 1
                if error:
                    self._stop()
                    raise RuntimeError(error)
                self.records[key] = dict(record, key=key)
                with self.path.open("a") as file:
                    file.write(json.dumps(self.records[key]) + "\n")
            if time.monotonic() - said > 10:
                said = time.monotonic()
                done = len(self.records) - before
                print(f"{done} of {len(waiting) + busy + done} after {said - start:.0f} s", flush=True)
            if not all(worker.is_alive() for worker in self._workers):
                self._stop()
                raise RuntimeError("a worker has died")
        return [self.records[job.key] for job in jobs if job.key in self.records]

    def _stop(self) -> None:
        """End the processes at once: one that waits to put its record would never be joined."""
        for worker in self._workers:
            worker.terminate()

    def close(self) -> None:
        """End the processes."""
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()
        self._folder.cleanup()


def _work(checkpoint: Path, jobs: Any, done: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from benchmarks.evidence.personal import Workbench

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    bench = Workbench(checkpoint)
    while (job := jobs.get()) is not None:
        try:
            done.put((job.key, bench.adapt(job), ""))
        except Exception:
            done.put((job.key, None, f"{job}\n{traceback.format_exc()}"))


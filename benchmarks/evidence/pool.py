"""Many adaptations at once: processes that each hold a workbench, and a file that remembers what is done."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.evidence.personal import Job
from dev import assets

Record = dict[str, Any]

VISIBLE = "CUDA_VISIBLE_DEVICES"

LONGEST = 300.0
"""Seconds that one job may take, the first one's loading included, before its process is ended."""
SAY_EVERY = 10.0
MOST_REPLACED = 5
"""Processes that may die or be ended before no more are started."""


class Pool:
    """Runs jobs; records are kept in a file of JSON lines, so that a run that was stopped goes on where it was.

    seconds: after this time no job is begun, and `run` returns what there is. failed: what went wrong, by the job's key; such a
    job is not tried again. longest: seconds that a job may take. types_of_gpu: whether a CPU loads what a GPU would, see `_work`.
    """

    def __init__(
        self,
        path: Path,
        processes: int = 1,
        seconds: float = float("inf"),
        longest: float = LONGEST,
        work: Any = None,
        types_of_gpu: bool = False,
    ) -> None:
        self.path = path
        self.start = time.monotonic()
        self.until = self.start + seconds
        self.records = read_records(path)
        self.failed: dict[str, str] = {}
        self._longest = longest
        self._spare = MOST_REPLACED
        self._work = work or partial(_work, types_of_gpu=types_of_gpu)
        self._context = multiprocessing.get_context("spawn")
        self._wanted = processes
        self._workers: list[_Worker] = []
        self._started = 0

    def run(self, jobs: Iterable[Job]) -> list[Record]:
        """The records of the jobs, in their order; those that failed, or that time did not allow, are missing."""
        jobs = list(dict.fromkeys(jobs))
        waiting = [job for job in jobs if job.key not in self.records and job.key not in self.failed][::-1]
        total, said, start = len(waiting), time.monotonic(), time.monotonic()
        while waiting or any(w.job for w in self._workers):
            if time.monotonic() >= self.until:
                waiting.clear()
            while waiting and (worker := self._free()):
                worker.give(waiting.pop())
            busy = [worker for worker in self._workers if worker.job]
            if not busy:
                break
            for ready in wait([worker.pipe for worker in busy], timeout=1.0):
                self._take(next(worker for worker in busy if worker.pipe is ready))
            for worker in busy:
                if worker.job and time.monotonic() - worker.since > self._longest:
                    self._lose(worker, f"took more than {self._longest:.0f} s")
            if time.monotonic() - said > SAY_EVERY:
                said, open_jobs = time.monotonic(), len(waiting) + sum(w.job is not None for w in self._workers)
                print(
                    f"{total - open_jobs} of {total} after {said - start:.0f} s, {len(self.failed)} failed", flush=True
                )
        return [self.records[job.key] for job in jobs if job.key in self.records]

    @property
    def out_of_time(self) -> bool:
        """Whether no job would be begun any more."""
        return time.monotonic() >= self.until

    def _free(self) -> _Worker | None:
        """A process without a job; a new one while there are fewer than were asked for."""
        for worker in self._workers:
            if worker.job is None:
                return worker
        if len(self._workers) == self._wanted or self._spare < 0:
            return None
        gpu = gpu_of(self._started, torch.cuda.device_count(), os.environ.get(VISIBLE))
        self._workers.append(_Worker(self._context, self._work, assets.painter(), gpu))
        self._started += 1
        return self._workers[-1]

    def _take(self, worker: _Worker) -> None:
        try:
            record, error = worker.pipe.recv()
        except (EOFError, OSError):
            self._lose(worker, "its process has died")
            return
        assert worker.job is not None
        key, worker.job = worker.job.key, None
        if error:
            self._fail(key, error)
            if "CUDA" in error:  # the process's context may be of no more use
                self._retire(worker)
            return
        self.records[key] = dict(record, key=key)
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[key]) + "\n")

    def _lose(self, worker: _Worker, why: str) -> None:
        """A process that can give nothing any more."""
        assert worker.job is not None
        self._fail(worker.job.key, why)
        self._retire(worker)

    def _retire(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)
        self._spare -= 1

    def _fail(self, key: str, why: str) -> None:
        self.failed[key] = why
        print(f"FAILED {key[:120]}\n{why[-1500:]}", flush=True)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()


class _Worker:
    """A process, the pipe to it, its job and since when. gpu: the one that it sees, all where none is named."""

    def __init__(self, context: Any, work: Any, checkpoint: Path, gpu: str | None) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(checkpoint, other), daemon=True)
        with patch.dict(os.environ, {} if gpu is None else {VISIBLE: gpu}):  # CUDA asks once, at its own start
            self.process.start()
        other.close()  # so that the end of the process is the end of the pipe
        self.job: Job | None = None
        self.since = 0.0

    def give(self, job: Job) -> None:
        self.job, self.since = job, time.monotonic()
        with contextlib.suppress(OSError):  # it has died: the pipe says so when it is read
            self.pipe.send(job)

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


def read_records(path: Path) -> dict[str, Record]:
    """The records of a file of JSON lines, by key; a last line that was cut off is left out."""
    found: dict[str, Record] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise
            path.write_text("".join(f"{whole}\n" for whole in lines[:-1]), encoding="utf-8")
            print(f"{path.name} ended in half a record, which is left out", flush=True)
            continue
        found[record["key"]] = record
    return found


def gpu_of(number: int, gpus: int, visible: str | None) -> str | None:
    """CUDA_VISIBLE_DEVICES for the process of this number, so that all GPUs have as many. visible: what it is here."""
    if gpus < 2:
        return visible
    names = visible.split(",") if visible else [str(index) for index in range(gpus)]
    return names[number % gpus]


def _work(checkpoint: Path, pipe: Any, types_of_gpu: bool = False) -> None:
    """A process's life: jobs come, records go.

    types_of_gpu: load the VAE in bf16, text encoder and model in fp16, as ComfyUI does by itself on a GPU; records say so. The
    VAE's is what matters: the base's losses on the tuning subjects are 0.02 to 0.13 % above an H100's with it, and 0.05 to 0.22 %
    below them without.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if types_of_gpu:
        from dev.host import import_comfy

        import_comfy()
        from comfy.cli_args import args  # type: ignore[import-not-found, unused-ignore]

        args.bf16_vae = args.fp16_text_enc = args.fp16_unet = True
    from benchmarks.evidence.experiment import device_name
    from benchmarks.evidence.personal import Workbench

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    bench: Any = None
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            bench = bench or Workbench(checkpoint)
            where: Record = {
                "device": device_name(),
                "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            }
            if types_of_gpu:
                where["types_of_gpu"] = True
            pipe.send(({**bench.adapt(job), **where}, ""))
        except Exception:
            pipe.send((None, f"{job}\n{traceback.format_exc()}"))

"""Adaptations to subjects: one real run, and many in processes of which some fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import personal
from benchmarks.evidence.comparison import UNIT
from benchmarks.evidence.personal import FIXED, Job, Workbench
from benchmarks.evidence.pool import Pool, gpu_of, read_records
from benchmarks.models import pack
from dev import assets

# -- jobs that fail ------------------------------------------------------------------------------------------

WORK = """
import os, time
from typing import NamedTuple
class Task(NamedTuple):  # a Job would bring torch into every process
    seed: int
    @property
    def key(self):
        return repr(self)
def work(checkpoint, pipe):
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job.seed == 1:
            pipe.send((None, "it broke"))
        elif job.seed == 2:
            os._exit(1)
        elif job.seed == 3:
            time.sleep(60)
        else:
            pipe.send(({"seed": job.seed}, ""))
"""


def test_a_job_that_fails_dies_or_hangs_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evidence_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    import evidence_work

    jobs = [evidence_work.Task(seed) for seed in range(6)]
    path = tmp_path / "records.jsonl"
    pool = Pool(path, 2, longest=4.0, work=evidence_work.work)
    try:
        done = pool.run(jobs)
        assert [r["seed"] for r in done] == [0, 4, 5]
        assert [pool.failed[job.key] for job in jobs[1:4]] == ["it broke", "its process has died", "took more than 4 s"]
        assert pool.run(jobs[1:2]) == [], "not tried again"
    finally:
        pool.close()
    assert capsys.readouterr().out.count("FAILED") == 3
    with path.open("a") as file:
        file.write('{"key": "half a rec')
    assert {r["seed"] for r in read_records(path).values()} == {0, 4, 5}
    assert len(path.read_text().splitlines()) == 3
    late = Pool(path, 1, seconds=0.0, work=evidence_work.work)
    assert [r["seed"] for r in late.run(jobs)] == [0, 4, 5], "no job is begun after its time"
    assert late.out_of_time


@pytest.mark.parametrize("visible", [None, "2,5", "GPU-a,GPU-b"])
def test_processes_share_all_gpus(visible: str | None) -> None:
    """A process sees one GPU of those that this one sees, and each as many; where there is one or none nothing is changed."""
    names = visible.split(",") if visible else ["0", "1"]
    assert [gpu_of(number, 2, visible) for number in range(5)] == [*names, *names, names[0]]
    assert gpu_of(3, 1, visible) == gpu_of(3, 0, visible) == visible


# -- one real run --------------------------------------------------------------------------------------------


def test_a_plain_lora_is_trained_plainly_and_measured_as_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pack("lora2.training.trainer")

    def never(*args: Any, **more: Any) -> None:
        raise AssertionError("a plain LoRA is not cut")

    monkeypatch.setattr(trainer, "prune", never)
    for name in ("HELD_OUT", "OTHERS"):
        monkeypatch.setattr(personal, name, 2)  # what it is measured on, for the sake of time
    bench = Workbench(assets.painter())
    found = bench.adapt(Job("grid 2x2", 5, FIXED, 2, 1e-3, 0, 4, marks=(2,), more=("shortened",)))
    assert found["budget"] == 2 * UNIT == found["file"]["parameters"]
    assert set(found["ranks"].values()) == {2}
    assert [mark["step"] for mark in found["marks"]] == [2, 4]
    assert found["marks"][1]["loss"] < found["marks"][0]["loss"] < found["before"]["loss"]
    # The network's own path against factors attached by hand: float32 in another order.
    assert found["file"]["loss"] == pytest.approx(found["marks"][1]["loss"], rel=1e-4)
    assert found["marks"][1]["shortened"]["0.5"]["parameters"] == UNIT
    assert len(found["use"]["layers"]) == len(found["ranks"])
    assert found["use"]["together"][0] <= 30
    json.dumps(found)

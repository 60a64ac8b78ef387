"""The table of `make faults` against the code and its record; the faults themselves are planted by `make faults` only."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter

import pytest

from dev import faults
from dev.host import ROOT
from dev.planted import FAULTS, Fault

ROOMS = {
    "lora2/config.py, lora2/util", "lora2/method", "lora2/adapters", "lora2/files", "lora2/checkpoints", "lora2/report",
    "lora2/training", "nodes/comfy", "nodes/runs", "nodes",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    planted = text.replace(fault.old, fault.new)
    assert planted != text
    compile(planted, fault.file, "exec")
    tests = [part for part in shlex.split(fault.tests) if part.startswith("tests/")]
    assert tests
    assert all((ROOT / part).exists() for part in tests)


def test_every_room_has_faults_and_the_page_counts_them() -> None:
    rooms = Counter(fault.room for fault in FAULTS)
    assert set(rooms) == ROOMS
    assert min(rooms.values()) >= 3
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"plants {len(FAULTS)} known faults" in page
    for room, count in rooms.items():
        names = ", ".join(f"`{name}`" for name in room.split(", "))
        assert re.search(rf"\| {re.escape(names)} \| {count} \|", page), room


def test_the_record_names_a_test_for_every_fault() -> None:
    found = json.loads(faults.RECORD.read_text(encoding="utf-8"))
    assert [(entry["name"], entry["file"]) for entry in found] == [(fault.name, fault.file) for fault in FAULTS]
    for entry in found:
        file, _, name = entry["caught_by"].partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), entry["name"]


def test_a_text_that_has_changed_is_refused(tmp_path: faults.Path) -> None:
    (tmp_path / "x.py").write_text("a = 1\na = 1\n", encoding="utf-8")
    with pytest.raises(faults.Unproven, match="occurs 2 times"):
        faults.catch(Fault("x", "x.py", "a = 1", "a = 2", ""), tmp_path)

"""The tests that need a GPU: `make test-gpu`. What they said goes into gpu-tests.json in --out, or docs/benchmarks.

Only the files that hold such tests are collected: others import tools, a browser among them, that a GPU machine need not have.
By hand, with the host's Python: `python -m dev.gpu_tests --out DIR`; a part of them: `python -m dev.gpu_tests -k memory`. The
file is written anew after every test, so a run that is killed keeps what it has; a test that takes too long fails.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from dev.host import ROOT, import_comfy
from dev.limits import at_most

DOCS = ROOT / "docs" / "benchmarks"
MARK = "pytest.mark.gpu"


MOST_SECONDS = 90
"""A test that takes longer fails, and the next one goes on."""


class Record:
    """A pytest plugin that keeps every test's outcome. path: where it is written, with what it was run on, after each."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self.path, self.about = path, about
        self.tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, Any, Any]:
        """The test's own code, for so long and no longer."""
        with at_most(MOST_SECONDS):
            return (yield)

    def pytest_runtest_logfinish(self) -> None:
        """After every test."""
        self.path.write_text(
            json.dumps({**self.about, "tests": list(self.tests.values())}, indent=1) + "\n", encoding="utf-8"
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of one test: the worst outcome counts."""
        test = self.tests.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        if report.outcome != "passed":
            test["outcome"] = report.outcome
            lines = str(report.longrepr).strip().splitlines()
            test["why"] = next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])[:300]


def files() -> list[Path]:
    """The test files that name the mark."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text(encoding="utf-8")]


def main() -> None:
    """Run, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS)
    told, more = parser.parse_known_args()
    import_comfy()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("These tests need an NVIDIA GPU that torch can use, and there is none here.")
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "comfyui": importlib.import_module("comfyui_version").__version__,
        "date": datetime.date.today().isoformat(),
    }
    told.out.mkdir(parents=True, exist_ok=True)
    record = Record(told.out / "gpu-tests.json", about)
    options = ["-m", "gpu", "-q", "--durations=8", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *map(str, files()), *more], plugins=[record])
    raise SystemExit(int(code))


if __name__ == "__main__":
    main()

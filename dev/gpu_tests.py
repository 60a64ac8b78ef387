"""The tests that need a GPU: `make test-gpu`. What they said goes into gpu-tests.json in --out, or docs/benchmarks.

Only the files that hold such tests are collected: others import tools, a browser among them, that a GPU machine need not have.
By hand, with the host's Python: `python -m dev.gpu_tests --out DIR`; a part of them: `python -m dev.gpu_tests -k memory`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from dev.host import ROOT, import_comfy

DOCS = ROOT / "docs" / "benchmarks"
MARK = "pytest.mark.gpu"


class Record:
    """A pytest plugin that keeps every test's outcome."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of one test: the worst outcome counts."""
        test = self.tests.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        if report.outcome != "passed":
            test["outcome"] = report.outcome
            test["why"] = str(report.longrepr).strip().splitlines()[-1][:300]


def files() -> list[Path]:
    """The test files that name the mark."""
    return [path for path in sorted((ROOT / "tests").glob("test_*.py")) if MARK in path.read_text(encoding="utf-8")]


def main() -> None:
    """Run, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS)
    told, more = parser.parse_known_args()
    import_comfy()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("These tests need an NVIDIA GPU that torch can use, and there is none here.")
    record = Record()
    code = pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", *map(str, files()), *more], plugins=[record])
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "comfyui": importlib.import_module("comfyui_version").__version__,
        "date": datetime.date.today().isoformat(),
        "tests": list(record.tests.values()),
    }
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / "gpu-tests.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(int(code))


if __name__ == "__main__":
    main()

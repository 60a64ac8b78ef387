"""What all experiments share: claims that can fail, the conditions of a run, the files in docs/evidence/.

An experiment is a module of this package with
    KEY        its name in results.json
    FILE       its file in docs/evidence/
    run(full)  does the work and gives plain values; full=False is the reduced size, for a CPU and some minutes
    claims(results)          what must hold, with figures
    summary(results)         what results.json holds of it
Its part of the page, in Markdown with pictures drawn into a folder, is written by `build(results, folder)` of the module
KEY_page, which reads results and imports the experiment (never the other way), or by its own `page(results, folder)`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

Results = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "docs" / "evidence"


@dataclass(frozen=True)
class Claim:
    """A sentence with a figure, and the limit that the figure must keep.

    above: the figure must reach the limit; otherwise it must not pass it. open: a goal that the full run has not reached. It is
    shown as such, with its figure, and only a goal that is reached is demanded of it again.
    """

    words: str
    value: float
    limit: float
    above: bool = False
    open: bool = False

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.value >= self.limit if self.above else self.value <= self.limit

    def row(self) -> tuple[str, str, str, str]:
        """Whether it holds, what it says, the figure, the limit."""
        sign = "at least" if self.above else "at most"
        return ("yes" if self.holds else "NO", self.words, f"{self.value:.4g}", f"{sign} {self.limit:g}")


class Experiment(Protocol):
    """A module as described above."""

    KEY: str
    FILE: str

    def run(self, full: bool) -> Results:
        """Do the work."""

    def claims(self, results: Results) -> list[Claim]:
        """What must hold."""

    def summary(self, results: Results) -> Results:
        """The figures for results.json."""


def device_name() -> str:
    """The kind of machine: the GPU's name, else the CPU's; never the host's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def measured(experiment: Experiment, full: bool) -> Results:
    """Run an experiment and note under what conditions."""
    start = time.monotonic()
    results = experiment.run(full)
    about = {
        "device": device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "size": "full" if full else "reduced",
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    return {"about": about, **results}


def write_json(path: Path, values: Any) -> None:
    """Readable, and the same for the same values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head)]
    lines.append(["---"] * len(lines[0]))
    lines += [[str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain_table(rows: Iterable[tuple[str, ...]]) -> str:
    """Columns for a terminal."""
    lines = list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def report(claims: Iterable[Claim]) -> bool:
    """Print the claims; True when all hold but for goals that are known to be open."""
    claims = list(claims)
    print(plain_table([("holds", "claim", "measured", "must be"), *(claim.row() for claim in claims)]), flush=True)
    return all(claim.holds or claim.open for claim in claims)


def main(experiment: Experiment) -> int:
    """The command of one experiment: run it, write its file, print its claims; 1 when one does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reduced", action="store_true", help="some minutes on a CPU, and nothing is written")
    reduced = parser.parse_args().reduced
    torch.set_num_threads(1)
    results = measured(experiment, full=not reduced)
    if not reduced:
        write_json(FOLDER / experiment.FILE, results)
    return 0 if report(experiment.claims(results)) else 1


def mean(values: Iterable[float]) -> float:
    """The mean; NaN for nothing, which no claim survives."""
    found = list(values)
    return sum(found) / len(found) if found else float("nan")


def chosen(runs: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Any]:
    """The runs whose settings are these."""
    return [run for run in runs if all(run[name] == value for name, value in wanted.items())]

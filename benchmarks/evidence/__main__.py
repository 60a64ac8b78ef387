"""All experiments together.

`python -m benchmarks.evidence` gathers docs/evidence/*.json into results.json and writes the page with its pictures.
`python -m benchmarks.evidence --check` (`make evidence`) reruns every experiment at its reduced size and checks what it
claims: exit code 1 when a claim does not hold. Nothing is written then. --only NAME: these experiments alone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.evidence.experiment import (
    FOLDER,
    Claim,
    Experiment,
    Results,
    measured,
    read_json,
    report,
    table,
    write_json,
)

MODULES = ("recovery", "pareto", "keeping", "complexity", "ablations", "decay", "truncation", "budgets")
"""In the order of the page."""


def experiments(only: Iterable[str] = ()) -> dict[str, Experiment]:
    """The experiments that there are, by module."""
    names = list(only) or MODULES
    found: dict[str, Experiment] = {}
    for name in names:
        if importlib.util.find_spec(f"benchmarks.evidence.{name}") is not None:
            found[name] = importlib.import_module(f"benchmarks.evidence.{name}")
    return found


def page_of(name: str) -> Callable[[Results, Path], str]:
    """The function that writes an experiment's part of the page: `build` of its page module, or its own `page`."""
    if importlib.util.find_spec(f"benchmarks.evidence.{name}_page") is None:
        return importlib.import_module(f"benchmarks.evidence.{name}").page
    return importlib.import_module(f"benchmarks.evidence.{name}_page").build


def gather(folder: Path, pictures: Path) -> tuple[Results, str]:
    """results.json and the page, from the experiments' files in a folder; draws the pictures."""
    summaries: Results = {}
    parts, claims = [], []
    for name, experiment in experiments().items():
        path = folder / experiment.FILE
        if not path.exists():
            continue
        results = read_json(path)
        about = results["about"]
        summaries[experiment.KEY] = experiment.summary(results)
        claims += experiment.claims(results)
        source = f"{about['device']}, torch {about['torch']}, {about['date']}. All figures: [{experiment.FILE}]"
        parts.append(f"{page_of(name)(results, pictures)}\n\n<sub>{source}({experiment.FILE})</sub>")
    return summaries, "\n\n".join([HEAD, claim_table(claims), *parts]) + "\n"


HEAD = """# Evidence

What the method does, measured by the scripts in `benchmarks/evidence/`. `make evidence` reruns a reduced version on a CPU (ten
minutes on two cores) and checks that nothing is grossly wrong, which is less than what is claimed here.
`python -m benchmarks.evidence.NAME` runs one experiment in full, and `python -m benchmarks.evidence` writes this page and
`results.json` from the files beside it.

What says NO is a goal that is not reached; its section says what is missing. Rows of a *share* are no goals that were set before:
they were worded when the figures were known, of what ours is below."""


def claim_table(claims: Iterable[Claim]) -> str:
    """The claims of the full runs, in Markdown."""
    rows = [claim.row() for claim in claims]
    return table(
        ["claim", "measured", "must be", "holds"], [[words, *figures, holds] for holds, words, *figures in rows]
    )


def check(only: Iterable[str]) -> bool:
    """Rerun at the reduced size; True when every claim holds."""
    good, missed = True, list[str]()
    for name, experiment in experiments(only).items():
        start = time.monotonic()
        claims = experiment.claims(measured(experiment, full=False))
        print(f"\n{name}, reduced, {time.monotonic() - start:.0f} s", flush=True)
        good = report(claims) and good
        missed += [claim.words for claim in claims if claim.open and not claim.holds]
    words = "Every claim holds" + (
        f", but for goals that are known to be open: {'; '.join(missed)}." if missed else "."
    )
    print(f"\n{words}" if good else "\nA claim does not hold.", flush=True)
    return good


def main() -> int:
    """Gather, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=MODULES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.check:
        return 0 if check(arguments.only) else 1
    results, page = gather(FOLDER, FOLDER)
    write_json(FOLDER / "results.json", results)
    (FOLDER / "README.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time and memory of training steps beside the frozen model's and other trainers': `make bench`, on whatever device there is.

On a GPU: SDXL's UNet and a Flux of 12 B parameters with random weights. On a CPU: the small models of the tests. Every row is
written as soon as it is measured; a section that fails, or on a GPU takes too long, is reported, and the others go on. `--merge
FILE` measures nothing: it takes the rows of a run into docs/benchmarks/speed.json and writes speed.md and README's table anew.

A whole run on a GPU takes longer than ten minutes; in parts, of which each keeps its own folder:

    python -m benchmarks.speed --out DIR/step --only step eager everything peft trainlora buckets
    python -m benchmarks.speed --out DIR/rest --only batch falling loading eight flux flat
    python -m benchmarks.speed --out DIR/kernels --only profile
    python -m benchmarks.speed --merge DIR/step/speed.json

Without --out a run on a GPU writes the repository's own pages, and --merge does so for each part. PEFT's section needs `peft` and
`diffusers`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import time
import traceback
from pathlib import Path

from benchmarks import models, sections, table
from dev.limits import at_most

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks"
README = ROOT / "README.md"
README_WORKS = {"batch 1": sections.MAIN, "batch 4": sections.BATCH}


LEAST = 5
"""A section is not begun with fewer seconds left."""


def measure(names: list[str], out: Path | None, seconds: float) -> tuple[list[table.Row], list[str]]:
    """Run sections; returns the rows and the names of the sections that failed or found no time."""
    import torch

    cuda = torch.cuda.is_available()
    about = {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "comfyui": importlib.import_module("comfyui_version").__version__,
        "date": datetime.date.today().isoformat(),
    }
    figures = table.Table(about, out / "speed.json" if out else None)
    start, missing = time.monotonic(), []
    with sections.temporary() as folder:
        bench = sections.Bench(figures, folder, start + seconds)
        for name in names:
            section, limit = sections.SECTIONS[name]
            if bench.left() < LEAST:
                print(f"-- {name}: no time left", flush=True)
                missing.append(name)
                continue
            begun = time.monotonic()
            try:
                with at_most(min(limit if cuda else math.inf, bench.left())):
                    section(bench)
            except Exception:
                print(f"-- {name} failed:\n{traceback.format_exc()}", flush=True)
                missing.append(name)
            print(f"-- {name}: {time.monotonic() - begun:.0f} s, {time.monotonic() - start:.0f} s in all", flush=True)
    return figures.rows, missing


def publish(rows: list[table.Row]) -> None:
    """Take rows into the repository's JSON, its page, and README's table."""
    path = DOCS / "speed.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = table.merged(old, rows)
    DOCS.mkdir(parents=True, exist_ok=True)
    path.write_text(table.dumped(rows), encoding="utf-8")
    (DOCS / "speed.md").write_text(table.page(rows), encoding="utf-8")
    README.write_text(table.render(README.read_text(encoding="utf-8"), rows, README_WORKS), encoding="utf-8")
    print(f"written to {DOCS} and {README.name}")


def main() -> None:
    """Measure, print, write."""
    usual = [name for name in sections.SECTIONS if name != "profile"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder for speed.json and speed.md; on a GPU the repository's own by default"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(sections.SECTIONS), default=usual, help="sections to run, in order"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="give up after this time what is not done")
    parser.add_argument("--merge", type=Path, help="take the rows of this file into the repository; measure nothing")
    told = parser.parse_args()
    if told.merge:
        publish(json.loads(told.merge.read_text(encoding="utf-8")))
        return
    models.import_comfy()
    import torch

    rows, missing = measure(told.only, told.out, told.seconds)
    print(table.page(rows))
    if told.out is not None:
        (told.out / "speed.md").write_text(table.page(rows), encoding="utf-8")
    elif torch.cuda.is_available():
        publish(rows)
    if missing:
        raise SystemExit(f"Not measured: {', '.join(missing)}.")


if __name__ == "__main__":
    main()

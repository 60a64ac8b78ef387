"""Rows of figures, and the pages made of them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Figures

Row = dict[str, Any]
NAMES = ("limit", "limit-eager", "peft", "trainlora", "ours", "ours-frozen", "ours-eager", "ours-all-layers")
BLOCK = re.compile(r"(<!-- speed -->\n).*?(<!-- end -->)", re.DOTALL)

README_ROWS = {
    "limit": "frozen model, forward and backward (lower bound)",
    "ours": "**LoRA², step recorded as a CUDA graph**",
    "ours-all-layers": "LoRA², all layers",
    "ours-eager": "LoRA², step not recorded",
    "peft": "PEFT on diffusers",
    "trainlora": "ComfyUI's TrainLoraNode, all layers",
}


class Table:
    """Rows as they are measured; the file is written anew after each."""

    def __init__(self, about: dict[str, str], path: Path | None = None) -> None:
        self.about, self.path = about, path
        self.rows: list[Row] = []

    def add(self, work: str, name: str, figures: Figures | None, against: str | None = None, **more: Any) -> Row:
        """A row; against: the name of the row of the same work that its ratio is of, by default none."""
        figures = figures or Figures(math.nan)
        limit = next((r["ms"] for r in self.rows if r["work"] == work and r["name"] == against), None)
        row: Row = {"work": work, "name": name, "ms": _rounded(figures.ms, 1), "peak_gib": _rounded(figures.peak, 2)}
        row["limit_ratio"] = 1.0 if name == against else _rounded(figures.ms / limit, 3) if limit else None
        if figures.mean is not None:
            row["mean_ms"] = round(figures.mean, 1)
        row |= figures.more | more | self.about
        self.rows.append(row)
        print(" ".join(f"{k}={v}" for k, v in row.items() if k not in self.about), flush=True)
        self.write()
        return row

    def write(self) -> None:
        """The file, if there is one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(dumped(self.rows), encoding="utf-8")


def dumped(rows: Iterable[Row]) -> str:
    """The JSON, one row a line."""
    return "[\n" + ",\n".join(" " + json.dumps(row, ensure_ascii=False) for row in rows) + "\n]" + os.linesep


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows of both; a work that was measured anew replaces its old rows as a whole."""
    fresh = {row["work"] for row in new}
    works = list(dict.fromkeys(row["work"] for row in (*new, *old)))
    kept = [row for row in old if row["work"] not in fresh]
    return sorted((*new, *kept), key=lambda row: works.index(row["work"]))


def page(rows: Sequence[Row]) -> str:
    """The page of all figures."""
    lines = [
        "# Speed",
        "",
        "Written by `make bench` (benchmarks/speed.py). `ms` is the median step, `mean` counts recording a step anew after",
        "arrays were resized. `ratio` is over the frozen model's own forward and backward, the limit, on the same shape (of",
        "`ours-eager`: over the eager limit). Rows of one work come from one run.",
        "",
    ]
    for work in dict.fromkeys(row["work"] for row in rows):
        mine = [row for row in rows if row["work"] == work]
        first = mine[0]
        lines += [
            f"## {work}",
            "",
            f"{first['device']}, torch {first['torch']}, ComfyUI {first['comfyui']}, {first['date']}",
            "",
        ]
        lines += ["| what | ms | mean | ratio | peak GiB | more |", "| --- | --- | --- | --- | --- | --- |"]
        for row in mine:
            cells = [
                row["name"],
                *(_shown(row.get(k)) for k in ("ms", "mean_ms", "limit_ratio", "peak_gib")),
                _more(row),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


KNOWN = ("work", "name", "ms", "peak_gib", "limit_ratio", "mean_ms", "device", "torch", "comfyui", "date")


def _more(row: Row) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in row.items() if k not in KNOWN)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _rounded(value: float, digits: int) -> float | None:
    return None if math.isnan(value) else round(value, digits)


def readme_table(rows: Sequence[Row], works: dict[str, str]) -> str:
    """README's table. works: the works to show, by the heading that each gets."""
    heads = [h for h, work in works.items() if any(r["work"] == work for r in rows)]
    cells = " | ".join(f"{h} | " for h in heads)
    lines = [f"| step | {cells} |", "| --- |" + " --- |" * (2 * len(heads))]
    for name, words in README_ROWS.items():
        line = [words]
        for head in heads:
            row = next((r for r in rows if r["work"] == works[head] and r["name"] == name), None)
            line += [f"{row['ms']:.0f} ms", f"{row['peak_gib']:.1f} GiB"] if row else ["", ""]
        if any(line[1:]):
            bold = [f"**{c}**" if name == "ours" and c else c for c in line[1:]]
            lines.append(f"| {' | '.join([words, *bold])} |")
    lines += ["", *_means(rows, works)]
    return "\n".join(lines).rstrip() + "\n"


def _means(rows: Sequence[Row], works: dict[str, str]) -> list[str]:
    """What the medians of the table leave out."""
    said = []
    for head, work in works.items():
        row = next((r for r in rows if r["work"] == work and r["name"] == "ours"), None)
        if row and "mean_ms" in row:
            said.append(
                f"{row['mean_ms']:.0f} ms at {head}" + (f" over {row['steps']} steps" if "steps" in row else "")
            )
    if not said:
        return []
    first = next(r for r in rows if r["work"] in works.values())
    notes = {
        head: next((r["note"] for r in rows if r["work"] == work and "note" in r), None) for head, work in works.items()
    }
    return [
        f"Median steps on one {first['device']}, torch {first['torch']}, {first['date']}. Resizing layers records the step anew;",
        f"the mean with these recordings is {' and '.join(said)}.",
        *(f"{head.capitalize()} was {note}." for head, note in notes.items() if note),
    ]


def render(text: str, rows: Sequence[Row], works: dict[str, str]) -> str:
    """A page with its table of speed as the rows say."""
    return BLOCK.sub(lambda m: f"{m[1]}{readme_table(rows, works)}{m[2]}", text)

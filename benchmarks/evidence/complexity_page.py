"""The page of rank against complexity: tables and plots from its results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.comparison import COUNTS
from benchmarks.evidence.complexity import (
    CUT,
    IN_USE,
    IN_USE_FIXED,
    LEARNED,
    MEASURES,
    NEEDED,
    SIGNIFICANT,
    correlation,
    of,
)
from benchmarks.evidence.experiment import Results, mean, table
from benchmarks.evidence.plot import ACCENT, CALM, Plot, Series

TITLES = {
    LEARNED: "Total rank where the paper's form comes to rest",
    NEEDED: "Mean rank of ours that a subject needs",
    CUT: "Mean rank that a subject needs of a large rank, cut",
    IN_USE_FIXED: "Positions in use of a large fixed rank",
}
SHORT = {
    LEARNED: "paper's form, total rank",
    NEEDED: "ours, needed",
    CUT: "cut, needed",
    IN_USE: "in use, ours",
    IN_USE_FIXED: "in use, fixed rank",
}
COLOURS = {COUNTS[0]: ACCENT, COUNTS[1]: CALM}


def build(results: Results, folder: Path) -> str:
    """The part of the page, in Markdown; draws its pictures into the folder."""
    rows = [[words, *(f"{correlation(results, measure, count):.2f}" for count in COUNTS)] for measure, words in MEASURES.items()]
    parts = [
        "## Rank and complexity",
        "The ten subjects are grids of 1, 4, 9 … 100 coloured parts. At a target, ours has the same total rank on all of "
        "them, so the target cannot show what a subject needs. Five measures can; Spearman's correlation of each, in the mean "
        f"over {len(results['seeds'])} seeds, with the number of parts:",
        table(["measure", *(f"{count} pictures" for count in COUNTS)], rows),
        _verdict(results),
    ]
    for measure, title in TITLES.items():
        series = []
        for count in COUNTS:
            parts_, values, low, high = of([r for r in results["rows"] if r["pictures"] == count], measure)
            series.append(Series(f"{count} pictures", parts_, values, low=low, high=high, colour=COLOURS[count]))
        name = f"complexity_{measure}.png"
        Plot(title, "parts of the subject", "mean, lowest and highest of the seeds", series, x_log=2,
             x_ticks=[(k * k, f"{k * k}") for k in (1, 2, 3, 4, 6, 8, 10)]).save(folder / name)  # fmt: skip
        parts.append(f"![{title}]({name})")
    parts.append(_subjects(results))
    return "\n\n".join(parts)


def _verdict(results: Results) -> str:
    """Which measures follow the number of parts, and which do not."""
    found = {m: correlation(results, m, COUNTS[0]) for m in MEASURES}
    good, poor = ([SHORT[m] for m in found if (found[m] >= SIGNIFICANT) is side] for side in (True, False))
    told = [
        f"Ten subjects in no order reach {SIGNIFICANT:g} in one case of twenty. With {COUNTS[0]} pictures above it: "
        f"{', '.join(good) if good else 'none'}; below it: {', '.join(poor) if poor else 'none'}."
    ]
    if found[LEARNED] < 1:
        told.append(
            "Total learned rank does not rise with every step in complexity: ranks of the paper's form tell what layers need "
            "against one another rather than how much a subject needs. Two likely reasons, neither tested: an adaptive optimizer "
            "takes the size of θ's gradients away; and the model's latents have one place for 8 × 8 pixels, so the parts of the "
            "finer half of the subjects are smaller than that."
        )
    return " ".join(told)


def _subjects(results: Results) -> str:
    rows = []
    for row in (r for r in results["rows"] if r["pictures"] == COUNTS[0]):
        cells = [f"{mean(row[m]):.{1 if m in (NEEDED, CUT) else 0}f}" if row[m] else "" for m in MEASURES]
        rows.append([row["subject"], row["parts"], *cells])
    body = table(["subject", "parts", *(SHORT[m] for m in MEASURES)], rows)
    return f"{COUNTS[0]} pictures, means over seeds:\n\n{body}"



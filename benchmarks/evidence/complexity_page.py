"""The page of rank against complexity: tables and plots from its results."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from benchmarks.evidence.comparison import COUNTS
from benchmarks.evidence.complexity import MEASURES, SIGNIFICANT, SURE, correlation, largest_fall, levels, ordered
from benchmarks.evidence.experiment import Results, mean, table
from benchmarks.evidence.keeping import MOST
from benchmarks.evidence.plot import ACCENT, Plot, Series

TITLE = "Rank that ours comes to"
PICTURE = "complexity.png"


def build(results: Results, folder: Path) -> str:
    """The part of the page, in Markdown; draws its picture into the folder."""
    found, rows = levels(results), results["graded"]
    outlines = sorted({row["outline"] for row in rows})
    by_outline: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        by_outline.setdefault((row["parts"], row["outline"]), []).extend(row["ranks"])
    low, high = ([rank + side * error for rank, error in found.values()] for side in (-SURE, SURE))
    line = Series("mean of all", list(found), [rank for rank, _ in found.values()], low=low, high=high, colour=ACCENT)
    Plot(TITLE, "parts of the subject", f"mean rank, ± {SURE:g} standard errors", [line], x_log=2,
         x_ticks=[(k * k, f"{k * k}") for k in (1, 2, 3, 4, 6, 8, 10)]).save(folder / PICTURE)  # fmt: skip
    body = [
        [
            parts, f"{rank:.2f} ± {error:.2f}", *(f"{mean(by_outline[parts, outline]):.1f}" for outline in outlines),
            f"{mean(row['learned'] for row in rows if row['parts'] == parts):.3f}",
        ]
        for parts, (rank, error) in found.items()
    ]
    return "\n\n".join([
        "## Rank and complexity",
        f"Grids of 1, 4, 9 … 100 coloured parts, for each number of parts on {len(outlines)} outlines in two sets of colours: "
        f"the same {len(rows) // len(found)} looks for every number, {COUNTS[0]} pictures of each, "
        f"{len(results['graded_seeds'])} seeds. Where a target is filled, the size is the same on all of them. Here the target, "
        f"{MOST}, is only the most (`settle_keep` 0.9), and the mean rank, which is the file's size, is what ours comes to by "
        "itself:",
        table(["parts", "mean rank", *outlines, "taken off the loss"], body),
        f"![{TITLE}]({PICTURE})",
        _verdict(results),
        _beside(results),
    ])  # fmt: skip


def _verdict(results: Results) -> str:
    found = [(parts, rank) for parts, (rank, _) in levels(results).items()]
    falls = [(parts, a - b) for (_, a), (parts, b) in pairwise(found) if b < a]
    ranks = [rank for _, rank in found]
    told = "**Monotone:** more parts, more rank, at every step."
    if falls:
        where = ", ".join(f"by {fall:.2f} at {parts} parts" for parts, fall in falls)
        kind = "Monotone but for falls within the noise" if largest_fall(results) <= SURE else "Not monotone"
        told = f"**{kind}:** the mean falls {where}; at most by {largest_fall(results):.1f} standard errors."
    alone = found[0][1] > min(ranks)
    odd = (
        " A single colour comes to more than it should. Training takes the least off its loss but for the finest patterns (last "
        "column), so a share of what was learned may hold more there of what only the pictures have in common; that is a guess."
    )
    return (
        f"{told} Spearman's correlation is {ordered(results):.3f}.{odd if alone else ''} The least takes "
        f"{min(ranks) / max(ranks):.0%} of the most: rank is also spent on what all subjects share, being at a place and having "
        "an outline. The order shows in the mean over these looks: single subjects keep it less well, as the next table shows."
    )


def _beside(results: Results) -> str:
    heads = [f"{count} pictures" for count in COUNTS]
    rows = [[words, *(f"{correlation(results, m, count):.2f}" for count in COUNTS)] for m, words in MEASURES.items()]
    return "\n\n".join([
        "**Beside it**, the ten subjects of the comparison above, where every number of parts has a single outline and set of "
        f"colours, which blurs it: Spearman's correlation of several measures with the parts, mean over {len(results['seeds'])} "
        f"seeds. Ten subjects in no order reach {SIGNIFICANT:g}, of either sign, in one case of twenty.",
        table(["measure", *heads], rows),
    ])  # fmt: skip

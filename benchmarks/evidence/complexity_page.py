"""The page of rank against complexity: tables and plots from its results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.comparison import COUNTS
from benchmarks.evidence.complexity import (
    CUT,
    IN_USE,
    IN_USE_FIXED,
    KEPT_MORE,
    KEPT_RANK,
    LEARNED,
    MEASURES,
    NEEDED,
    SIGNIFICANT,
    correlation,
    in_order,
    of,
    shifts,
)
from benchmarks.evidence.experiment import Results, mean, table
from benchmarks.evidence.plot import ACCENT, CALM, Plot, Series

TITLES = {
    KEPT_RANK: "Mean rank that ours comes to, a share of 0.9 kept",
    LEARNED: "Total rank where the paper's form comes to rest",
    NEEDED: "Mean rank of ours that a subject needs",
    CUT: "Mean rank that a subject needs of a large rank, cut",
    IN_USE_FIXED: "Positions in use of a large fixed rank",
}
SHORT = {
    KEPT_RANK: "ours, 0.9 kept",
    KEPT_MORE: "ours, 0.95 kept",
    LEARNED: "paper's form, total rank",
    NEEDED: "ours, needed",
    CUT: "cut, needed",
    IN_USE: "in use, ours",
    IN_USE_FIXED: "in use, fixed rank",
}
COLOURS = {COUNTS[0]: ACCENT, COUNTS[1]: CALM}


def build(results: Results, folder: Path) -> str:
    """The part of the page, in Markdown; draws its pictures into the folder."""
    rows = []
    for measure, words in MEASURES.items():
        both = [in_order(results, measure, count) for count in COUNTS]
        cells = [f"{correlation(results, measure, count):.2f}" for count in COUNTS]
        rows.append([words, *cells, *(f"{good} of {pairs}" for good, pairs in both)])
    parts = [
        "## Rank and complexity",
        "The ten subjects are grids of 1, 4, 9 … 100 coloured parts. At a target that is filled, ours has the same total "
        "rank on all of them. What can show a subject's need is the rank that ours comes to where the target "
        "is only the most: that is "
        "the figure which counts here. It was made the one that counts when all figures were known; the others stand beside it. "
        f"Spearman's correlation of each, in the mean over {len(results['seeds'])} seeds, with the number of "
        "parts; and on how many "
        "outlines (box, hexagon, mug, drop, ball: two subjects each, k × k and (k + 5) × (k + 5) parts) the "
        "one of more parts has more:",
        table(["measure", *(f"{count} pictures" for count in COUNTS), *(f"outlines, {count}" for count in COUNTS)], rows),
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


FAR = 3
"""Places from its own at which a subject is said to stand out."""


def _verdict(results: Results) -> str:
    """Whether it is monotone, which subjects stand out, and which measures follow the number of parts."""
    count = COUNTS[0]
    found = {m: correlation(results, m, count) for m in MEASURES}
    good, poor = ([SHORT[m] for m in found if (found[m] >= SIGNIFICANT) is side] for side in (True, False))
    _, ranks, _, _ = of([r for r in results["rows"] if r["pictures"] == count], KEPT_RANK)
    told = [
        f"**{'Monotone' if found[KEPT_RANK] >= 1 else 'Not monotone'}:** with {count} pictures the rank that ours comes to has a "
        f"correlation of {found[KEPT_RANK]:.2f} with the number of parts, and lies between {min(ranks):.1f} and {max(ranks):.1f}."
    ]
    places = shifts(results, KEPT_RANK, count)
    for words, names in (
        ("more", [name.split()[-1] for name, by in places.items() if by >= FAR]),
        ("less", [name.split()[-1] for name, by in places.items() if by <= -FAR]),
    ):
        if names:
            told.append(f"{FAR} places or more out of order with {words} rank than their parts would give: {', '.join(names)}.")
    right, pairs = in_order(results, KEPT_RANK, count)
    few, _ = in_order(results, KEPT_RANK, COUNTS[1])
    told.append(
        "Outlines differ between subjects and may matter: they change how much of the pattern is seen. "
        "Between the two subjects of "
        f"an outline more parts come with more rank on {right} of {pairs} outlines (chance: {pairs} of {pairs} in one case of "
        f"{2**pairs}); with {COUNTS[1]} pictures on {few}. Outline and parts cannot be told apart further with two subjects each."
    )
    told.append(
        f"Ten subjects in no order reach a correlation of {SIGNIFICANT:g}, of either sign, in one case of "
        f"twenty. With {count} pictures "
        f"above it: {'; '.join(good) if good else 'none'}. Below it: {'; '.join(poor) if poor else 'none'}. Of "
        f"{len(found)} measures "
        "some will lie above a limit that all are near to."
    )
    told.append(
        "Two more reasons that may stand behind it, neither tested: an adaptive optimizer takes the size of "
        "gradients away; and the "
        "model's latents have one place for 8 × 8 pixels, so the parts of the finer half of the subjects are smaller than that."
    )
    return " ".join(told)


def _subjects(results: Results) -> str:
    rows = []
    for row in (r for r in results["rows"] if r["pictures"] == COUNTS[0]):
        cells = [f"{mean(row[m]):.{1 if m in (KEPT_RANK, KEPT_MORE, NEEDED, CUT) else 0}f}" if row[m] else "" for m in MEASURES]
        rows.append([row["subject"], row["parts"], row["outline"], *cells])
    body = table(["subject", "parts", "outline", *(SHORT[m] for m in MEASURES)], rows)
    return f"{COUNTS[0]} pictures, means over seeds:\n\n{body}"



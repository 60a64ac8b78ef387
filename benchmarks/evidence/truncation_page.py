"""The page of cutting at load: tables and plots from its results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.cuts import SHARES
from benchmarks.evidence.experiment import Results, table
from benchmarks.evidence.personal import FIXED, SETTLING
from benchmarks.evidence.plot import ACCENT, CALM, ROSE, SKY, STRAW, Plot, Series
from benchmarks.evidence.truncation import (
    PICTURES,
    SHARED_OUT,
    SHORTENED,
    TRAINED,
    WHOLE,
    both_ways,
    cost,
    losses,
    ordered_wins,
    size,
)

LINES = {
    "ours, by the loader to a size": (SETTLING, SHARED_OUT, ACCENT),
    "ours, each layer": (SETTLING, SHORTENED, STRAW),
    "ours, trained for the size": (SETTLING, TRAINED, SKY),
    "fixed rank, last positions left out": (FIXED, SHORTENED, ROSE),
    "fixed rank, by the loader": (FIXED, SHARED_OUT, CALM),
}


def build(results: Results, folder: Path) -> str:
    """The part of the page, in Markdown; draws its pictures into the folder."""
    rank = results["rank"]
    parts = [
        "## One file, many sizes",
        f"A file of ours with target {rank} and a fixed rank {rank}, both from the comparison above, cut at load to 75, 50 and "
        f"25 % with no training, {len(results['seeds'])} seeds. *Each layer*: every layer keeps its first positions. *By the "
        "loader to a size*: Load Adaptive LoRA's `megabytes`, which shares the bytes out over all layers. A fixed rank's "
        "positions have no order, so leaving the last ones out takes as much as any; the loader brings such a file into singular "
        "order first. *Trained for the size*: ours with that target, which costs a run for every size. Told of "
        f"{PICTURES[0]} pictures only: with fewer the fixed rank's cuts were not made in the order of training.",
    ]
    for count in PICTURES:
        parts += [
            f"### {count} pictures",
            _means(results, count),
            _picture(results, count, folder),
            _told(results, count),
        ]
        parts.append(_subjects(results, count))
    return "\n\n".join(parts)


def _means(results: Results, count: int) -> str:
    rows = []
    for words, (method, kind, _) in LINES.items():
        row = [words, f"{100 * cost(results, method, WHOLE, count, 1.0):+.1f} %"]
        for share in SHARES:
            kept = size(results, method, kind, count, share)
            row.append(f"{100 * cost(results, method, kind, count, share):+.1f} % at {100 * kept:.0f} %")
        rows.append(row)
    shares = [f"cut to {100 * share:.0f} %" for share in SHARES]
    body = table(["file", "whole", *shares], rows)
    return f"Loss over that of ours uncut, mean over subjects, at the bytes that are left:\n\n{body}"


def _picture(results: Results, count: int, folder: Path) -> str:
    series = []
    for words, (method, kind, colour) in LINES.items():
        xs, ys = [100.0], [100 * cost(results, method, WHOLE, count, 1.0)]
        for share in SHARES:
            xs.append(100 * size(results, method, kind, count, share))
            ys.append(100 * cost(results, method, kind, count, share))
        series.append(Series(words, xs, ys, colour=colour))
    name = f"truncation_{count}.png"
    Plot(f"Cut at load, {count} pictures", "% of the bytes", "loss over that of ours uncut, %", series).save(
        folder / name
    )
    return f"![Loss against what is left of a file, {count} pictures]({name})"


def _told(results: Results, count: int) -> str:
    names = sorted(losses(results, FIXED, WHOLE, count, 1.0))
    good = both_ways(results, count)
    not_so = [name for name in names if name not in good]
    return (
        f"Ours, cut in its order, is better than the fixed rank without its last positions at every share on "
        f"{len(ordered_wins(results, count, SHORTENED))} of {len(names)} subjects cut layer by layer, on "
        f"{len(ordered_wins(results, count, SHARED_OUT))} cut by the loader; both on {len(good)}. Not so: "
        f"{', '.join(not_so) if not_so else 'none'}. But the loader gives any file "
        "such an order, and a fixed rank then loses less by a cut than ours does: cut to "
        f"{100 * SHARES[-1]:.0f} % by the loader, it has {100 * cost(results, FIXED, SHARED_OUT, count, SHARES[-1]):+.1f} % over "
        f"ours uncut, ours {100 * cost(results, SETTLING, SHARED_OUT, count, SHARES[-1]):+.1f} %. Ours is better at every share "
        f"on {len(ordered_wins(results, count, SHARED_OUT, SHARED_OUT))} of {len(names)} subjects then."
    )


def _subjects(results: Results, count: int) -> str:
    quarter = SHARES[-1]
    whole = losses(results, SETTLING, WHOLE, count, 1.0)
    columns = [losses(results, method, kind, count, quarter) for method, kind, _ in LINES.values()]
    rows = [[name, *(f"{100 * (column[name] / whole[name] - 1):+.1f} %" for column in columns)] for name in whole]
    body = table(["subject", *LINES], rows)
    return f"<details>\n<summary>Every subject, cut to {100 * quarter:.0f} %</summary>\n\n{body}\n\n</details>"

"""The page of a target that is only the most: tables and plots from its results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.comparison import COUNTS, UNIT, tuning_names
from benchmarks.evidence.equal_bytes import BYTES
from benchmarks.evidence.experiment import Results, chosen, mean, table
from benchmarks.evidence.keeping import BESIDE, KEEPS, MOST, REPORTED, differences, of
from benchmarks.evidence.personal import FIXED, SETTLING
from benchmarks.evidence.plot import ACCENT, CALM, ROSE, Plot, Series

UNIT_KB = UNIT * BYTES / 1000


def build(results: Results, folder: Path) -> str:
    """The part of the page, in Markdown; draws its pictures into the folder."""
    parts = [
        "## A target that is only the most",
        "With `settle_keep` below 1 the target is an upper limit: the last cut keeps as little as holds that share of what "
        f"training has taken off the loss by then, so a subject's file is as large as it needs. Target {MOST} here, at the "
        "learning rate and step of the whole target, beside fixed ranks at theirs. What is claimed of it above is no goal that "
        "was set before: it was worded when the figures were known. Four shares on the subjects that settings are tuned on, one "
        "seed:",
        _tuning(results),
    ]
    for count in COUNTS:
        parts += [f"### {count} pictures, ten subjects, {len(results['seeds'])} seeds"]
        parts += [_means(results, count)]
        parts += [_told(results, count), _picture(results, count, folder), _subjects(results, count)]
    return "\n\n".join(parts)


def _tuning(results: Results) -> str:
    names, rows = tuning_names(), []
    for count in COUNTS:
        whole = of(results, count, "loss", names, method=SETTLING, keep=0.0)
        for keep in KEEPS:
            ranks = of(results, count, "mean_rank", names, method=SETTLING, keep=keep).values()
            losses = of(results, count, "loss", names, method=SETTLING, keep=keep)
            change = mean(losses[name] / whole[name] - 1 for name in losses)
            rows.append([count, f"{keep:g}", f"{min(ranks):.1f} to {max(ranks):.1f}", f"{100 * change:+.1f} %"])
    return table(["pictures", "share", "mean rank", f"loss over that of the whole target {MOST}, mean"], rows)


def _means(results: Results, count: int) -> str:
    rows = []
    for keep in REPORTED:
        ranks = of(results, count, "mean_rank", method=SETTLING, keep=keep).values()
        cells = []
        for rank in BESIDE:
            found = differences(results, count, keep, FIXED, rank).values()
            cells.append(f"{100 * mean(found):+.1f} % ({sum(d <= 0 for d in found)} of {len(found)})")
        whole = differences(results, count, keep, SETTLING, MOST).values()
        size = mean(ranks) * UNIT_KB
        rows.append([
            f"{keep:g}", f"{min(ranks):.1f} to {max(ranks):.1f}", f"{size:.0f}", *cells, f"{100 * mean(whole):+.1f} %",
        ])  # fmt: skip
    head = ["share", "mean rank", "KB, mean", *(f"over fixed {rank}" for rank in BESIDE), f"over ours, target {MOST}"]
    spreads = [mean(of(results, count, "spread", method=SETTLING, keep=keep).values()) for keep in REPORTED]
    apart = " and ".join(f"{spread:.0%} ({keep:g})" for spread, keep in zip(spreads, REPORTED, strict=True))
    return (
        f"Loss over that of the other, mean (and subjects on which it is lower or equal):\n\n{table(head, rows)}\n\n"
        f"From seed to seed, a subject's size differs by {apart}: the standard deviation, mean over subjects."
    )


def _told(results: Results, count: int) -> str:
    """Against which fixed ranks each share is below in the mean, and at what share of their bytes."""
    told = []
    for keep in REPORTED:
        size = mean(of(results, count, "mean_rank", method=SETTLING, keep=keep).values())
        by_rank = {rank: mean(differences(results, count, keep, FIXED, rank).values()) for rank in BESIDE}
        lower = [f"{rank}" for rank, value in by_rank.items() if value <= 0]
        higher = [
            f"{rank} by {100 * value:.1f} % at {100 * size / rank:.0f} % of its bytes"
            for rank, value in by_rank.items() if value > 0
        ]  # fmt: skip
        below = f"below fixed {', '.join(lower)} in the mean" if lower else "in the mean below no fixed rank"
        words = f"A share of {keep:g}: {below}"
        told.append(words + (f", above fixed {', '.join(higher)}." if higher else "."))
    return " ".join(told)


def _picture(results: Results, count: int, folder: Path) -> str:
    series = []
    for words, method, keeps, ranks, colour in (
        ("fixed rank", FIXED, (0.0,), BESIDE, CALM),
        (f"ours, target {MOST} whole", SETTLING, (0.0,), (MOST,), ROSE),
        (f"ours, shares {REPORTED[0]:g} and {REPORTED[1]:g}", SETTLING, REPORTED, (MOST,), ACCENT),
    ):
        xs, ys = [], []
        for keep in keeps:
            for rank in ranks:
                rows = chosen(results["rows"], pictures=count, method=method, rank=rank, keep=keep)
                rows = [row for row in rows if row["subject"] not in tuning_names()]
                xs.append(mean(r["mean_rank"] for r in rows) * UNIT_KB)
                ys.append(mean(r["loss"] / r["before"] for r in rows))
        series.append(Series(words, xs, ys, colour=colour))
    name = f"keeping_{count}.png"
    ticks = [(rank * UNIT_KB, f"{rank * UNIT_KB:.0f}") for rank in BESIDE]
    Plot(f"A target that is only the most, {count} pictures", "KB of factors, fp16, mean of ten subjects",
         "loss, share of the base's", series, x_log=2, x_ticks=ticks).save(folder / name)  # fmt: skip
    return f"![Held-out loss against size with a target that is only the most, {count} pictures]({name})"


def _subjects(results: Results, count: int) -> str:
    rows = []
    ranks = {keep: of(results, count, "mean_rank", method=SETTLING, keep=keep) for keep in REPORTED}
    losses = {keep: of(results, count, "loss", method=SETTLING, keep=keep) for keep in REPORTED}
    fixed = {rank: of(results, count, "loss", method=FIXED, rank=rank, keep=0.0) for rank in BESIDE}
    for name in ranks[REPORTED[0]]:
        own = [cell for keep in REPORTED for cell in (f"{ranks[keep][name]:.1f}", f"{losses[keep][name]:.4f}")]
        rows.append([name, *own, *(f"{fixed[rank][name]:.4f}" for rank in BESIDE)])
    head = [words for keep in REPORTED for words in (f"{keep:g}: mean rank", "loss")]
    body = table(["subject", *head, *(f"fixed {rank}: loss" for rank in BESIDE)], rows)
    return f"Every subject, means over the seeds:\n\n{body}"

"""The page of what settings and parts of the method are worth: tables from its results, with what each says of the default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import entropy
from benchmarks.evidence.ablations import (
    FREE,
    HELD,
    LOOSE,
    SETTING_OF_LONG,
    START,
    SURE,
    fixed_ranks,
    ours,
    papers,
    verdict,
)
from benchmarks.evidence.comparison import COUNTS
from benchmarks.evidence.experiment import Results, chosen, mean, table
from benchmarks.evidence.plot import Plot, Series
from benchmarks.evidence.variants import DECAYS, LONG, NEVER, PAPER_RANK, RANK

UNSEEN = 0.001
"""A change of the entropy by less than this share is not told of."""


def build(results: Results, folder: Path) -> str:
    """The part of the page, in Markdown; draws its pictures into the folder."""
    pairs = len(results["subjects"]) * len(results["seeds"])
    parts = [
        "## What each setting is worth",
        f"One change at a time, on the {len(results['subjects'])} subjects that settings are tuned on, {len(results['seeds'])} "
        f"seeds, target {RANK}. Every row is at the learning rate, of half powers of ten, that is best without the change, and "
        "where a change may shift that, at the best of it and of half a decade to both sides; at the best step to stop. *Loss*: "
        f"over that of the method as it is, in the mean over {pairs} pairs of subject and seed, ± its standard error. A "
        f"difference is said to be seen from {SURE:g} standard errors on; of some forty rows, three or four will seem so by "
        "chance, and all stand beside the same runs and share their luck. Mean ranks are weighted by cost. Not tried here: "
        "learning rate (tuned in each experiment), steps, batch, target, schedule, warm-up, optimizer and clipping. "
        "Their defaults come from practice with other trainers, not from here.",
        *_mixtures(results["mixtures"]),
    ]
    for count in COUNTS:
        rows = ours(results, count)
        if rows:
            parts += [f"### {count} pictures", _table(rows, results["defaults"]), _told(rows)]
    parts += [_moments(fixed_ranks(results)), _decays(results)]
    parts += [*_paper(results, folder), *_entropy(results["entropy"])]
    return "\n\n".join(parts)


def _mixtures(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """What they are worth, target by target."""
    if not rows:
        return []
    body = [
        [f"{row['target']:g}", f"{row['without']:.5f}", f"{row['with']:.5f}", _loss(row)] for row in rows
    ]  # fmt: skip
    return [
        "### Mixtures of positions",
        "What settled layers gain by training mixtures of their positions (lora2/method/rotation.py) instead of "
        f"the positions, {COUNTS[0]} pictures, on the tuning subjects; each at its own best learning rate and step. The more "
        "positions a layer has, the more of them hold next to nothing. Differences are means over pairs of subject and seed:",
        table(["target", "loss without", "loss with", "difference"], body),
    ]


def _table(rows: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> str:
    body = []
    for row in rows:
        side = " (best rate at the side)" if row["at_side"] else ""
        body.append([
            f"{row['setting']}", f"{defaults.get(row['setting'], '')}", f"{row['change']}{side}",
            _loss(row), f"{row['rank']:.1f}", f"{row['low']} to {row['high']}", verdict(row),
        ])  # fmt: skip
    return table(["setting", "default", "change", "loss", "mean rank", "of a layer", "says"], body)


def _moments(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a fixed rank gains by one thing that comes with every cut."""
    changed = [row for row in rows if row["setting"] == "fixed rank, moments"]
    return "\n\n".join([
        "**Moments that start anew.** A cut drops the optimizer's moments. So does this, at the same steps, with a plain LoRA of "
        f"fixed rank {RANK}, of which nothing is cut: what it gains would be no gain of ranks that differ.",
        table(["method", "change", "loss over that without it"], [["fixed rank", row["change"], _loss(row)] for row in changed]),
    ])  # fmt: skip


def _decays(results: Results) -> str:
    """What weight decay is worth to ours and to a fixed rank."""
    body = []
    for count in COUNTS:
        for words, setting in (("ours", "weight_decay"), ("fixed rank", "fixed rank, weight_decay")):
            own = {row["change"]: _loss(row) for row in chosen(results["rows"], pictures=count, setting=setting)}
            body.append([count, words, *(own[f"{decay}"] for decay in DECAYS)])
    return "\n\n".join([
        "**Weight decay is no merit of ours.** A fixed rank gains about as much by it, with 24 pictures more, and in every "
        "comparison on this page it has it too, as much as was chosen for ours. Loss over that with the default, target and rank "
        f"{RANK}:",
        table(["pictures", "method", *(f"{decay:g}" for decay in DECAYS)], body),
    ])  # fmt: skip


def _loss(row: Mapping[str, Any]) -> str:
    return f"{100 * row['difference']:+.2f} ± {100 * row['error']:.2f} %"


def _told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which defaults the rows support, oppose or leave open, by name."""
    said: dict[str, set[str]] = {}
    for row in rows:
        said.setdefault(row["setting"], set()).add(verdict(row))
    opposed = [name for name, verdicts in said.items() if "change better" in verdicts]
    supported = [name for name, verdicts in said.items() if "default better" in verdicts and name not in opposed]
    free = [name for name in said if name not in opposed and name not in supported]
    told = []
    for words, names in (
        ("Supported, since some change does worse", supported),
        ("Not supported, since some change does better", opposed),
        ("No difference could be seen here", free),
    ):
        told.append(f"{words}: {', '.join(names) if names else 'none'}.")
    for row in rows:
        if row["setting"] == "rank_hold" and row["change"] == NEVER and verdict(row) != "default better":
            told.append(
                f"Ranks that do not adapt before they are cut do as well here ({_loss(row)}): what is gained on fixed ranks on "
                "these subjects is gained by the cuts."
            )
    return " ".join(told)


def _paper(results: Results, folder: Path) -> list[str]:
    rows, long = papers(results), chosen(results["rows"], setting=SETTING_OF_LONG)
    short = [row for row in rows if row["setting"] != SETTING_OF_LONG]
    body = []
    for row in short:
        setting = row["setting"].removeprefix("paper's form, ")
        body.append([
            setting, row["change"], _loss(row), f"{row['rank']:.1f}", f"{row['low']} to {row['high']}",
        ])  # fmt: skip
    series = [
        Series(row["change"], [0.0, *(s for s, _ in row["growth"])], [START, *(r for _, r in row["growth"])])
        for row in long
        if "rank_learning_rate" not in row["change"]  # as far as there are colours; the table has them
    ]
    Plot(f"Ranks of the paper's form, {LONG} steps", "step", "mean rank", series, y_log=2).save(
        folder / "ablations_growth.png"
    )
    steps = [step for step, _ in long[0]["growth"]] if long else []
    grown = [
        [row["change"], START, *(f"{rank:.1f}" for _, rank in row["growth"]), f"{row['low']} to {row['high']}"]
        for row in long
    ]
    return [
        "### The paper's form",
        f"Pulled toward rank {PAPER_RANK}, from rank {START}, {COUNTS[0]} pictures; loss over that of the paper's form as it is. "
        "Sizes differ here, so a lower loss is no better method by itself.",
        table(["setting", "change", "loss", "mean rank", "of a layer"], body),
        f"**What the pull does.** {_pull(long)} Mean rank over {LONG} steps; a layer holds at most 256:",
        table(["change", "start", *(f"step {step}" for step in steps), "layers at the end"], grown),
        "![Mean rank against steps](ablations_growth.png)",
    ]


def _pull(long: Sequence[Mapping[str, Any]]) -> str:
    """How far ranks grow without the pull, with the default's, with a strong one."""
    ends = {row["change"]: row["growth"][-1][1] for row in long}
    if not {"as it is", FREE, HELD, LOOSE} <= set(ends):
        return ""
    free, own, held, loose = ends[FREE], ends["as it is"], ends[HELD], ends[LOOSE]
    near = "hardly less: the default is too weak to hold them" if own > 0.9 * free else "less"
    return (
        f"Without it, and without weight decay, which the paper does not have, ranks grow from {START} to {loose:.0f}; with "
        f"weight decay, which holds them too, to {free:.0f}, where they level off; with the default weight to {own:.0f}, "
        f"{near}; with {HELD} they come down to {held:.1f}."
    )


def _at_default(found: Results) -> str:
    none, default = (entropy.of(found, weight, "entropy") for weight in entropy.WEIGHTS[:2])
    small = abs(default - none) < UNSEEN
    return f"At the default weight, {entropy.WEIGHTS[1]:g}, it changes nothing that could be seen. " if small else ""


def _entropy(found: Results) -> list[str]:
    rows = []
    for weight in dict.fromkeys(run["weight"] for run in found["runs"]):
        ranks = [run["ranks"] for run in chosen(found["runs"], weight=weight)]
        changes = [f"{100 * entropy.of(found, weight, what):+.2f} %" for what in ("loss", "entropy")]
        rows.append([
            f"{weight:g}", *changes,
            f"{mean(r[1] for r in ranks):.2f}", f"{min(r[0] for r in ranks)} to {max(r[2] for r in ranks)}",
        ])  # fmt: skip
    return [
        "### Entropy of cross-attention",
        f"A small SD 1.x UNet with random weights and three random pictures, {found['steps']} steps on a CPU, "
        f"{len(found['seeds'])} seeds, change over training. The drawing model of the other experiments has no block that only "
        "attends to the caption, so the term does not apply to it. This shows that the term lowers the entropy it is a term of, "
        f"and what that costs. {_at_default(found)}Whether sharper attention makes better pictures, a model with random weights "
        "cannot show.",
        table(["entropy_weight", "denoising loss", "entropy", "mean rank", "of a layer"], rows),
    ]

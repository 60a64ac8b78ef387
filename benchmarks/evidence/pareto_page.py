"""The page of losses at equal bytes: tables and plots from its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.comparison import (
    ALLOCATED,
    COUNTS,
    CUT_RANKS,
    FIXED_RANKS,
    LARGE,
    PAPER_TARGETS,
    RESIZED,
    STEPS,
    TARGETS,
    TUNING_SEEDS,
    UNIT,
    Choice,
    Config,
)
from benchmarks.evidence.equal_bytes import (
    BYTES,
    METHODS,
    SURE,
    Pair,
    Points,
    beaten,
    pair_error,
    pairs,
    same_target,
    surely_better,
    surely_worse,
    tally,
)
from benchmarks.evidence.experiment import Results, mean, table
from benchmarks.evidence.longer import LONGER, LOWER
from benchmarks.evidence.pareto import choices_of, points_of
from benchmarks.evidence.personal import FIXED, PAPER, SETTLING
from benchmarks.evidence.plot import ACCENT, CALM, ROSE, SKY, STRAW, Color, Plot, Series, sheet

WORDS = {SETTLING: "ours", **METHODS}
COLOURS: dict[str, Color] = {SETTLING: ACCENT, FIXED: CALM, RESIZED: ROSE, ALLOCATED: SKY, PAPER: STRAW}
RANKS = {SETTLING: TARGETS, FIXED: FIXED_RANKS, RESIZED: CUT_RANKS, ALLOCATED: CUT_RANKS, PAPER: PAPER_TARGETS}
UNIT_KB = UNIT * BYTES / 1000


def build(results: Results, folder: Path) -> str:
    """The part of the page, in Markdown; draws its pictures into the folder."""
    found, chosen = points_of(results), choices_of(results)
    names = list(dict.fromkeys(subject for subject, _ in found))
    parts = [
        "## Loss at equal bytes",
        _about(results, names),
        "**Subjects on which ours is better or equal at every size:**",
    ]
    parts.append(_headline(found))
    for count in COUNTS:
        parts += [f"### {count} pictures"]
        parts += _pictures(found, names, count, folder)
        parts += [_by_subject(found, names, count), _remains(found, count)]
    parts += ["### What is forgotten", _drift(found, names, folder)]
    parts += ["### What was tuned", _stopped(chosen, results["steps"]), _longer(results["longer"]), _tuned(chosen)]
    return "\n\n".join(parts)


def _about(results: Results, names: Sequence[str]) -> str:
    seeds = len(results["seeds"])
    return (
        f"The repository's small drawing model learns {len(names)} subjects that it has never seen, grids of 1 to 100 coloured "
        f"parts, from {COUNTS[0]} or from {COUNTS[1]} pictures, in at most {results['steps']} steps of 4 pictures, {seeds} seeds "
        "each. Ours is the node's default but for target, learning rate, steps and batch. The loss is that of denoising 12 "
        "pictures of the subject at places where it was not trained. Every method, size and number of pictures has its own "
        "learning rate and its own step to stop at, both tuned on four other subjects: rates in half powers of ten, until the "
        f"best lies inside what was tried, and a quarter to both sides of the best one too, with {len(TUNING_SEEDS)} seeds, for "
        "every method alike. What is judged on the same runs, those of fixed rank 64, may use any rate that one of them walked "
        f"to. {_walks(results)}All have the node's weight decay, too. Bytes are those of the factors in fp16: a unit of rank in "
        f"every layer takes {UNIT_KB:.1f} KB.\n\n"
        "Against *fixed rank* r stands, of ours whose files are no larger, the one with the target that did best on the tuning "
        "subjects: a smaller file that is better is the better choice at equal bytes, too. *The same target*: ours with target r "
        "instead. The ten subjects were not unseen when the method got its present form: with "
        f"{COUNTS[0]} pictures ours was better than every fixed rank on 6 of them at first (a start at four times the target, "
        "rates tuned in half powers of ten), on 3 with a start at twice the target and finer rates, on 5 with four times again "
        "and the rule above, on 8 with mixtures of positions. Before weight decay, which came last, ours was better than rank "
        f"{LARGE} resized to every size on 7 with {COUNTS[0]} pictures; with {COUNTS[1]} it was better than every fixed rank on "
        "none, and than the resized one on 2. Every choice was made on the four tuning subjects, but that there had to be "
        f"another one was seen on the ten. The same method with the first four of these {seeds} seeds had been told of before: "
        f"better than every fixed rank on 8 and than the resized one on 5 with {COUNTS[0]} pictures, and four of the five others "
        "missed by less than half a percent, within the error; that is why there are more seeds. "
        f"*{WORDS[RESIZED]}* is a LoRA of rank {LARGE}, cut after training to at most the "
        "size of rank r so that every layer keeps the same share of its norm (as sd-scripts' sv_fro does); "
        f"*{WORDS[ALLOCATED]}*: so that all layers together keep the most energy per byte. *Paper's form* never settles: it has "
        "the size that its ranks end at, and ours is no larger."
    )


def _walks(results: Results) -> str:
    """What a walk to the nearest optimum may have missed, where it is known to have."""
    missed = [
        f"with {count} pictures fixed rank {LARGE} would be {100 * share:.1f} % better on the tuning subjects at another rate "
        "that was tried, at which the reported ones were not trained"
        for count, share in results.get("beyond", {}).items()
        if share > 0
    ]
    if not missed:
        return ""
    return (
        f"A walk ends at the nearest optimum: {'; '.join(missed)}. Other large ranks, of either method, may have one there "
        "too, where their walks did not look. "
    )


def _headline(found: Points) -> str:
    rows = []
    for count in COUNTS:
        rows += [[count, name, *_tallied(pairs(found, method, count))] for method, name in METHODS.items()]
        for method in (FIXED, RESIZED):
            rows.append([count, f"{METHODS[method]}, the same target", *_tallied(same_target(found, method, count))])
    head = ["pictures", "ours against", "subjects", "pairs of subject and size", "loss, mean difference", "worst pair"]
    return table(head, rows)


def _tallied(compared: Sequence[Pair]) -> list[str]:
    told = tally(compared)
    return [
        f"{told['beaten']} of {told['subjects']}", f"{100 * told['share']:.0f} %", f"{100 * told['difference']:+.1f} %",
        f"{100 * told['worst']:+.1f} %",
    ]  # fmt: skip


def _kilobytes(found: Points, names: Sequence[str], config: Config) -> float:
    return mean(found[name, config].parameters for name in names if (name, config) in found) * BYTES / 1000


def _line(found: Points, names: Sequence[str], method: str, count: int) -> tuple[list[float], list[float], list[float]]:
    """KB, loss as a share of that before training, and drift over that before: means over subjects, by size."""
    sizes, losses, drifts = [], [], []
    for rank in RANKS[method]:
        config = (method, rank, count)
        own = [found[name, config] for name in names if (name, config) in found]
        if len(own) == len(names):
            sizes.append(_kilobytes(found, names, config))
            losses.append(mean(p.loss / p.before for p in own))
            drifts.append(mean(p.drift / p.drift_before for p in own))
    return sizes, losses, drifts


def _pictures(found: Points, names: Sequence[str], count: int, folder: Path) -> list[str]:
    lines, beside = [], []
    for method in WORDS:
        sizes, losses, _ = _line(found, names, method, count)
        lines.append(Series(WORDS[method], sizes, losses, colour=COLOURS[method]))
        if method in (SETTLING, PAPER):
            continue
        compared = pairs(found, method, count)
        ranks = sorted({p.rank for p in compared})
        each = [[100 * p.difference for p in compared if p.rank == rank] for rank in ranks]
        beside.append(
            Series(f"against {WORDS[method]}", [r * UNIT_KB for r in ranks], [mean(e) for e in each],
                   low=[min(e) for e in each] if method == FIXED else (), high=[max(e) for e in each] if method == FIXED else (),
                   colour=COLOURS[method])
        )  # fmt: skip
    kept = [s for s in lines if len(s.x)]
    Plot(f"Held-out loss against size, {count} pictures", "KB of factors, fp16", "loss, share of the base's", kept,
         x_log=2, x_ticks=_ticks(kept)).save(folder / f"pareto_{count}.png")  # fmt: skip
    Plot(f"Ours at equal bytes, {count} pictures", "KB of factors, fp16", "% of the other's loss; below 0: ours is better",
         beside, x_log=2, x_ticks=_ticks(beside), limit=(0.0, "as good")).save(folder / f"pareto_beside_{count}.png")  # fmt: skip
    sheet([_small(found, name, count) for name in names], 3, folder / f"pareto_subjects_{count}.png", 480)
    return [
        f"![Held-out loss against size, {count} pictures](pareto_{count}.png)",
        f"![Ours at equal bytes, {count} pictures](pareto_beside_{count}.png)",
        "Bars: the best and the worst subject against fixed ranks. Each subject by itself:",
        f"![Every subject, {count} pictures](pareto_subjects_{count}.png)",
    ]


def _ticks(series: Sequence[Series]) -> list[tuple[float, str]]:
    """The sizes of uniform ranks, every other one."""
    largest = max(max(s.x) for s in series)
    return [(r * UNIT_KB, f"{r * UNIT_KB:.0f}") for r in (1, 4, 16, 64) if r * UNIT_KB <= 1.2 * largest]


def _small(found: Points, name: str, count: int) -> Plot:
    lines = []
    for method in (SETTLING, FIXED, RESIZED):
        own = [found[name, (method, rank, count)] for rank in RANKS[method] if (name, (method, rank, count)) in found]
        sizes, losses = [p.parameters * BYTES / 1000 for p in own], [p.loss / p.before for p in own]
        if own:
            lines.append(Series(WORDS[method], sizes, losses, colour=COLOURS[method]))
    return Plot(name, "KB", "loss, share of the base's", lines, x_log=2, x_ticks=_ticks(lines), width=480, height=380)


def _by_subject(found: Points, names: Sequence[str], count: int) -> str:
    compared = {(p.subject, p.rank): p for p in pairs(found, FIXED, count)}
    cut = pairs(found, RESIZED, count)
    by_energy = pairs(found, ALLOCATED, count)
    rows = []
    for name in names:
        own = [compared.get((name, rank)) for rank in FIXED_RANKS]
        cells = ["" if p is None else f"{100 * p.difference:+.1f}" for p in own]
        rows.append([name, *cells, _often([p for p in own if p]), _often(cut, name), _often(by_energy, name)])
    ranks = [f"rank {rank}" for rank in FIXED_RANKS]
    return "\n\n".join([
        "Every subject: loss of ours over the fixed rank's at equal bytes, in %, and in how many sizes it is better or equal:",
        table(["subject", *ranks, "fixed", WORDS[RESIZED], WORDS[ALLOCATED]], rows),
        _not_so(beaten(list(compared.values())), beaten(cut)),
    ])  # fmt: skip


def _often(compared: Sequence[Pair], name: str = "") -> str:
    own = [p for p in compared if name in ("", p.subject)]
    return f"{sum(p.better for p in own)} of {len(own)}"


def _not_so(fixed: dict[str, bool], cut: dict[str, bool]) -> str:
    """Where it does not hold, by name."""
    told = []
    for words, each in (("every fixed rank", fixed), (f"{WORDS[RESIZED]}", cut)):
        names = [name for name, good in each.items() if not good]
        told.append(f"Not better than {words} at every size: {', '.join(names) if names else 'none'}.")
    return " ".join(told)


def _remains(found: Points, count: int) -> str:
    """What is won and what is not against fixed ranks, rank by rank."""
    compared = pairs(found, FIXED, count)
    error, worse = pair_error(compared), surely_worse(compared)
    rows = []
    for rank in FIXED_RANKS:
        own = [p for p in compared if p.rank == rank]
        rows.append([
            rank, f"{mean(p.ours.parameters for p in own) / UNIT:.0f}",
            f"{100 * mean(p.difference for p in own):+.1f} %", f"{sum(p.better for p in own)} of {len(own)}",
            ", ".join(p.subject.split()[-1] for p in worse if p.rank == rank), *_beside(found, count, rank),
        ])  # fmt: skip
    return "\n\n".join([
        f"**What remains, {count} pictures.** Over the seeds the standard error of a pair is {100 * error:.1f} % (pooled over "
        f"all pairs). Of {len(compared)}, ours is better or equal in {sum(p.better for p in compared)}; by more than {SURE:g} "
        f"standard errors it is better in {len(surely_better(compared))} and worse in {len(worse)}. Rank by rank:",
        table(["rank", "mean rank of ours", "mean difference", "better or equal", f"worse by more than {SURE:g} standard errors",
               *(f"against {WORDS[method]}, mean" for method in CUT_WAYS)], rows),
        _large(found, count),
        _own_best(found, count),
    ])  # fmt: skip


CUT_WAYS = (RESIZED, ALLOCATED)


def _beside(found: Points, count: int, rank: int) -> list[str]:
    """The mean difference to what a large rank is cut to at this size, where it is cut."""
    cells = []
    for method in CUT_WAYS:
        own = [p.difference for p in pairs(found, method, count) if p.rank == rank]
        cells.append(f"{100 * mean(own):+.1f} %" if own else "")
    return cells


def _large(found: Points, count: int) -> str:
    """Of the largest rank: what stands against it, and where that is behind."""
    own = [p for p in pairs(found, FIXED, count) if p.rank == LARGE]
    lost = [p.subject for p in own if not p.better]
    size = mean(p.ours.parameters for p in own) / UNIT
    told = f"Against rank {LARGE}, a quarter of full rank, stands ours of mean rank {size:.0f}: "
    return told + (f"behind on {len(lost)} subjects ({_short(lost)})." if lost else "better or equal on every subject.")


def _own_best(found: Points, count: int) -> str:
    """Both methods at the size that is best for each subject, which nobody knows beforehand."""
    told: dict[str, dict[str, tuple[float, int]]] = {}
    for (name, (method, size, pictures)), at in found.items():
        if pictures == count and method in (SETTLING, FIXED):
            best = told.setdefault(name, {})
            best[method] = min(best.get(method, (math.inf, 0)), (at.loss, size))
    both = {name: (each[SETTLING], each[FIXED]) for name, each in told.items() if len(each) == 2}
    better = [name for name, (ours, fixed) in both.items() if ours[0] <= fixed[0]]
    words = (
        f"Each at the size that is best for a subject, as the judging pictures say, ours is better or equal on {len(better)} of "
        f"{len(both)} and {100 * mean(1 - ours[0] / fixed[0] for ours, fixed in both.values()):.1f} % lower in the mean"
    )
    small = [name for name, (ours, _) in both.items() if ours[1] <= SMALL_BEST]
    if not small:
        return f"{words}."
    return (
        f"{words}. On {_short(small)} the best size of ours is {SMALL_BEST} or less, since more rank only learns the few "
        "pictures by heart: what is missing there is to know that beforehand."
    )


SMALL_BEST = 2
"""A rank, so small that more does harm."""


def _short(names: Sequence[str]) -> str:
    return ", ".join(name.split()[-1] for name in names)


def _drift(found: Points, names: Sequence[str], folder: Path) -> str:
    rows, pictures = [], []
    for count in COUNTS:
        for rank in FIXED_RANKS:
            row: list[object] = [count, f"{rank * UNIT_KB:.0f}"]
            for method in (SETTLING, FIXED, RESIZED):
                own = [found[n, (method, rank, count)] for n in names if (n, (method, rank, count)) in found]
                row.append(f"{mean(p.drift / p.drift_before for p in own):.2f}" if own else "")
            rows.append(row)
        lines = []
        for method in WORDS:
            _, losses, drifts = _line(found, names, method, count)
            if losses:
                lines.append(Series(WORDS[method], drifts, losses, colour=COLOURS[method]))
        Plot(f"What is forgotten, {count} pictures", "loss on the world's other pictures, over the base's",
             "loss on the subject, share of the base's", lines).save(folder / f"pareto_drift_{count}.png")  # fmt: skip
        pictures.append(f"![What is forgotten, {count} pictures](pareto_drift_{count}.png)")
    return "\n\n".join([
        "Loss on twelve pictures of the base's own world, over what it was before: 1 means that nothing is forgotten. Ours with "
        f"the target of that size, not the one that stands there above. {_forgets(found, names)}",
        table(["pictures", "KB", "ours", "fixed rank", WORDS[RESIZED]], rows),
        *pictures,
    ])  # fmt: skip


def _forgets(found: Points, names: Sequence[str]) -> str:
    """At how many sizes ours forgets more than the others do."""
    told = []
    for count in COUNTS:
        each = []
        for method in (FIXED, RESIZED):
            ranks = [r for r in RANKS[method] if (names[0], (method, r, count)) in found]
            ours, other = (
                [mean(found[n, (m, r, count)].drift for n in names) for r in ranks] for m in (SETTLING, method)
            )
            each.append(
                f"{WORDS[method]} at {sum(a > b for a, b in zip(ours, other, strict=True))} of {len(ranks)} sizes"
            )
        told.append(f"with {count} pictures more than {' and than '.join(each)}")
    return f"Ours forgets {'; '.join(told)}."


def _stopped(chosen: Mapping[Config, Choice], steps: int) -> str:
    """How many stopping points are the last step, and what follows from that."""
    told = []
    for count in COUNTS:
        own = [choice.step == steps for config, choice in chosen.items() if config[2] == count]
        told.append(f"{sum(own)} of {len(own)} with {count} pictures")
    return (
        f"Steps end at {steps} for every method, and the learning rate falls to a tenth by then. That step was the best one for "
        f"{', '.join(told)}: those might gain by more steps, so what is compared is what each makes of {steps} at most."
    )


def _longer(rows: Sequence[Mapping[str, Any]]) -> str:
    """What twice the steps change."""
    if not rows:
        return ""

    def told(value: Sequence[float]) -> str:
        return f"{100 * value[0]:+.1f} ± {100 * value[1]:.1f} %"

    said = [_gained(own) for count in COUNTS if (own := [row for row in rows if row["pictures"] == count])]
    body = [
        [row["pictures"], row["rank"], *(told(row[of]) for of in (FIXED, SETTLING, f"ours_{STEPS}", f"ours_{LONGER}"))]
        for row in rows
    ]
    return "\n\n".join([
        f"**Twice the steps**, on the subjects that settings are tuned on, {len(TUNING_SEEDS)} seeds: what {LONGER} steps "
        f"change, at the best of the tuned learning rate and the next {LOWER} below it (no further ones were tried), and ours "
        "with the same target over the fixed rank:",
        table(["pictures", "rank", "fixed rank", "ours", f"ours over fixed, {STEPS} steps", f"{LONGER} steps"], body),
        " ".join(said),
    ])  # fmt: skip


def _gained(rows: Sequence[Mapping[str, Any]]) -> str:
    """What twice the steps change with one number of pictures, where it is the same at every size."""
    fixed, ours = ([row[method][0] for row in rows] for method in (FIXED, SETTLING))
    pictures = f"With {rows[0]['pictures']} pictures"
    if max(*fixed, *ours) < 0:
        return f"{pictures} both methods gain by them."
    if min(*fixed, *ours) > 0:
        more = "ours more, " if all(a > b for a, b in zip(ours, fixed, strict=True)) else ""
        return f"{pictures} both lose by them, {more}so {STEPS} steps are not too few there."
    return f"{pictures} it differs."


def _tuned(chosen: dict[Config, Choice]) -> str:
    rows = []
    for (method, rank, count), choice in chosen.items():
        tried = f"{choice.tried[0]:.0e} to {choice.tried[-1]:.0e}" if choice.tried else ""
        rows.append([count, WORDS[method], rank, f"{choice.rate:.1e}", choice.step, f"{choice.loss:.4f}", tried])
    body = table(["pictures", "method", "rank", "learning rate", "stopped at step", "loss", "rates tried"], rows)
    return f"<details>\n<summary>Learning rates and stopping points</summary>\n\n{body}\n\n</details>"

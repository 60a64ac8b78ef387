"""The page of rank recovery: tables and plots from its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.experiment import Results, chosen, mean, table
from benchmarks.evidence.plot import ACCENT, CALM, GREY, Plot, Series
from benchmarks.evidence.recovery import (
    FORMS,
    NOISE,
    PURE,
    PURE_TARGET,
    RANKS,
    RATES,
    SETTLED,
    WEIGHTS,
    by_rest,
    by_weight,
    missing_share,
    order,
)

COLOURS = {SETTLED: ACCENT, PURE: CALM}


def build(results: Results, folder: Path) -> str:
    """The part of the page, in Markdown; draws its pictures into the folder."""
    runs, ranks = results["runs"], results["true_ranks"]
    _learned_plot(runs, ranks).save(folder / "recovery_ranks.png")
    _weight_plots(runs, folder)
    own = chosen(runs, group="shapes")
    layouts = list(dict.fromkeys(run["layout"] for run in own))
    rows = []
    for layout in layouts:
        row: list[object] = [layout.replace(" x ", " × ")]
        for form in FORMS:
            part = chosen(own, layout=layout, form=form)
            row += [f"{order(part):.3f}", f"{missing_share(part):.0e}"] if part else ["", ""]
        rows.append(row)
    seeds = len({run["seed"] for run in own})
    return "\n\n".join(
        [
            "## Ranks that mean something",
            f"Ten layers must each learn a change of a known rank: {', '.join(map(str, ranks))}. They are "
            f"trained by the pack's own "
            "trainer with the node's defaults but for steps, batch and learning rate, and without weight decay, since inputs "
            "never end "
            f"({results['steps'][SETTLED]} steps, {results['steps'][PURE]} for the paper's form; batches of 48; "
            f"{RATES[SETTLED]:g} and {RATES[PURE]:g}), with singular "
            f"values that are all alike or fall to a quarter, {seeds} seeds each. Settling has a target that just pays for "
            f"all true ranks. The paper's form (`settle_at` 1) is pulled toward rank {PURE_TARGET} and starts "
            f"from rank 16. *Missing* "
            "is ‖ΔW − T‖² / ‖T‖² of the worst layer of all runs after training.",
            table(
                ["shape of the layers", "settled: Spearman", "missing", "paper's form: Spearman", "missing"],
                rows,
            ),
            "![Learned rank against true rank](recovery_ranks.png)",
            _found(own),
            "**Against the weight of the pull** (`rank_weight`; the loss is 1 before training):",
            "![Spearman against rank_weight](recovery_order.png)",
            "![Missing share against rank_weight](recovery_missing.png)",
            _weights_told(runs),
            *_details(runs),
        ]
    )


ENOUGH = 1e-3
"""What may be missing of a layer's change."""


def _found(own: Sequence[Results]) -> str:
    """Whether each form finds the ranks, their order, and all of the change."""
    fewer, more = _off(chosen(own, form=SETTLED))
    told = [
        f"Settling cuts to the true ranks: learned ones lie from {fewer} below to {more} above them. The target pays for a "
        "little more than all need together."
    ]
    part = chosen(own, form=PURE)
    layouts = dict.fromkeys(run["layout"] for run in part)
    poor = [name.replace(" x ", " × ") for name in layouts if order(chosen(part, layout=name)) < 0.95]
    told.append(
        "The paper's form finds their order: its ranks are what the pull leaves, well above the truth. Its "
        f"learning rate was tried on layers of another seed; at {RATES[SETTLED]:g}, with which it was run first, some of its "
        "ranks end below what their layer needs."
    )
    if poor:
        told.append(f"Its order is not found to 0.95 for {', '.join(poor)}.")
    lacking = sum(run["residual"] > ENOUGH for run in part)
    if lacking:
        told.append(f"In {lacking} of its {len(part)} runs more than {ENOUGH:g} of some layer's change is missing.")
    return " ".join(words for words in told if words)


def _off(own: Sequence[Results]) -> tuple[int, int]:
    """By how much a learned rank is below and above the true one at most, in any run."""
    off = [rank - true for run in own for rank, true in zip(run["ranks"], RANKS, strict=True)]
    return max(0, -min(off)), max(0, max(off))


def _weights_told(runs: Sequence[Results]) -> str:
    """Up to which weight of the paper's form nothing is missing, and between which its order is found."""
    swept = by_weight(runs, PURE)
    whole = [f"{weight:g}" for weight, own in swept.items() if missing_share(own) <= ENOUGH]
    ordered = [f"{weight:g}" for weight, own in swept.items() if order(own) >= 0.95]
    return (
        "Settling does not depend on it: the cut goes by what was learned. In the paper's form the weight decides how far ranks "
        f"shrink. Nothing that a layer needs is missing at: {', '.join(whole) or 'none'}; the order of ranks "
        "is found to 0.95 at: "
        f"{', '.join(ordered) or 'none'}."
    )


def _learned_plot(runs: Sequence[Results], ranks: Sequence[int]) -> Plot:
    series = [Series("as the truth", ranks, ranks, points=False, colour=GREY)]
    for form, name in FORMS.items():
        columns = list(zip(*(run["ranks"] for run in chosen(runs, group="shapes", form=form)), strict=True))
        series.append(
            Series(
                name,
                ranks,
                [mean(c) for c in columns],
                low=[min(c) for c in columns],
                high=[max(c) for c in columns],
                colour=COLOURS[form],
            )
        )
    return Plot(
        "Learned rank against true rank", "true rank", "learned rank: mean, lowest, highest", series, x_log=2, y_log=2
    )


def _weight_plots(runs: Sequence[Results], folder: Path) -> None:
    orders, missing = [], []
    weights: set[float] = set()
    for form, name in FORMS.items():
        swept = by_weight(runs, form)
        weights |= set(swept)
        at = [_off_zero(w) for w in swept]
        orders.append(Series(name, at, [order(own) for own in swept.values()], colour=COLOURS[form]))
        missing.append(Series(name, at, [missing_share(own) for own in swept.values()], colour=COLOURS[form]))
    ticks = [(_off_zero(w), f"{w:g}") for w in sorted(weights)]
    about = {"x_name": "rank_weight", "x_log": 10, "x_ticks": ticks}
    by_order = Plot("Order of learned ranks against rank_weight", y_name="Spearman, mean", series=orders,
                 limit=(0.95, "0.95"), y_range=(0.0, 1.0), **about)  # type: ignore[arg-type]  # fmt: skip
    by_order.save(folder / "recovery_order.png")
    left = Plot("Missing after training against rank_weight", y_name="missing share of the worst layer", series=missing,
                y_log=10, limit=(1e-3, "0.001"), **about)  # type: ignore[arg-type]  # fmt: skip
    left.save(folder / "recovery_missing.png")


def _off_zero(weight: float) -> float:
    """A place for 0 on a logarithmic axis: one decade below the smallest weight of the sweep."""
    return weight or min(w for w in WEIGHTS if w) / 10


def _details(runs: Sequence[Results]) -> list[str]:
    parts = [
        "**Why ranks rest at the end** (64 × 64). Where ranks move to the last step, the position that was "
        "dropped last may have held a "
        "share of the change, and nothing is left of the learning rate to learn it again. So in the paper's "
        "form ranks stand still for "
        "the last quarter of the steps by default:",
        table(
            ["share of the steps at the end", "Spearman", "missing, worst layer of all seeds"],
            [[f"{rest:g}", f"{order(own):.3f}", f"{missing_share(own):.0e}"] for rest, own in by_rest(runs).items()],
        ),
        "**A budget that does not pay for all, or for more** (64 × 64, settled; with "
        f"noise, {NOISE:g} of the loss before training, that nothing can explain, as pictures always leave): what was learned, "
        "as a share of the most that the "
        "budget can hold, direction by direction. Where all directions are worth the same, it makes "
        "no difference which are kept, and "
        "the order of ranks then says nothing; where they differ, almost all of the right ones are. "
        "What is not needed is spent on noise, so ask for no more than you need:",
        table(
            [
                "budget, of what the true ranks take",
                "Spearman, values alike",
                "falling",
                "learned, alike",
                "falling",
                "worst seed of both",
            ],
            _share_rows(runs),
        ),
        *_exact(runs),
    ]
    start = chosen(runs, group="start")
    if start:
        values = sorted({run["initial"] for run in start})
        parts += [
            "**The rank to start from** (64 × 64, settled; the target is 11, so the default is 44). "
            "Ranks adapt for a few steps before the first cut, and hardly grow in them: start above the "
            "largest rank that a layer may "
            "need, here 32. Four times the target, at least 16, is enough for a layer of up to four times the mean:",
            _line_table("initial_rank", [(f"{v}", chosen(start, initial=v)) for v in values]),
        ]
    noise = chosen(runs, group="noise")
    if noise:
        values = sorted({run["noise"] for run in noise})
        parts += [
            "**Error that nothing can explain**, as a share of the loss before training (64 × 64, settled). "
            "Real losses have much of it; "
            "what is missing is then bounded by the number of samples:",
            _line_table("noise", [(f"{v:g}", chosen(noise, noise=v)) for v in values]),
        ]
    return parts


def _exact(runs: Sequence[Results]) -> list[str]:
    """The same without noise."""
    own = chosen(runs, group="exact")
    if not own:
        return []
    rows = []
    for share in sorted({run["share"] for run in own}):
        kept = [run["kept"] for run in chosen(own, share=share)]
        rows.append([f"{share:g}", f"{order(chosen(own, share=share)):.3f}", f"{min(kept):.3f} to {max(kept):.3f}"])
    lowest, highest = min(run["kept"] for run in own), max(run["kept"] for run in own)
    return [
        "The same without noise, values falling. A task that can be learned exactly leaves no error, so "
        "gradients vanish, and with "
        "them what tells the worth of a layer: a budget that is too small then keeps "
        f"{100 * lowest:.0f} to {100 * highest:.0f} % of what it could. No real loss is like that, but ranks "
        "at a budget that is too "
        "small should not be trusted where the loss goes to nothing:",
        table(["budget, of what the true ranks take", "Spearman", "learned, of the most that fits, all seeds"], rows),
    ]


def _share_rows(runs: Sequence[Results]) -> list[list[str]]:
    rows = []
    for share in sorted({run["share"] for run in chosen(runs, group="shares")}):
        both = [chosen(runs, group="shares", share=share, decay=decay) for decay in (1.0, 4.0)]
        orders = [f"{order(own):.3f}" if own else "" for own in both]
        kept = [f"{mean(run['kept'] for run in own):.3f}" if own else "" for own in both]
        worst = min(run["kept"] for own in both for run in own)
        rows.append([f"{share:g}", *orders, *kept, f"{worst:.3f}"])
    return rows


def _line_table(name: str, rows: Sequence[tuple[str, Sequence[Results]]]) -> str:
    return table(
        [name, "Spearman", "missing, worst layer of all seeds"],
        [[label, f"{order(own):.3f}", f"{missing_share(own):.0e}"] for label, own in rows],
    )

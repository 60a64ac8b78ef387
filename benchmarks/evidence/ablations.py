"""What each setting and part of the method is worth: one change at a time, on the subjects that settings are tuned on.

`python -m benchmarks.evidence.ablations` computes it from docs/evidence/records.jsonl.gz (gpu.py makes those), and trains a
small UNet with and without the entropy term on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.evidence import entropy, reduced
from benchmarks.evidence.comparison import COUNTS
from benchmarks.evidence.effects import Effect, effects, mixtures, ranks_of
from benchmarks.evidence.experiment import Claim, Results, chosen, main, mean
from benchmarks.evidence.measuring import rounded
from benchmarks.evidence.personal import PAPER
from benchmarks.evidence.variants import LONG, SEEDS

KEY, FILE = "ablations", "ablations.json"

SURE = 2.0
"""Standard errors from 0 at which a change is said to make a difference."""
SMALL = 0.005
"""A change that is better than a default by more than this share of the loss, for sure, speaks against the default."""
FREE, HELD, LOOSE = "rank_weight 0", "rank_weight 0.01", "rank_weight 0, weight_decay 0"
"""The paper's longer runs whose ranks nothing pulls, whose ranks are pulled hard, and those that nothing at all holds."""
PULLS = (0.0, 0.3)
"""`rank_weight` of the reduced runs."""
SETTING_OF_LONG = f"paper's form, {LONG} steps"


def run(full: bool) -> Results:
    """From the records of the full run; or the paper's form with and without its regulariser, for a few steps."""
    if not full:
        return _reduced()
    from benchmarks.evidence import records
    from dev.painter.subjects import TUNING

    about, kept, tuned = records.full()
    rows = [_row(effect, count) for count in COUNTS for effect in effects(kept, tuned, count)]
    return {
        "about": about, "subjects": [s.name for s in TUNING], "seeds": list(SEEDS), "defaults": defaults(),
        "rows": rounded(rows), "mixtures": rounded(mixtures(kept, tuned)), "entropy": rounded(entropy.run(full=True)),
    }  # fmt: skip


def _reduced() -> Results:
    base = reduced.job((PAPER, 2, reduced.PICTURES), reduced.SUBJECTS[0], cuts=False, steps=60)
    faster = (("rank_rest", 0.0), ("rank_learning_rate", 0.03))
    jobs = {weight: replace(base, changes=(("rank_weight", weight), *faster)) for weight in PULLS}
    done = reduced.records(list(jobs.values()))
    ranks = [mean(ranks_of(done[one.key])) for one in jobs.values()]
    return {"ranks": ranks, "entropy": rounded(entropy.run(full=False))}


def _row(effect: Effect, count: int) -> dict[str, Any]:
    variant = effect.variant
    return {
        "pictures": count, "setting": variant.setting, "change": variant.name, "difference": effect.difference,
        "error": effect.error, "pairs": effect.pairs, "rate": effect.rate, "step": effect.step, "rank": effect.rank,
        "low": effect.low, "high": effect.high, "growth": [list(at) for at in effect.growth], "at_side": effect.at_side,
    }  # fmt: skip


def defaults() -> dict[str, Any]:
    """What the node has where nothing is changed, in the words of the table."""
    from benchmarks.models import pack

    settings = pack("lora2.config").TrainingConfig()
    words = {
        "gain of Λ": "√(D / Σ Λ²)", "first position": "0", "what a cut goes by": "energy × sensitivity",
        "positions after a cut": "mixed",
        "moments at a cut": "dropped", "weight_decay": "24 / pictures",
        "learning rate before the last cut": "× √(target / size)", "Λ in the second phase": "folded",
        "initial_rank": "4 × the target",
    }  # fmt: skip
    names = ("init", "settle_at", "settle_cuts", "min_rank", "rank_hold", "rank_learning_rate", "q", "rank_weight")
    return {**words, **{name: getattr(settings, name) for name in names}}


def verdict(row: Mapping[str, Any]) -> str:
    """What a row says of the default."""
    if row["difference"] > SURE * row["error"]:
        return "default better"
    if row["difference"] < -SURE * row["error"]:
        return "change better"
    return "no difference seen"


def ours(results: Results, count: int) -> list[dict[str, Any]]:
    """Rows of changes of ours."""
    rows = chosen(results["rows"], pictures=count)
    return [
        row
        for row in rows
        if not row["setting"].startswith(("paper's form", "fixed rank")) and row["setting"] != "as it is"
    ]


def fixed_ranks(results: Results) -> list[dict[str, Any]]:
    """Rows of a fixed rank."""
    return [row for row in results["rows"] if row["setting"].startswith("fixed rank")]


def papers(results: Results) -> list[dict[str, Any]]:
    """Rows of the paper's form."""
    return [row for row in results["rows"] if row["setting"].startswith("paper's form")]


def long_run(results: Results, change: str) -> dict[str, Any]:
    """One of the paper's longer runs."""
    return next(row for row in results["rows"] if row["setting"] == SETTING_OF_LONG and row["change"] == change)


def surely_better(row: Mapping[str, Any]) -> float:
    """By what share of the loss a change is better at least: SURE standard errors above its mean."""
    return float(-row["difference"] - SURE * row["error"])


def claims(results: Results) -> list[Claim]:
    """No change is surely better than the default; without a pull ranks run away."""
    if results["about"]["size"] == "reduced":
        free, held = results["ranks"]
        words = "paper's form: mean rank with nothing that pulls, over that with a strong pull"
        return [Claim(words, free / held, 2.0, above=True), *entropy.claims(results["entropy"])]
    found = []
    for count in COUNTS:
        best = max(surely_better(row) for row in ours(results, count))
        found.append(Claim(f"{count} pictures: how much of the loss any change is surely better by", best, SMALL))
    free, held, loose = (long_run(results, change) for change in (FREE, HELD, LOOSE))
    words = f"paper's form, {LONG} steps"
    return [
        *found,
        Claim(
            f"{words}: mean rank with nothing that pulls, nor weight decay, over its start",
            _grown(loose),
            1.3,
            above=True,
        ),
        Claim(
            f"{words}: mean rank with nothing that pulls, over that with {HELD}",
            _grown(free) / _grown(held),
            2.0,
            above=True,
        ),
        *entropy.claims(results["entropy"]),
    ]


START = 32
"""The rank that the paper's form starts from at a target of 8."""


def _grown(row: Mapping[str, Any]) -> float:
    return float(row["growth"][-1][1] / START)


def summary(results: Results) -> Results:
    """How many changes are surely worse, surely better, neither."""
    told: Results = {}
    for count in COUNTS:
        said = [verdict(row) for row in ours(results, count)]
        told[f"pictures_{count}"] = {
            "changes": len(said),
            "default_better": said.count("default better"),
            "change_better": said.count("change better"),
        }
    told["runaway"] = {
        "start": START,
        **{
            change or "as it is": long_run(results, change)["growth"][-1][1]
            for change in ("as it is", FREE, HELD, LOOSE)
        },
    }
    return told


if __name__ == "__main__":
    from benchmarks.evidence import ablations

    raise SystemExit(main(ablations))

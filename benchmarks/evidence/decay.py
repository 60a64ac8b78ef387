"""Weight decay against the number of pictures: none, what the default chooses, a quarter and four times of that.

All on the subjects that settings are tuned on, ours with the target that the other settings are tried at, every decay at the
best of four learning rates. `python -m benchmarks.evidence.decay` computes it from docs/evidence/records.jsonl.gz; gpu.py makes
those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.evidence import reduced
from benchmarks.evidence.ablations import SMALL, surely_better
from benchmarks.evidence.comparison import RATES, best, job, mark_at, tuning_names
from benchmarks.evidence.effects import Runs, best_runs, compared, standard_error
from benchmarks.evidence.experiment import Claim, Results, chosen, main, mean, table
from benchmarks.evidence.measuring import rounded
from benchmarks.evidence.personal import SETTLING, Job
from benchmarks.evidence.pool import Record
from benchmarks.evidence.variants import RANK, SEEDS
from benchmarks.models import pack

KEY, FILE = "decay", "decay.json"

PICTURES = (2, 5, 12)
SHARES = (0.0, 0.25, 1.0, 4.0)
"""Of the decay that is chosen."""
TRIED = RATES[8:15:2]
"""Learning rates: 1e-3 to 3e-2 by half powers of ten."""
NOT_KEPT = 2
"""Pictures with which as much is forgotten as without."""
MOST = 5.0
"""Of the reduced run."""


@cache
def decay_of(count: int, share: float) -> float:
    """A share of the decay that the default has for so many pictures."""
    return round(share * float(pack("lora2.config").TrainingConfig().resolved_for(count).weight_decay), 6)


def jobs_of(count: int, share: float, rate: float) -> list[Job]:
    """Runs with a decay at a learning rate, over subjects and seeds."""
    changes = (("weight_decay", decay_of(count, share)),)
    return [job((SETTLING, RANK, count), name, rate, seed, changes) for name in tuning_names() for seed in SEEDS]


def jobs() -> Iterator[Job]:
    """Everything."""
    for count in PICTURES:
        for share in SHARES:
            for rate in TRIED:
                yield from jobs_of(count, share, rate)


def run(full: bool) -> Results:
    """From the records of the full run; or one short run with no decay and one with a strong one."""
    if not full:
        return _reduced()
    from benchmarks.evidence import records

    about, kept, _ = records.full()
    rows = []
    for count in PICTURES:
        base = _best(kept, count, 1.0)
        for share in SHARES:
            rows.append(_row(count, share, _best(kept, count, share), base))
    rates = [row for count in PICTURES for share in (0.0, 1.0) for row in _by_rate(kept, count, share)]
    return {
        "about": about,
        "subjects": tuning_names(),
        "seeds": list(SEEDS),
        "rows": rounded(rows),
        "rates": rounded(rates),
    }


def _by_rate(kept: Mapping[str, Record], count: int, share: float) -> list[dict[str, Any]]:
    """At every learning rate the loss at its best step, over that of the best rate."""
    losses = {}
    for rate in TRIED:
        choice = best((SETTLING, RANK, count), [(rate, kept[one.key]) for one in jobs_of(count, share, rate)])
        losses[rate] = math.nan if choice is None else choice.loss
    least = min(losses.values())
    return [
        {"pictures": count, "share": share, "rate": rate, "over_best": loss / least - 1}
        for rate, loss in losses.items()
    ]


def _best(kept: Mapping[str, Record], count: int, share: float) -> Runs:
    """The best of the learning rates and steps, and the runs there."""
    found = best_runs(
        kept, (SETTLING, RANK, count), [(rate, one) for rate in TRIED for one in jobs_of(count, share, rate)]
    )
    assert found is not None
    return found


def _row(count: int, share: float, own: Runs, base: Runs) -> dict[str, Any]:
    (choice, runs), changes = own, compared(own, base)
    return {
        "pictures": count, "share": share, "decay": decay_of(count, share), "rate": choice.rate, "step": choice.step,
        "difference": mean(changes), "error": standard_error(changes),
        "drift": mean(mark_at(run, choice.step)["drift"] / run["before"]["drift"] for run in runs.values()),
    }  # fmt: skip


def _reduced() -> Results:
    config = (SETTLING, reduced.RANK, reduced.PICTURES)
    name, decays = reduced.SUBJECTS[0], (0.0, MOST)
    jobs = [reduced.job(config, name, cuts=False, changes=(("weight_decay", decay),)) for decay in decays]
    done = reduced.records(jobs)
    return {"drifts": [done[one.key]["marks"][-1]["drift"] / done[one.key]["before"]["drift"] for one in jobs]}


def claims(results: Results) -> list[Claim]:
    """The default is near the best for every number of pictures, and with it less is forgotten."""
    if results["about"]["size"] == "reduced":
        none, strong = results["drifts"]
        words = f"loss on other pictures after training with a weight decay of {MOST:g}, over that with none"
        return [Claim(words, strong / none, 1.0)]
    made = []
    for count in PICTURES:
        others = [row for row in chosen(results["rows"], pictures=count) if row["share"] != 1]
        most = max(surely_better(row) for row in others)
        made.append(
            Claim(f"{count} pictures: how much of the loss another weight decay is surely better by", most, SMALL)
        )
    for count in PICTURES:
        kept = _of(results, count, 1.0)["drift"] / _of(results, count, 0.0)["drift"]
        words = f"{count} pictures, the chosen weight decay: loss on the world's other pictures over that with none"
        made.append(Claim(words, kept, 1.0, open=count == NOT_KEPT))
    return made


def _of(results: Results, count: int, share: float) -> dict[str, Any]:
    [row] = chosen(results["rows"], pictures=count, share=share)
    return dict(row)


def summary(results: Results) -> Results:
    """By the number of pictures: what is chosen, what no decay costs, and what both forget."""
    told: Results = {}
    for count in PICTURES:
        own, none = _of(results, count, 1.0), _of(results, count, 0.0)
        told[f"pictures_{count}"] = {
            "weight_decay": own["decay"], "none": [round(none["difference"], 4), round(none["error"], 4)],
            "drift": round(own["drift"], 3), "drift_without": round(none["drift"], 3),
        }  # fmt: skip
    return told


def page(results: Results, folder: Path) -> str:
    """A table."""
    rows = []
    for count in PICTURES:
        own = [_of(results, count, share) for share in SHARES]
        losses = [
            "" if row["share"] == 1 else f"{100 * row['difference']:+.1f} ± {100 * row['error']:.1f} %" for row in own
        ]
        rows.append([
            count, f"{_of(results, count, 1.0)['decay']:g}", *(loss for loss in losses if loss),
            *(f"{_of(results, count, share)['drift']:.2f}" for share in (0.0, 1.0)),
        ])  # fmt: skip
    head = ["pictures", "weight decay", "none", *(f"{share:g} times" for share in SHARES if share not in (0, 1))]
    return "\n\n".join([
        "## Weight decay and the number of pictures",
        "AdamW's weight decay pulls the factors toward zero, as a prior does that expects small changes; against the mean loss "
        "over n pictures a prior weighs 1 / n. So the default is 24 over the number of pictures, at most 5. Loss of ours with "
        f"none, with a quarter and with four times that, over the default's, target {RANK}, {len(results['subjects'])} tuning "
        f"subjects, {len(results['seeds'])} seeds, each at the best of {len(TRIED)} learning rates ({TRIED[0]:.0e} to "
        f"{TRIED[-1]:.0e}) and of the steps to stop at; *forgets*: loss on the world's other pictures over the base's. "
        "All that is compared on this page has this decay, fixed ranks too; what rank 4 gains by it is in the section before.",
        table([*head, "forgets, without", "forgets, with the default"], rows),
        "What four shares can show is that the best lies within a factor of four of the default with 5 and with 12 pictures; a "
        "constant of 2 or 3 would do about as well there. **Learning rates that are too high** do less harm with it, those "
        "that are too low more. Loss at every rate over that at the best one:",
        table(["pictures", "weight decay", *(f"{rate:.0e}" for rate in TRIED)], _rates(results)),
    ])  # fmt: skip


def _rates(results: Results) -> list[list[object]]:
    rows: list[list[object]] = []
    for count in PICTURES:
        for share in (0.0, 1.0):
            own = chosen(results["rates"], pictures=count, share=share)
            rows.append([count, f"{decay_of(count, share):g}", *(f"{100 * row['over_best']:+.1f} %" for row in own)])
    return rows


if __name__ == "__main__":
    from benchmarks.evidence import decay

    raise SystemExit(main(decay))

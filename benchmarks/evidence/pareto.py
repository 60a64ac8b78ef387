"""Held-out loss against bytes on ten subjects: ours beside fixed ranks, a large rank cut afterwards, and the paper's form.

`python -m benchmarks.evidence.pareto` computes it from docs/evidence/records.jsonl.gz; gpu.py makes those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.evidence import longer, reduced
from benchmarks.evidence.comparison import (
    COUNTS,
    LARGE,
    RESIZED,
    SEEDS,
    STEPS,
    Choice,
    Config,
    Tuned,
    beyond,
    configs,
    tuning_names,
)
from benchmarks.evidence.equal_bytes import (
    METHODS,
    Pair,
    Point,
    Points,
    beaten,
    pair_error,
    pairs,
    point,
    points,
    same_target,
    surely_better,
    surely_worse,
    tally,
)
from benchmarks.evidence.experiment import Claim, Results, main, mean
from benchmarks.evidence.measuring import rounded
from benchmarks.evidence.personal import FIXED, SETTLING

KEY, FILE = "pareto", "pareto.json"

NEEDED = {FIXED: 9, RESIZED: 8}
"""On so many of the ten subjects ours must be better or equal at every size."""
SLACK = 0.02
"""Of the reduced run: half as many steps, one seed, two subjects and no tuning tell losses apart to about this share."""


def run(full: bool) -> Results:
    """From the records of the full run; or a few short adaptations."""
    if not full:
        return _reduced()
    from benchmarks.evidence import records
    from dev.painter.subjects import SUBJECTS

    about, kept, tuned = records.full()
    found = points(kept, tuned, [subject.name for subject in SUBJECTS], SEEDS)
    large = {f"{count}": beyond((FIXED, LARGE, count), tuned, kept, tuning_names()) for count in COUNTS}
    return {
        "about": about, "steps": STEPS, "seeds": list(SEEDS), "tuned": _rows(tuned), "points": _point_rows(found),
        "beyond": rounded(large), "longer": rounded(longer.rows(kept, tuned)),
    }  # fmt: skip


def _reduced() -> Results:
    uncut: list[Config] = [(SETTLING, reduced.RANK, reduced.PICTURES), (FIXED, reduced.RANK, reduced.PICTURES)]
    cut: Config = (RESIZED, reduced.RANK, reduced.PICTURES)
    wanted = [(name, config) for name in reduced.SUBJECTS for config in uncut] + [(reduced.SUBJECTS[1], cut)]
    jobs = {(name, config): reduced.job(config, name) for name, config in wanted}
    done = reduced.records(list(jobs.values()))
    found: dict[tuple[str, Config], Point] = {}
    for (name, config), job in jobs.items():
        if at := point(config, reduced.STEPS, [done[job.key]]):
            found[name, config] = at
    tuned = {config: reduced.choice(config) for config in (*uncut, cut)}
    return {"steps": reduced.STEPS, "seeds": [0], "tuned": _rows(tuned), "points": _point_rows(found)}


def _rows(tuned: Tuned) -> list[dict[str, Any]]:
    return [
        {"method": method, "rank": rank, "pictures": count, **rounded(asdict(choice)), "inside": choice.inside}
        for (method, rank, count), choice in tuned.items()
    ]


def _point_rows(found: Points) -> list[dict[str, Any]]:
    return [
        {"subject": subject, "method": config[0], "rank": config[1], "pictures": config[2], **rounded(asdict(at))}
        for (subject, config), at in found.items()
    ]


def points_of(results: Results) -> dict[tuple[str, Config], Point]:
    """What `run` found, by subject and config."""
    found = {}
    for row in results["points"]:
        values = {name: row[name] for name in Point.__dataclass_fields__}
        found[row["subject"], (row["method"], row["rank"], row["pictures"])] = Point(**values)
    return found


def choices_of(results: Results) -> dict[Config, Choice]:
    """What tuning chose, by config."""
    return {
        (row["method"], row["rank"], row["pictures"]): Choice(
            row["rate"], row["step"], row["loss"], tuple(row["tried"])
        )
        for row in results["tuned"]
    }


def claims(results: Results) -> list[Claim]:
    """Better than or equal to every fixed rank, and to what a large rank is cut to, on most subjects."""
    found = points_of(results)
    if results["about"]["size"] == "reduced":
        return _reduced_claims(found)
    made = [
        Claim(
            f"{count} pictures, equal bytes: subjects on which ours is better than or equal to {_every(method)}",
            wins(found, method, [count]), needed, above=True, open=count == COUNTS[1],
        )
        for count in COUNTS
        for method, needed in NEEDED.items()
    ]  # fmt: skip
    made += [
        Claim(f"{count} pictures, equal bytes: ours over the fixed rank, loss, mean of all pairs", of, 1.0)
        for count, of in ((count, 1 + _mean(found, count)) for count in COUNTS)
    ]
    wanted = len(configs()) * len({subject for subject, _ in found})
    chosen = choices_of(results)
    edge = sum(not choice.inside for choice in chosen.values())
    last = sum(choice.step == results["steps"] for choice in chosen.values())
    return [
        *made,
        Claim("pairs of subject and method without a result", wanted - len(found), 0),
        Claim("tuning: learning rates that lie at the edge of what was tried", edge, 0),
        Claim(f"tuning: of {len(chosen)} stopping points, those at the last step that was tried", last, 0, open=True),
    ]


def _mean(found: Points, count: int) -> float:
    return mean(pair.difference for pair in pairs(found, FIXED, count))


def _every(method: str) -> str:
    return "every fixed rank" if method == FIXED else "rank 64 resized to every size"


def _reduced_claims(found: Points) -> list[Claim]:
    count = reduced.PICTURES
    fixed, cut = pairs(found, FIXED, count), pairs(found, RESIZED, count)
    gone = mean(p.ours.loss / p.ours.before for p in fixed)
    size = max(p.ours.parameters / p.other.parameters for p in fixed)
    return [
        Claim("ours: held-out loss after, as a share of before", gone, 0.85),
        Claim(
            "equal bytes: ours over a fixed rank, held-out loss, mean", 1 + mean(p.difference for p in fixed), 1 + SLACK
        ),
        Claim(
            "equal bytes: ours over a large rank resized, held-out loss", 1 + mean(p.difference for p in cut), 1 + SLACK
        ),
        Claim("equal bytes: parameters of ours over the fixed rank's", size, 1.0),
    ]


def wins(found: Points, method: str, counts: Sequence[int]) -> int:
    """Subjects on which ours is better or equal at every size, with each of these numbers of pictures."""
    each = [{name for name, good in beaten(pairs(found, method, count)).items() if good} for count in counts]
    return len(set.intersection(*each))


def summary(results: Results) -> Results:
    """With 24 pictures; beside it with 5, with both, and against the other methods."""
    found = points_of(results)
    told: Results = {
        "subjects": len({subject for subject, _ in found}),
        "beats_fixed": wins(found, FIXED, COUNTS[:1]),
        "beats_resize": wins(found, RESIZED, COUNTS[:1]),
        "seeds": len(results["seeds"]),
    }
    for count in COUNTS:
        of = {}
        for method in METHODS:
            of[method] = _tallied(pairs(found, method, count))
        against = pairs(found, FIXED, count)
        told[f"pictures_{count}"] = {
            "pairs": len(against),
            "pairs_better": sum(pair.better for pair in against),
            "mean_difference": round(_mean(found, count), 4),
            "error_of_a_pair": round(pair_error(against), 4),
            "surely_better": len(surely_better(against)),
            "surely_worse": len(surely_worse(against)),
            **of,
            "same_target": {method: _tallied(same_target(found, method, count)) for method in (FIXED, RESIZED)},
        }
    told["both"] = {"beats_fixed": wins(found, FIXED, COUNTS), "beats_resize": wins(found, RESIZED, COUNTS)}
    return told


def _tallied(compared: Sequence[Pair]) -> Results:
    told = tally(compared)
    return {"subjects_beaten": told["beaten"], **{k: round(told[k], 4) for k in ("share", "difference", "worst")}}


if __name__ == "__main__":
    from benchmarks.evidence import pareto

    raise SystemExit(main(pareto))

"""The full run of all experiments on subjects, in stages, going on with what RECORDS holds:

    python -m benchmarks.evidence.gpu RECORDS --processes 15 --seconds 540 --stage tune ablate
    python -m benchmarks.evidence.gpu RECORDS --processes 15 --seconds 540 --stage report

tune: learning rates and stopping points, on the tuning subjects. graded: subjects that differ in the number of parts alone.
keep: a target that is only the most. report: the ten subjects that are reported, a first seed of everything and then the others.
ablate: one change at a time, on the tuning subjects. decay: weight decay by the number of pictures. longer: twice the steps.
What time does not allow is left for a later call. Exit code 1 where anything is missing or has failed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.evidence import comparison, complexity, decay, effects, equal_bytes, keeping, longer, variants
from benchmarks.evidence.comparison import Config, Tuned
from benchmarks.evidence.experiment import plain_table
from benchmarks.evidence.pool import LONGEST, Pool
from dev.painter.subjects import SUBJECTS

STAGES = ("tune", "graded", "keep", "report", "ablate", "decay", "longer")


def tuned_table(tuned: Tuned) -> str:
    """What was chosen."""
    rows = [("method", "rank", "pictures", "rate", "step", "loss", "tried", "")]
    for (method, rank, count), choice in tuned.items():
        tried = " ".join(f"{rate:.1e}" for rate in choice.tried)
        edge = "" if choice.inside else "at the edge"
        rows.append(
            (method, f"{rank}", f"{count}", f"{choice.rate:.1e}", f"{choice.step}", f"{choice.loss:.5f}", tried, edge)
        )
    return plain_table(rows)


def effects_table(found: Sequence[effects.Effect]) -> str:
    """What changes do, in % of the loss."""
    rows = [("setting", "change", "loss %", "±", "rate", "step", "mean rank", "of a layer", "")]
    for e in found:
        side = "best at the side" if e.at_side else ""
        rows.append((
            e.variant.setting, e.variant.name, f"{100 * e.difference:+.2f}", f"{100 * e.error:.2f}", f"{e.rate:.1e}", f"{e.step}",
            f"{e.rank:.1f}", f"{e.low}-{e.high}", side,
        ))  # fmt: skip
    return plain_table(rows)


def wins_table(found: equal_bytes.Points, counts: Sequence[int] = comparison.COUNTS) -> str:
    """Ours against the others, subject by subject: in how many sizes of how many it is better, and by how much of the loss."""
    rows = [("pictures", "against", *(s.name.split()[1] for s in SUBJECTS), "beaten", "pairs", "mean %", "worst %")]
    for count in counts:
        for method, words in equal_bytes.METHODS.items():
            compared = equal_bytes.pairs(found, method, count)
            cells = []
            for subject in SUBJECTS:
                own = [p for p in compared if p.subject == subject.name]
                cells.append(f"{sum(p.better for p in own)}/{len(own)}")
            t = equal_bytes.tally(compared)
            rows.append((
                f"{count}", words, *cells, f"{t['beaten']}/{t['subjects']}", f"{t['share']:.2f}",
                f"{100 * t['difference']:+.2f}", f"{100 * t['worst']:+.2f}",
            ))  # fmt: skip
    return plain_table(rows)


def differences_table(found: equal_bytes.Points, count: int) -> str:
    """Ours against fixed ranks, in % of the loss: subjects by ranks."""
    compared = {(p.subject, p.rank): p for p in equal_bytes.pairs(found, comparison.FIXED, count)}
    rows = [(f"{count} pictures", *(f"rank {rank}" for rank in comparison.FIXED_RANKS))]
    for subject in SUBJECTS:
        pairs = [compared.get((subject.name, rank)) for rank in comparison.FIXED_RANKS]
        rows.append((subject.name, *(f"{100 * p.difference:+.2f}" if p else "" for p in pairs)))
    return plain_table(rows)


def missing(pool: Pool, tuned: Tuned, wanted: Sequence[Config], stages: Sequence[str]) -> int:
    """How much of the stages is not there."""
    jobs = list(variants.jobs(tuned)) if "ablate" in stages else []
    jobs += list(comparison.reported(tuned)) if "report" in stages else []
    jobs += list(complexity.jobs(tuned)) if "graded" in stages else []
    jobs += list(keeping.jobs(tuned)) if "keep" in stages else []
    jobs += list(decay.jobs()) if "decay" in stages else []
    jobs += list(longer.jobs(tuned)) if "longer" in stages else []
    return len({j.key for j in jobs} - set(pool.records)) + len(set(wanted) - set(tuned))


def main() -> int:
    """Run as far as time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="which of them")
    parser.add_argument(
        "--counts", nargs="+", type=int, default=list(comparison.COUNTS), choices=comparison.COUNTS, metavar="N"
    )
    parser.add_argument("--types-of-gpu", action="store_true", help="on a CPU, load models as a GPU would")
    options = parser.parse_args()
    longest = LONGEST if torch.cuda.is_available() else math.inf
    pool = Pool(options.records, options.processes, options.seconds, longest, types_of_gpu=options.types_of_gpu)

    def say(words: str) -> None:
        print(f"\n{time.monotonic() - pool.start:.0f} s, {len(pool.records)} records: {words}", flush=True)

    wanted = comparison.configs(options.counts)
    try:
        tuned = comparison.tune(pool, wanted, comparison.tuning_names())
        say(f"tuned {len(tuned)} of {len(wanted)}\n{tuned_table(tuned)}")
        if "graded" in options.stage:
            pool.run(complexity.jobs(tuned))
            say(f"mean rank by parts: {complexity.by_parts(pool.records, tuned)}")
        if "keep" in options.stage:
            pool.run(keeping.jobs(tuned, options.counts))
            say("a target that is only the most is done")
        for seeds in (comparison.SEEDS[:1], comparison.SEEDS) if "report" in options.stage else ():
            pool.run(comparison.reported(tuned, seeds))
            found = equal_bytes.points(pool.records, tuned, [s.name for s in SUBJECTS], seeds)
            say(f"seeds {seeds}: ours at equal bytes, better or equal\n{wins_table(found, options.counts)}")
            for count in options.counts:
                print(differences_table(found, count), flush=True)
        if "ablate" in options.stage:
            pool.run(variants.jobs(tuned, options.counts))
            for count in options.counts:
                say(
                    f"changes of the method, {count} pictures\n{effects_table(effects.effects(pool.records, tuned, count))}"
                )
        if "decay" in options.stage:
            pool.run(decay.jobs())
            say("weight decay by the number of pictures is done")
        if "longer" in options.stage:
            pool.run(longer.jobs(tuned))
            say(f"twice the steps: {longer.rows(pool.records, tuned)}")
        left = missing(pool, tuned, wanted, options.stage)
        say(f"{left} missing, {len(pool.failed)} failed")
    finally:
        pool.close()
    return 1 if left or pool.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

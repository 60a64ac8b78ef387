"""The full run of all experiments on subjects: `python -m benchmarks.evidence.gpu RECORDS --processes 12 --seconds 400`.

Goes on with what RECORDS holds. Tuning comes first, then a first seed of everything, the ablations, the other seeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.evidence import comparison, variants
from benchmarks.evidence.pool import Pool


def main() -> None:
    """Run as far as time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--tuning", nargs="+", default=comparison.tuning_names(), metavar="SUBJECT", help="to tune on")
    options = parser.parse_args()
    start = time.monotonic()
    pool = Pool(options.records, options.processes, options.seconds)

    def say(words: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {len(pool.records)} records  {words}", flush=True)

    try:
        tuned = comparison.tune(pool, comparison.configs(), options.tuning)
        say("tuned" if tuned else "not all tuned")
        for config, choice in tuned.items():
            print("   ", config, f"rate {choice[0]:.1e}, step {choice[1]}", flush=True)
        pool.run(comparison.reported(tuned, comparison.SEEDS[:1]))
        say("first seed")
        pool.run(variants.jobs(tuned))
        say("ablations")
        pool.run(comparison.reported(tuned, comparison.SEEDS))
        say("all seeds")
    finally:
        pool.close()


if __name__ == "__main__":
    main()

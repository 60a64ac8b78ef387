"""How exact going on is on this machine's device: `python -m dev.halves`.

Trains the small Flux whole, whole again, and in two halves, in both number types and both forms, and prints how far the adapters
lie apart: 0 where they are the same bit for bit. A device whose kernels add in no fixed order differs between two whole runs too.
With --out, into halves.json there as well, after each form.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from dev import host
from dev.kills import Direct, tensors_of

STEPS = 60
FORMS: dict[str, dict[str, Any]] = {
    "settling, fp32": {"precision": "fp32"},
    "settling, bf16": {"precision": "bf16"},
    "pure, fp32": {"precision": "fp32", "settle_at": 1.0},
    "pure, bf16": {"precision": "bf16", "settle_at": 1.0},
}


class _Half(Exception):
    """Half of the steps are done."""


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any number, as a share of the largest number of its tensor; infinite for other shapes."""
    if one.keys() != other.keys() or any(one[k].shape != other[k].shape for k in one):
        return float("inf")
    return max(float((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-30)) for k in one)


def measure(direct: Direct, name: str, **changes: Any) -> dict[str, float]:
    """Distances of a second whole run, and of one in two halves, from a whole run."""

    def run(save_name: str, continue_from: str = "nothing", stop: int = 0) -> dict[str, Any]:
        def report(step: int) -> None:
            if stop and step == stop:  # a GPU runs ahead: at first no step is known to be done
                raise _Half

        return tensors_of(direct.train(save_name, 1, continue_from, report, **changes))

    whole, again = run(f"{name}/whole"), run(f"{name}/again")
    with contextlib.suppress(_Half):
        run(f"{name}/halves", stop=STEPS // 2 + 1)
    halves = run(f"{name}/halves", "newest state")
    return {"two whole runs": apart(whole, again), "whole and in halves": apart(whole, halves)}


def main() -> None:
    """Prints the distances of every form as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for halves.json")
    out = parser.parse_args().out
    host.import_comfy()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        direct = Direct(Path(folder))
        for number, (form, changes) in enumerate(FORMS.items()):
            found[form] = measure(direct, str(number), steps=STEPS, **changes)
            print(json.dumps({form: found[form]}), flush=True)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                (out / "halves.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

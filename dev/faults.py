"""Show that the tests bite: plant known faults in a copy of the pack, one at a time; a test must catch each.

`make faults` plants all of dev/planted.py; `make faults ARGS="--only hook fsync"` those whose name or file contains one of
these words. What caught each is recorded in docs/faults.json. With --check-clean, the same tests run first without the fault,
and must pass. Exits with 1 if a fault survives, if its old text is not found exactly once, or if the tests fail without it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from dev.host import HOST, ROOT, VENV
from dev.planted import FAULTS, Fault

RECORD = ROOT / "docs" / "faults.json"
MAX_SECONDS = 600
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)


class Unproven(Exception):
    """The fault survived, or could not be planted; or tests failed without a fault."""


def copy_to(folder: Path) -> Path:
    """The working tree without ignored files; what set-up has built is shared."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for built in (HOST, VENV):
        (folder / built.name).symlink_to(built.resolve(), target_is_directory=True)
    return folder


def first_failure(folder: Path, tests: Sequence[str]) -> str | None:
    """The id of the first test that fails; None where all pass. Raises Unproven where the tests do not run."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=MAX_SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unproven(f"the tests took more than {MAX_SECONDS} s") from None
    failed = FAILED.search(done.stdout)
    if done.returncode == 0:
        return None
    if done.returncode != 1 or failed is None:
        raise Unproven(f"the tests did not run (exit status {done.returncode}): {done.stdout[-500:]}")
    return failed[1]


def catch(fault: Fault, folder: Path) -> str:
    """The id of the test that catches a fault in this copy. Raises Unproven."""
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise Unproven(f"its old text occurs {text.count(fault.old)} times in {fault.file}: describe the fault anew")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        caught = first_failure(folder, shlex.split(fault.tests))
    finally:
        path.write_text(text, encoding="utf-8")
    if caught is None:
        raise Unproven(f"survives {fault.tests}")
    return caught


def plant(faults: Sequence[Fault], workers: int, folder: Path, check_clean: bool) -> list[dict[str, object]]:
    """Plant the faults with so many processes, each in its own copy; what caught each, None for a fault that survived."""
    copies: SimpleQueue[Path] = SimpleQueue()
    for number in range(workers):
        copies.put(copy_to(folder / str(number)))

    def work(fault: Fault) -> dict[str, object]:
        copy, start, caught, verdict = copies.get(), time.monotonic(), None, ""
        try:
            if check_clean and (failed := first_failure(copy, shlex.split(fault.tests))):
                raise Unproven(f"{failed} fails without it")
            start = time.monotonic()
            caught = catch(fault, copy)
            verdict = f"caught by {caught}"
        except Unproven as error:
            verdict = f"NOT CAUGHT: {error}"
        finally:
            copies.put(copy)
        seconds = round(time.monotonic() - start, 1)
        print(f"{fault.name} ({fault.file}): {verdict} ({seconds} s)", flush=True)
        return {"name": fault.name, "file": fault.file, "caught_by": caught, "seconds": seconds}

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, faults))


def record(found: Sequence[dict[str, object]]) -> None:
    """Write docs/faults.json in the order of the table: what was found now, and what is known of the other faults."""
    known = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
    entries = {entry["name"]: entry for entry in [*known, *found]}
    lines = [json.dumps(entries[f.name], ensure_ascii=False) for f in FAULTS if f.name in entries]
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> None:
    """Plant, report, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults whose name or file contains one of these")
    parser.add_argument("--check-clean", action="store_true", help="run the tests without each fault, too")
    parser.add_argument("-j", type=int, default=2, metavar="N", help="processes, each with its own copy (2)")
    given = parser.parse_args()
    chosen = [f for f in FAULTS if not given.only or any(word in f.name or word in f.file for word in given.only)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lora2-faults-") as folder:
        found = plant(chosen, given.j, Path(folder), given.check_clean)
    record(found)
    survivors = [str(entry["name"]) for entry in found if entry["caught_by"] is None]
    rooms = Counter(fault.room for fault in chosen)
    print(f"{len(found) - len(survivors)} of {len(found)} faults caught in {time.monotonic() - start:.0f} s")
    print(", ".join(f"{room} {count}" for room, count in sorted(rooms.items())))
    if survivors or not found:
        raise SystemExit(f"Not caught: {'; '.join(survivors) or 'there is no such fault'}")


if __name__ == "__main__":
    main()

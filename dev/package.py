"""The registry's package: which files users get. `python -m dev.package` checks them, and zips and lists them in dist/.

The files are those that `comfy node publish` packs: all that git knows, less those that .comfyignore names.
"""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pathspec
import tomllib

ROOT = Path(__file__).resolve().parent.parent

WANTED = (
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "lora2/*.py",
    "lora2/*/*.py",
    "nodes/*.py",
    "nodes/comfy/*.py",
    "nodes/runs/*.py",
    "web/docs/*.md",
    "locales/*/nodeDefs.json",
    "workflows/*.json",
    "workflows/*.jpg",
)
"""Every file of the package matches one of these, and each of these matches a file."""

MAX_FILE, MAX_PACKAGE = 500_000, 3_000_000
"""Bytes."""


@cache
def files() -> list[str]:
    """Paths of the package's files, relative to the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", (ROOT / ".comfyignore").read_text().splitlines())
    return sorted(f for f in known if not ignored.match_file(f) and (ROOT / f).is_file())


def faults(names: Sequence[str]) -> list[str]:
    """What is wrong with a package of these files; empty when nothing is."""

    def matches(name: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")

    found = [f"{name} is not for users" for name in names if not any(matches(name, p) for p in WANTED)]
    found += [f"no file matches {p}" for p in WANTED if not any(matches(name, p) for name in names)]
    sizes = {name: (ROOT / name).stat().st_size for name in names}
    found += [f"{name} has {size} bytes, at most {MAX_FILE}" for name, size in sizes.items() if size > MAX_FILE]
    if sum(sizes.values()) > MAX_PACKAGE:
        found.append(f"the package has {sum(sizes.values())} bytes, at most {MAX_PACKAGE}")
    return found


def build(folder: Path) -> Path:
    """Zip the package's files into a folder; returns the archive."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{project['name']}-{project['version']}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files():
            archive.write(ROOT / name, name)
    return path


def main() -> int:
    """Check, build, list."""
    if wrong := faults(files()):
        print("\n".join(wrong))
        return 1
    path = build(ROOT / "dist")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            print(f"{entry.file_size:>8}  {entry.filename}")
    print(f"{len(files())} files, {path.stat().st_size / 1e3:.0f} KB: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Imports show the architecture: rooms of lora2 import downward only, and no module anywhere imports itself in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ["training", "report", "checkpoints", "files", "adapters", "method", "config", "util"]
"""From the top down."""

PACKAGES = ("lora2", "nodes", "dev", "benchmarks", "tests")


def modules() -> dict[str, Path]:
    """Every module of the repository by its dotted name."""
    paths = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


@cache
def imports(name: str, path: Path) -> tuple[str, ...]:
    """Dotted names that a module imports, those of functions included, with relative ones made absolute."""
    return tuple(_imports(name, path))


def _imports(name: str, path: Path) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield base
                yield f"{base}.{alias.name}"


@cache
def arrows() -> dict[str, set[str]]:
    """Each module with those of the repository that it imports."""
    known = modules()
    return {name: {n for n in imports(name, path) if n in known and n != name} for name, path in known.items()}


def room(name: str) -> str:
    """The room that a module of lora2 lies in."""
    return name.split(".")[1] if name.startswith("lora2.") else ""


def test_imports_between_rooms_run_downward() -> None:
    found = arrows()
    assert {room(name) for name in found if name.startswith("lora2.")} == set(ROOMS)
    upward = [
        f"{name} imports {other}"
        for name, others in found.items()
        for other in others
        if room(name) and room(other) and ROOMS.index(room(other)) < ROOMS.index(room(name))
    ]
    assert not upward


def test_the_library_knows_no_host_and_the_bridge_no_node() -> None:
    for name, path in modules().items():
        foreign = {n.split(".")[0] for n in imports(name, path)}
        if name.startswith("lora2"):
            assert not foreign & {"comfy", "comfy_api", "folder_paths", "nodes", "server"}, name
    for name, others in arrows().items():
        if name.startswith(("nodes.comfy.", "nodes.runs.")):
            assert all(other.count(".") >= 2 or not other.startswith("nodes.") for other in others - {"nodes"}), name
        if name.startswith("nodes.comfy."):
            assert not any(other.startswith("nodes.runs") for other in others), name


def test_no_import_goes_in_a_circle() -> None:
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_an_upward_import_and_a_circle_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    upward = arrows() | {"lora2.util.text": {"lora2.training.trainer"}}
    monkeypatch.setitem(globals(), "arrows", lambda: upward)
    with pytest.raises(AssertionError, match=r"lora2\.util\.text imports"):
        test_imports_between_rooms_run_downward()
    with pytest.raises(pytest.fail.Exception):
        test_no_import_goes_in_a_circle()

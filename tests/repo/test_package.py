"""What reaches users: the files, what they import, and what the registry and ComfyUI-Manager read of them."""

from __future__ import annotations

import ast
import asyncio
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
from graph import imported
from scanner import MODULES, findings

from dev.host import ROOT, comfy_path
from dev.package import build, faults, files

TEMPLATES = ("Train Adaptive LoRA", "Load Adaptive LoRA", "Inspect Ranks")
LIBRARIES = {"torch", "numpy", "PIL", "safetensors"}
"""What the method may import beside Python's own."""

HOST = {"comfy", "comfy_api", "comfy_execution", "comfyui_version", "folder_paths", "server", "nodes"}
"""ComfyUI's modules; its `server` and `nodes` as absolute imports."""


def trees(under: str = "") -> Iterator[tuple[str, ast.Module]]:
    for name in files():
        if name.endswith(".py") and name.startswith(under):
            yield name, ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """The first part of every absolute import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_users_get_the_files_that_they_need_and_no_other() -> None:
    assert faults(files()) == []


def test_a_stray_file_and_a_missing_one_are_found() -> None:
    assert faults([*files(), "tests/conftest.py"]) == ["tests/conftest.py is not for users"]
    assert faults([name for name in files() if name != "LICENSE"]) == ["no file matches LICENSE"]


def test_the_archive_holds_those_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tmp_path)) as archive:
        assert archive.namelist() == files()


def test_every_template_has_its_picture() -> None:
    assert {f for f in files() if f.startswith("workflows/")} == {
        f"workflows/{name}.{ending}" for name in TEMPLATES for ending in ("json", "jpg")
    }


def test_shipped_code_runs_nothing_and_calls_nobody() -> None:
    """Stricter than the registry's scanner: what is not known to be harmless is refused (scanner.py)."""
    for name, tree in trees():
        assert list(findings(tree, LIBRARIES | HOST)) == [], name


EVIL = (
    "import subprocess", "import os\nos.system('x')", "import os as o\no.environ['A']", "from os import environ", "import sys",
    "import socket", "import urllib.request", "import requests", "import pickle", "from torch import load",
    "import torch\ntorch.load('x')",
    "import torch as t\nt.hub", "import importlib", "eval('1')", "f = exec", "__import__('os')", "getattr(__builtins__, 'eval')",
    "().__class__.__base__.__subclasses__()", "import os\ngetattr(os, 'sys' + 'tem')('x')", "import shutil\nshutil.os.environ",
    "import numpy as np\nnp.load('x', allow_pickle=True)", "import pathlib\npathlib.os.system", "(lambda: 0).__globals__['x']",
    "def f():\n    import ctypes", "try:\n    import pip\nexcept ImportError: pass", "x = 'http://evil.example/x'",
    "import asyncio", "from concurrent.futures import ProcessPoolExecutor", "import concurrent.futures as f\nf.process",
    "from logging import config", "import torch\nvars(torch)['load']", "getattr(x, '__globals__')",
    "import multiprocessing.shared_memory", "from concurrent.futures import ProcessPoolExecutor",
    "import concurrent.futures as f\nf.ProcessPoolExecutor",
)  # fmt: skip


@pytest.mark.parametrize("code", EVIL)
def test_the_scanner_finds_what_it_is_for(code: str) -> None:
    assert list(findings(ast.parse(code), LIBRARIES | HOST))


def packed(folder: Path) -> Path:
    """The shipped files alone, as the registry unpacks them."""
    for name in files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    return folder


def scanned(folder: Path) -> tuple[str, str]:
    """What bandit and ruff's security rules say of a folder, whatever its comments ask them to overlook; "" for nothing."""
    commands = (
        ["bandit", "--quiet", "--ignore-nosec", "--recursive", "--format", "txt", str(folder)],
        ["ruff", "check", "--quiet", "--isolated", "--ignore-noqa", "--no-cache", "--select", "S", str(folder)],
    )
    told = [subprocess.run([sys.executable, "-m", *c], capture_output=True, text=True, check=False) for c in commands]
    one, other = ("" if done.returncode == 0 else done.stdout + done.stderr for done in told)
    return one, other


def test_the_packed_archive_passes_bandit_and_ruff(tmp_path: Path) -> None:
    assert scanned(packed(tmp_path / "pack")) == ("", "")
    evil = tmp_path / "evil" / "evil.py"
    evil.parent.mkdir()
    evil.write_text("import pickle\n\nprint(pickle.loads(b''), eval('1'))  # noqa: S307  # nosec\n")
    assert all(scanned(evil.parent))


def test_imports_are_relative_or_of_known_packages() -> None:
    """The pack lies in custom_nodes under any name, and its method must not know ComfyUI."""
    assert list(trees("lora2/"))
    for name, tree in trees():
        allowed = MODULES | LIBRARIES | (set() if name.startswith("lora2/") else HOST)
        assert set(imports(tree)) <= allowed, name
        if name.startswith("lora2/"):
            assert all(n.level <= 2 for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level), name


def test_only_the_bridge_knows_comfyuis_insides() -> None:
    """Nodes may use its public interface, no more."""
    for name, tree in trees():
        if not name.startswith(("nodes/comfy/", "nodes/runs/")):
            assert not set(imports(tree)) & (HOST - {"comfy_api"}), name


def test_requirements_are_those_of_pyproject_and_come_with_comfyui() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert lines == project()["project"]["dependencies"]
    host = {
        re.split(r"[^\w-]", line.lower())[0] for line in (comfy_path() / "requirements.txt").read_text().splitlines()
    }
    ours = {re.split(r"[^\w-]", line.lower())[0] for line in lines} | {"pillow" if p == "PIL" else p for p in LIBRARIES}
    assert ours <= host


def test_pyproject_is_what_the_registry_takes() -> None:
    data, comfy = project()["project"], project()["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,98}[a-z0-9]", data["name"])
    assert "comfy" not in data["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", data["version"])
    assert (ROOT / data["license"]["file"]).is_file()
    assert {"Homepage", "Documentation", "Repository", "Issues"} <= data["urls"].keys()
    assert comfy["DisplayName"] == "LoRA²"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert all(comfy[name] == "" or comfy[name].startswith("https://") for name in ("Icon", "Banner"))


def test_patterns_of_comfyignore_still_hit_something() -> None:
    """All are rooted, so that none hits a folder of that name inside the pack."""
    patterns = [line for line in (ROOT / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
    assert all(pattern.startswith("/") for pattern in patterns)
    assert all((ROOT / p.strip("/")).exists() for p in patterns)


def test_the_shipped_files_alone_are_a_pack(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the nodes import is left behind, under whatever name the folder has."""
    folder = packed(tmp_path / "any name")
    module = imported(folder, "shipped_pack", monkeypatch)

    async def node_ids() -> list[str]:
        extension = await module.comfy_entrypoint()
        return [node.GET_SCHEMA().node_id for node in await extension.get_node_list()]

    ids = asyncio.run(node_ids())
    assert ids == ["LoRA2_TrainAdaptiveLora", "LoRA2_LoadAdaptiveLora", "LoRA2_InspectRanks", "LoRA2_ScorePictures"]
    web = folder / module.WEB_DIRECTORY / "docs"
    assert {page.stem for page in web.iterdir()} == set(ids)
    inside = [m for name, m in sys.modules.items() if name.startswith("shipped_pack.")]
    assert all(Path(str(m.__file__)).is_relative_to(folder) for m in inside)
    for name in [n for n in sys.modules if n.startswith("shipped_pack.")]:
        del sys.modules[name]

"""What code that reaches users must not do, found in its syntax: a list of what is allowed rather than of what is not."""

from __future__ import annotations

import ast
from collections.abc import Iterator

MODULES = {
    "__future__", "abc", "bisect", "collections", "concurrent", "contextlib", "copy", "dataclasses", "datetime", "enum", "errno", "fnmatch",
    "functools", "gc", "hashlib", "heapq", "inspect", "itertools", "json", "logging", "math", "numbers", "operator",
    "os", "pathlib", "random", "statistics",
    "re", "secrets", "shutil", "stat", "string", "struct", "textwrap", "threading", "time", "traceback", "types", "typing",
    "unicodedata", "uuid", "warnings", "weakref", "zlib",
}  # fmt: skip
"""Modules of Python that neither run, fetch, nor unpickle anything."""

MEMBERS = {
    "concurrent": {"ThreadPoolExecutor"},
    "os": {
        "O_RDONLY", "R_OK", "W_OK", "X_OK", "access", "close", "fsync", "link", "open", "path", "rename", "replace",
        "scandir", "stat",
        "strerror", "supports_effective_ids", "unlink", "utime", "walk", "DirEntry", "PathLike",
    },
    "shutil": {"disk_usage", "copyfile", "rmtree", "move"},
}  # fmt: skip
"""Of these modules, what may be used."""

REFUSED = {
    "torch": {"load", "save", "hub", "package", "jit", "ops", "classes", "library", "serialization"},
    "pathlib": {"os"},
    "shutil": {"os"},
    "safetensors": {"os", "sys"},
    "numpy": {
        "load",
        "loadtxt",
        "genfromtxt",
        "fromfile",
        "memmap",
        "save",
        "savez",
        "savez_compressed",
        "savetxt",
        "lib",
        "ctypeslib",
        "f2py",
    },
    "logging": {"config", "handlers", "os", "sys"},
}
"""Of these, what may not."""

NAMES = {
    "eval", "exec", "compile", "__import__", "input", "breakpoint", "globals", "locals", "open_code", "__builtins__",
    "__loader__",
    "__spec__", "exit", "quit",
}  # fmt: skip
"""Built-in names that are not so much as mentioned."""

ATTRIBUTES = {
    "__globals__", "__builtins__", "__subclasses__", "__code__", "__closure__", "__loader__", "__reduce__",
    "__import__", "environ",
    "environb", "getenv", "putenv", "system", "popen", "f_globals", "f_locals", "f_builtins", "modules",
    "load_module", "exec_module", "import_module", "run_path", "set_trace",
}  # fmt: skip
"""Attributes that lead out, of whatever object; `module.modules()` of torch is a call and allowed."""


BY_NAME = {"getattr", "setattr", "delattr", "vars"}
"""Functions that reach into an object by a name that may be computed."""


def findings(tree: ast.Module, allowed: set[str]) -> Iterator[str]:
    """What is wrong with a file, with its line; allowed: packages beside Python's own modules."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    bound = _bound(tree)
    for node in ast.walk(tree):
        for what in _of(node, bound, allowed, called):
            yield f"line {getattr(node, 'lineno', 0)}: {what}"


def _bound(tree: ast.Module) -> dict[str, str]:
    """Names that stand for a module: `import numpy as np` gives np: numpy."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
    return names


def _of(node: ast.AST, bound: dict[str, str], allowed: set[str], called: set[int]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] not in MODULES | allowed:
                yield f"imports {alias.name}"
    elif isinstance(node, ast.ImportFrom) and not node.level:
        module = str(node.module)
        if module.split(".")[0] not in MODULES | allowed:
            yield f"imports {module}"
        yield from (f"imports {module}.{a.name}" for a in node.names if not _member(module, a.name))
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield f"mentions {node.id}"
    elif isinstance(node, ast.Attribute):
        if node.attr in ATTRIBUTES and not (node.attr == "modules" and id(node) in called):
            yield f"uses .{node.attr}"
        if isinstance(node.value, ast.Name) and node.value.id in bound and not _member(bound[node.value.id], node.attr):
            yield f"uses {bound[node.value.id]}.{node.attr}"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Name) and bound.get(first.id, "").split(".")[0] in MEMBERS.keys() | {
            "torch",
            "sys",
            "comfy",
        }:
            yield f"reaches into {first.id} by name"
        if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and node.args[1].value in ATTRIBUTES:
            yield f"reaches for {node.args[1].value}"
    elif (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(("http://", "ws://", "ftp://"))
    ):
        yield f"holds the address {node.value}"


def _member(module: str, name: str) -> bool:
    """Whether a module's member may be used."""
    root = module.split(".")[0]
    return name not in REFUSED.get(root, set()) and (root not in MEMBERS or name in MEMBERS[root])

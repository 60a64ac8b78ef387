"""What all tests share. Nothing here imports ComfyUI: the folders whose tests need it do (tests/unit does not)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: the pack's folder `nodes` must not hide ComfyUI's nodes.py
sys.path.append(str(ROOT / "tests" / "support"))

import torch  # noqa: E402
from probed_server import probed  # noqa: E402

from dev import assets, host  # noqa: E402
from dev.server import ComfyServer  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: threads only wait for each other. Whatever a test sets, the next one starts with one."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def comfy() -> ModuleType:
    """The package `comfy` with `comfy.sd` loaded, on the CPU unless torch has CUDA."""
    host.import_comfy()
    import comfy.sd

    return comfy


@pytest.fixture(scope="session")
def fresh_model(comfy: ModuleType) -> Callable[[str], Any]:
    """The ModelPatcher of a family's small random model, loaded anew as UNETLoader does: for tests that change the model."""
    return lambda family: comfy.sd.load_diffusion_model(str(assets.family(family)))


@pytest.fixture(scope="session")
def small_model(fresh_model: Callable[[str], Any]) -> Iterator[Callable[[str], Any]]:
    """A ModelPatcher of a family's small random model over weights that all tests share; they are the same at the end.

    Loaded in inference mode or outside it, as the caller is: whether weights are inference tensors makes a difference.
    """
    loaded: dict[tuple[str, bool], tuple[Any, str]] = {}

    def model(family: str) -> Any:
        key = (family, torch.is_inference_mode_enabled())
        if key not in loaded:
            fresh = fresh_model(family)
            loaded[key] = fresh, digest(fresh.model)
        return loaded[key][0].clone()

    yield model
    changed = [key for key, (shared, before) in loaded.items() if digest(shared.model) != before]
    assert not changed, f"a test changed the weights of {changed}"


def digest(module: torch.nn.Module) -> str:
    """Of every weight's name and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@pytest.fixture
def lora_folder(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's LoRA folder, empty."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with the pack, the small SD1.x checkpoint, the pictures in input/mug, and tests/support/probe."""
    with probed(tmp_path_factory.mktemp("comfy")) as running:
        yield running


@pytest.fixture
def folders(comfy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's LoRA, output and temporary folders below tmp_path: loras/ (empty), output/, temp/."""
    import folder_paths

    (tmp_path / "loras").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    folder_paths.filename_list_cache.pop("loras", None)
    return tmp_path


@pytest.fixture
def model(small_model: Callable[[str], Any], folders: Path) -> Any:
    """The small Flux, loaded as a graph does it: in inference mode."""
    with torch.inference_mode():
        return small_model("flux")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """The last sentence that a node said; the same words go onto the node (progress text) and into the log."""
    caplog.set_level("INFO", "lora2")

    def last() -> str:
        return [r.getMessage() for r in caplog.records if r.name == "lora2"][-1].removeprefix("LoRA²: ")

    return last


NEEDS_GPU = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is one; elsewhere they are left out, and the summary says so."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    config.stash[NEEDS_GPU] = len(left_out)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One plain line."""
    if count := config.stash.get(NEEDS_GPU, 0):
        terminalreporter.write_line(
            f"{count} tests need a GPU and did not run: `make test-gpu` on a machine that has one."
        )

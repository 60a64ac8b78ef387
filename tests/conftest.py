"""What all tests share. Nothing here imports ComfyUI: the folders whose tests need it do (tests/unit does not)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: the pack's folder `nodes` must not hide ComfyUI's nodes.py
sys.path.append(str(ROOT / "tests" / "support"))

from probed_server import probed  # noqa: E402

from dev import assets, host  # noqa: E402
from dev.server import ComfyServer  # noqa: E402

if TYPE_CHECKING:  # at run time torch is imported where it is needed: with workers, this process needs none
    import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: threads only wait for each other. Whatever a test sets, the next one starts with one."""
    import torch

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


class SharedModels:
    """Small models that are loaded once, by family and by whether that was in inference mode, with their weights' sums."""

    def __init__(self, load: Callable[[str], Any]) -> None:
        self._load = load
        self._loaded: dict[tuple[str, bool], tuple[Any, dict[str, int]]] = {}
        self._used: set[tuple[str, bool]] = set()

    def clone(self, family: str) -> Any:
        """A ModelPatcher of its own over the shared weights."""
        import torch

        key = (family, torch.is_inference_mode_enabled())
        if key not in self._loaded:
            model = self._load(family)
            self._loaded[key] = model, bit_sums(model.model)
        self._used.add(key)
        return self._loaded[key][0].clone()

    def unload(self) -> None:
        """Take a test's patches off, and let ComfyUI forget its clones: it would collect garbage at every load because of them."""
        import comfy.model_management
        import torch

        loaded = comfy.model_management.current_loaded_models
        for key in self._used:
            model, (_, inference) = self._loaded[key][0], key
            with torch.inference_mode(inference):
                model.detach()
            loaded[:] = [entry for entry in loaded if entry.real_model is None or entry.real_model() is not model.model]
        self._used.clear()

    def check(self) -> None:
        """Training leaves weights as they were."""
        for (family, _), (model, before) in self._loaded.items():
            after = bit_sums(model.model)
            changed = [name for name in before | after if before.get(name) != after.get(name)]
            assert not changed, f"tests changed weights of {family}: {changed[:5]}. Use fresh_model."


@pytest.fixture(scope="session")
def shared_models(fresh_model: Callable[[str], Any]) -> Iterator[SharedModels]:
    """Every family's small model, loaded once; their weights are checked at the end."""
    models = SharedModels(fresh_model)
    yield models
    models.check()


@pytest.fixture
def small_model(shared_models: SharedModels) -> Iterator[Callable[[str], Any]]:
    """A ModelPatcher of a family's small random model, by its name, over weights that all tests share."""
    yield shared_models.clone
    shared_models.unload()


def bit_sums(module: torch.nn.Module) -> dict[str, int]:
    """The sum of each weight's bits, read as whole numbers."""
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(tensor.detach().contiguous().view(-1).view(whole[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in module.state_dict().items()
    }


@pytest.fixture
def lora_folder(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's LoRA folder, empty."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with the pack, the small SD1.x checkpoint, the pictures in input/mug, and tests/support/probe."""
    with probed(tmp_path_factory.mktemp("home-of-anna")) as running:
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
    import torch

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


GROUPS = ("server", "tests/server/", "tests/comfy/", "tests/repo/", "")
"""What two workers take first, by the start of a group's name: the parts that take longest."""


def group_of(item: pytest.Item) -> str:
    """Tests with the session's server share a group, hence a worker; others are grouped by file."""
    shared = "server" in getattr(item, "fixturenames", ())
    return "server" if shared else item.path.relative_to(ROOT).as_posix()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups for workers; and tests marked `gpu` run where there is one, else are left out, and the summary says so."""
    if config.pluginmanager.hasplugin("xdist"):
        groups = {item: group_of(item) for item in items}
        items.sort(key=lambda item: [groups[item].startswith(start) for start in GROUPS].index(True))
        for item in items:
            item.add_marker(pytest.mark.xdist_group(groups[item]))
    import torch

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

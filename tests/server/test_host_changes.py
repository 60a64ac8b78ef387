"""A ComfyUI that is not as the pack knows it: it starts, and one sentence names both versions and what is missing."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from graph import imported, load, random_lora, train, untouched, write_lora
from training import pack

from dev import host
from dev.host import ROOT

SmallModel = Callable[[str], Any]
VERSIONS = (
    r"^LoRA² [\d.]+ is incompatible with this ComfyUI \([\d.]+\): .*{what}.*tested with ComfyUI \d.* to \d.*report"
)


def test_the_versions_are_those_of_the_project() -> None:
    versions = pack("nodes.comfy.versions")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == versions.PACK_VERSION
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={versions.OLDEST}"
    assert versions.NEWEST == host.COMFYUI_VERSION
    assert versions.OLDEST == host.OLDEST_VERSION


def imported_anew(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pack, imported once more as ComfyUI does it."""
    for name in [n for n in sys.modules if n.startswith("changed_pack")]:
        monkeypatch.delitem(sys.modules, name)
    return imported(ROOT, "changed_pack", monkeypatch)


def without(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The host less one attribute: "module:attribute"."""

    def remove(patch: pytest.MonkeyPatch) -> None:
        module, _, path = name.partition(":")
        holder = importlib.import_module(module)
        *parts, last = path.split(".")
        for part in parts:
            holder = getattr(holder, part)
        patch.delattr(holder, last)

    return remove


def other_arguments(patch: pytest.MonkeyPatch) -> None:
    """Inputs that know no tooltip."""
    from comfy_api.latest import io

    patch.setattr(io.Int.Input, "__init__", lambda self, name, default=0: None)


AT_IMPORT = {
    "no extension class": (without("comfy_api.latest:ComfyExtension"), "cannot import name 'ComfyExtension'"),
    "no custom types": (without("comfy_api.latest:io.Custom"), "no attribute 'Custom'"),
    "no pictures": (without("comfy_api.latest:ui"), "cannot import name 'ui'"),
    "an internal gone": (
        without("comfy_execution.graph_utils:ExecutionBlocker"),
        "cannot import name 'ExecutionBlocker'",
    ),
    "no schema": (without("comfy_api.latest:io.Schema"), "no attribute 'Schema'"),
    "other arguments": (other_arguments, "unexpected keyword argument"),
}


@pytest.mark.parametrize("case", AT_IMPORT)
def test_a_changed_interface_is_named_at_import(case: str, comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = AT_IMPORT[case]
    with monkeypatch.context() as patch:
        change(patch)
        with pytest.raises(ImportError, match=VERSIONS.format(what=words)) as error:
            asyncio.run(node_list(patch))
    assert not re.search(r"[/\\]\w+[/\\]", str(error.value)), "no path"


async def node_list(patch: pytest.MonkeyPatch) -> Any:
    return await (await imported_anew(patch).comfy_entrypoint()).get_node_list()


AT_TRAINING = {
    "comfy.model_management:load_models_gpu": "no attribute 'load_models_gpu'",
    "comfy.model_patcher:ModelPatcher.is_dynamic": "no attribute 'is_dynamic'",
    "comfy.samplers:encode_model_conds": "no attribute 'encode_model_conds'",
    "comfy.utils:ProgressBar": "no attribute 'ProgressBar'",
    "comfy.utils:ProgressBar.update_absolute": "no attribute 'update_absolute'",
}


@pytest.mark.parametrize("gone", AT_TRAINING)
def test_a_changed_host_is_named_at_the_training_node(
    gone: str, small_model: SmallModel, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        model = small_model("flux")
    wrong = pack("lora2.util.errors").LoraError
    with untouched(model), monkeypatch.context() as patch:
        without(gone)(patch)
        with pytest.raises(wrong, match=VERSIONS.format(what=AT_TRAINING[gone])):
            train(model)
    assert train(model)


def test_a_changed_host_is_named_at_the_loader(
    small_model: SmallModel, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that takes other arguments, and one that is gone."""
    import comfy.lora

    with torch.inference_mode():
        model = small_model("flux")
    write_lora(folders, "x.safetensors", random_lora(model))
    wrong = pack("lora2.util.errors").LoraError
    with monkeypatch.context() as patch:
        patch.setattr(comfy.lora, "load_lora", lambda: None)
        with pytest.raises(wrong, match=VERSIONS.format(what="positional arguments")):
            load(model, "x.safetensors")
    with monkeypatch.context() as patch:
        without("comfy.lora:model_lora_keys_unet")(patch)
        with pytest.raises(wrong, match=VERSIONS.format(what="no attribute 'model_lora_keys_unet'")):
            load(model, "x.safetensors")


def test_errors_from_elsewhere_keep_their_words() -> None:
    """Only what arises in the nodes and their bridge is a matter of versions."""
    versions = pack("nodes.comfy.versions")
    for trouble in (lambda: torch.zeros(2).nothing, lambda: int("x"), lambda: [][1]):
        with pytest.raises(Exception) as error:  # noqa: PT011 (each is another)
            trouble()
        assert versions.incompatibility(error.value) is None


def test_a_comfyui_that_breaks_the_pack_goes_on_without_it(
    comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ComfyUI's own loading of a node pack, less a class of its interface: the log says why the pack is left out."""
    import nodes

    folder = tmp_path / "lora2-adaptive"
    folder.symlink_to(ROOT, target_is_directory=True)
    known = dict(nodes.NODE_CLASS_MAPPINGS)
    without("comfy_api.latest:io.ControlAfterGenerate")(monkeypatch)
    with caplog.at_level("WARNING"):
        assert not asyncio.run(nodes.load_custom_node(str(folder)))
    assert known == nodes.NODE_CLASS_MAPPINGS
    assert "KSampler" in known
    version = re.escape(host.COMFYUI_VERSION)
    assert re.search(
        rf"LoRA² \S+ is incompatible with this ComfyUI \({version}\): .*'ControlAfterGenerate'", caplog.text
    )

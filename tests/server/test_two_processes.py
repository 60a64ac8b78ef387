"""Two ComfyUI processes that share a LoRA folder train the same name at the same time; and images that vanish meanwhile."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from cancelling import loras, reached, until
from graph import train
from safetensors.torch import load_file
from server_graphs import training
from training import pack

from dev.server import ComfyServer


def test_two_processes_save_under_one_name_and_a_dataset_vanishes(
    server: ComfyServer, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server and this process. Both files are whole, each is its own run's; the folder of the server's images goes."""
    import folder_paths

    folder, images = server.base / "models" / "loras", server.base / "input" / "vanishing"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    waiting, go = Event(), Event()
    write_new = pack("nodes.runs.save").write_new

    def write_later(*arguments: Any) -> Any:
        waiting.set()
        assert go.wait(60)
        return write_new(*arguments)

    monkeypatch.setattr(pack("nodes.runs.save"), "write_new", write_later)
    shutil.copytree(server.base / "input" / "mug", images)
    prompt = training(3, save_name="two/mug", seed=11, save_dtype="fp32")
    prompt["2"]["inputs"]["folder"] = images.name
    before = loras(server)
    server.post("/probe/arm", {"point": "step", "skip": 1})
    with ThreadPoolExecutor(2) as threads:
        theirs = threads.submit(server.run, prompt)
        ours = threads.submit(train, model, save_name="two/mug", seed=12, save_dtype="fp32")
        until(lambda: reached(server))
        shutil.rmtree(images)
        server.post("/probe/arm", {"point": "saving"})
        server.post("/probe/go", {})
        until(lambda: reached(server) and waiting.is_set())  # both have learned, neither has a name yet
        server.post("/probe/go", {})
        go.set()
        assert theirs.result(60)["status"]["status_str"] == "success"
        names = [server.texts[-1].removeprefix("Saved as ").removesuffix("."), ours.result(60)[4]]
    assert sorted(names) == ["two/mug_00001.safetensors", "two/mug_00002.safetensors"]
    assert {p.relative_to(folder).as_posix() for p in loras(server) - before} == set(names)
    seeds = [pack("lora2.files.document").read(folder / name).info["training"]["seed"] for name in names]
    assert seeds == [11, 12], "each name is the run's that said it"
    server.run(training(3, save_name="two/again", seed=11, save_dtype="fp32"))
    wholes = load_file(folder / "two/again_00001.safetensors"), ours.result()[0]
    for name, whole in zip(names, wholes, strict=True):
        learned = load_file(folder / name)
        assert all(torch.equal(learned[key], tensor) for key, tensor in whole.items())

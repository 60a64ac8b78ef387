"""Two servers that share a LoRA folder train the same name at the same time; and pictures that vanish while they are learned."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cancelling import loras, reached, until
from probed_server import probed
from safetensors.torch import load_file
from server_graphs import training
from training import pack

from dev.server import ComfyServer


def test_two_servers_and_a_dataset_that_vanishes(server: ComfyServer, tmp_path: Path) -> None:
    """Both files are whole, each is its own run's, and the folder of one's pictures goes while it runs."""
    base = tmp_path / "other"
    with probed(base) as other:
        shutil.rmtree(base / "models" / "loras")
        (base / "models" / "loras").symlink_to(server.base / "models" / "loras", target_is_directory=True)
        before = loras(server)
        servers = (server, other)
        server.post("/probe/arm", {"point": "saving"})
        other.post("/probe/arm", {"point": "step", "skip": 1})
        told = [training(3, save_name="two/mug", seed=seed, save_dtype="fp32") for seed in (11, 12)]
        with ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(one.run, prompt) for one, prompt in zip(servers, told, strict=True)]
            until(lambda: reached(other))
            shutil.rmtree(base / "input" / "mug")
            other.post("/probe/arm", {"point": "saving"})
            other.post("/probe/go", {})
            until(lambda: all(reached(one) for one in servers))  # both have learned, neither has a name yet
            for one in servers:
                one.post("/probe/go", {})
            entries = [run.result(60) for run in runs]
        assert [entry["status"]["status_str"] for entry in entries] == ["success", "success"]
        names = [one.texts[-1].removeprefix("Saved as ").removesuffix(".") for one in servers]
        again = server.run(training(3, save_name="two/again", seed=12, save_dtype="fp32"))
    assert again["status"]["status_str"] == "success"
    assert sorted(names) == ["two/mug_00001.safetensors", "two/mug_00002.safetensors"]
    folder = server.base / "models" / "loras"
    new = {p.relative_to(folder).as_posix() for p in loras(server) - before}
    assert new == {*names, "two/again_00001.safetensors"}
    seeds = [pack("lora2.files.document").read(folder / name).info["training"]["seed"] for name in names]
    assert seeds == [11, 12], "each name is the run's that said it"
    learned, expected = load_file(folder / names[1]), load_file(folder / "two/again_00001.safetensors")
    assert all(torch.equal(learned[key], tensor) for key, tensor in expected.items())

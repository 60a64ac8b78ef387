"""Inspect Ranks as ComfyUI runs it: any LoRA file or a LoRA from the graph, in the real server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from training import pack

from dev.server import ComfyServer, PromptError
from lora2.method.factors import Factors
from lora2.method.svd import energy_rank

NODE = "LoRA2_InspectRanks"
CONNECTED = "(the connected LoRA)"


def lora(ranks: dict[str, int]) -> dict[str, torch.Tensor]:
    """A kohya file's tensors, 64 x 64 layers, without any metadata."""
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"{name}.lora_down.weight"] = torch.ones(rank, 64)
        tensors[f"{name}.lora_up.weight"] = torch.ones(64, rank)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return tensors


Q, V = (f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{p}" for p in "qv")


@pytest.fixture
def node(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The node's execute, with tmp_path/loras as ComfyUI's only LoRA folder and pictures under tmp_path."""
    import folder_paths

    (tmp_path / "loras").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    folder_paths.filename_list_cache.pop("loras", None)
    inspect = pack("nodes.inspect_ranks")

    def execute(**inputs: Any) -> Any:
        with torch.inference_mode():
            return inspect.InspectRanks.EXECUTE_NORMALIZED(**inputs)

    return execute


def test_a_file_gives_picture_text_ranks_and_data(node: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "loras" / "sub").mkdir()
    save_file(lora({Q: 4, V: 8}), tmp_path / "loras" / "sub" / "mug.safetensors")
    out = node(lora_name="sub/mug.safetensors", show="rank")
    image, text, ranks, data = out.result
    assert image.dtype == torch.float32
    assert (image.shape[0], image.shape[2:]) == (1, (1024, 3))
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    assert text.startswith("## mug\n")
    assert {layer.name: layer.rank for layer in ranks.layers} == {Q: 4, V: 8}
    assert json.loads(data)["rank"] == {"min": 4, "mean": 6.0, "max": 8}
    shown = out.ui.as_dict()["images"][0]
    assert (tmp_path / "temp" / shown["filename"]).stat().st_size > 0
    assert str(tmp_path) not in json.dumps([shown, text, data])


def test_ranks_in_use_are_measured_on_demand(node: Callable[..., Any]) -> None:
    """Factors of ones have rank 1, whatever is stored."""
    report = node(lora_name=CONNECTED, show="rank in use", lora=lora({Q: 4})).result[2]
    assert (report.mean_rank, report.mean_energy_rank) == (4, 1)


def test_a_connected_lora_keeps_its_name(node: Callable[..., Any]) -> None:
    tensors = pack("lora2.files.document").LoraStateDict(lora({Q: 4}), {"ss_output_name": "my_dog"})
    assert node(lora_name=CONNECTED, lora=tensors).result[2].title == "my_dog"
    assert node(lora_name=CONNECTED, lora=lora({Q: 4})).result[2].title == "LoRA"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"lora_name": CONNECTED}, "Choose a file in lora_name, or connect a LoRA"),
        ({"lora_name": "gone.safetensors"}, "not in ComfyUI's LoRA folders any more"),
        ({"lora_name": "../secret.safetensors"}, "not the name of a file inside"),
        ({"lora_name": "..\\secret.safetensors"}, "not the name of a file inside"),
        ({"lora_name": "/etc/secret.safetensors"}, "not the name of a file inside"),
        ({"lora_name": "C:\\secret.safetensors"}, "not the name of a file inside"),
        ({"lora_name": "a\0.safetensors"}, "not the name of a file inside"),
        ({"lora_name": "old.ckpt"}, "Convert it first"),
        ({"lora_name": "bad.safetensors"}, "is truncated"),
        ({"lora_name": "none.safetensors"}, "no plain LoRA layer"),
        ({"lora_name": CONNECTED, "lora": {}}, "no plain LoRA layer"),
    ],
)
def test_what_cannot_be_shown_is_said(
    node: Callable[..., Any], tmp_path: Path, inputs: dict[str, Any], message: str
) -> None:
    save_file({"x.hada_w1_a": torch.zeros(2, 2)}, tmp_path / "loras" / "none.safetensors")
    (tmp_path / "loras" / "bad.safetensors").write_bytes(b"\x10")
    (tmp_path / "secret.safetensors").write_bytes(b"\x10")
    with pytest.raises(pack("lora2.util.errors").LoraError, match=message):
        node(**inputs)


def test_a_changed_file_is_read_again(node: Callable[..., Any], tmp_path: Path) -> None:
    """The host runs a node again when its fingerprint differs."""
    fingerprint = pack("nodes.inspect_ranks").InspectRanks.fingerprint_inputs
    path = tmp_path / "loras" / "mug.safetensors"
    save_file(lora({Q: 4}), path)
    first = fingerprint(lora_name="mug.safetensors", show="rank")
    assert fingerprint(lora_name="mug.safetensors", show="rank", lora=None) == first
    os.utime(path, ns=(1, 1))
    assert fingerprint(lora_name="mug.safetensors", show="rank") != first
    assert fingerprint(lora_name="gone.safetensors", show="rank") == "missing"
    assert fingerprint(lora_name=CONNECTED, show="rank") == ""


def test_every_input_and_output_is_explained(node: Callable[..., Any]) -> None:
    schema = pack("nodes.inspect_ranks").InspectRanks.define_schema()
    assert all(part.tooltip for part in [*schema.inputs, *schema.outputs])
    assert schema.description
    assert "adalora" in schema.search_aliases


def test_the_server_lists_new_files_and_shows_the_picture(server: ComfyServer) -> None:
    """Alone in the graph, the node runs; the frontend takes its picture from the history."""
    save_file(lora({Q: 4, V: 8}), server.base / "models" / "loras" / "inspect_me.safetensors")
    options = server.object_info(NODE)["input"]["required"]["lora_name"][1]["options"]
    assert options[0] == CONNECTED
    assert "inspect_me.safetensors" in options
    inputs = {"lora_name": "inspect_me.safetensors", "show": "rank"}
    entry = server.run({"1": {"class_type": NODE, "inputs": inputs}})
    picture = entry["outputs"]["1"]["images"][0]
    assert picture["type"] == "temp"
    with Image.open(server.base / "temp" / picture["filename"]) as image:
        assert image.width == 1024
    with pytest.raises(PromptError, match="Choose a file in lora_name"):
        server.run({"1": {"class_type": NODE, "inputs": {"lora_name": CONNECTED, "show": "rank"}}})


def test_a_rank_beyond_the_layer_costs_no_more_than_the_layer() -> None:
    """A file of 80 KB may claim rank 20,000 for a layer of one number; a matrix of that size would fill gigabytes."""
    huge = Factors(torch.ones(1, 20_000), torch.ones(20_000, 1))
    assert energy_rank(huge, 0.99) == 1

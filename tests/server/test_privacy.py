"""What others get to see of a run: the file, its metadata, pictures, templates, our lines in the log. No path, no person."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from training import pack

from dev import assets
from dev.host import ROOT
from dev.server import ComfyServer

PERSON = "anna-karenina"
ABOUT_THE_RUN = {"ss_output_name", "modelspec.title", "modelspec.date", "modelspec.resolution"}


def prompt(name: str) -> dict[str, Any]:
    """A short training of the paper's form, whose positions stay in order of importance, and a look at its file."""
    inputs = {
        "model": ["1", 0], "latents": ["3", 0], "conditioning": ["2", 0], "steps": 2, "learning_rate": 1e-3, "batch_size": 1,
        "target_rank": 2, "budget_mb": 0.0, "layers": "attention", "seed": 0, "save_name": name, "settle_at": 1.0,
    }  # fmt: skip
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": assets.CHECKPOINT}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": f"a photo of {PERSON}"}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "LoRA2_TrainAdaptiveLora", "inputs": inputs},
    }


def look(name: str) -> dict[str, Any]:
    """Inspect Ranks on a file."""
    return {"1": {"class_type": "LoRA2_InspectRanks", "inputs": {"lora_name": name, "show": "rank"}}}


@dataclass
class Run:
    """What a training showed and wrote."""

    entry: dict[str, Any]
    previews: list[bytes]
    texts: list[str]
    path: Path


@pytest.fixture(scope="module")
def runs(server: ComfyServer) -> dict[str, Run]:
    """The same training twice: "plain", and "quiet" as if the server had been started with --disable-metadata."""
    found = {}
    for name in ("plain", "quiet"):
        server.post("/probe/disable_metadata", {"value": name == "quiet"})
        entry = server.run(prompt(f"{name}/mug"))
        path = server.base / f"models/loras/{name}/mug_00001.safetensors"
        found[name] = Run(entry, server.previews, server.texts, path)
    server.post("/probe/disable_metadata", {"value": False})
    return found


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def pictures(server: ComfyServer, entry: dict[str, Any]) -> Iterator[Path]:
    """What a run left to be shown."""
    for output in entry["outputs"].values():
        for image in output.get("images", []):
            yield server.base / image["type"] / image.get("subfolder", "") / image["filename"]


def check_traces(server: ComfyServer, run: Run, *more: str) -> None:
    """Nothing of ours tells where the folders lie, nor holds these texts."""
    shown = list(pictures(server, run.entry))
    assert shown
    said = "\n".join(line for line in server.logs().splitlines() if "LoRA²" in line)
    assert "Saved as" in said
    for secret in (str(server.base), server.base.name, f"{Path.home()}/", *more):
        for content in (run.path.read_bytes(), *(path.read_bytes() for path in shown), *run.previews, said.encode()):
            assert secret.encode() not in content, secret
        assert not any(secret in words for words in run.texts), secret


def test_a_run_tells_nothing_of_its_owner(server: ComfyServer, runs: dict[str, Run]) -> None:
    check_traces(server, runs["plain"])
    for picture in pictures(server, runs["plain"].entry):
        with Image.open(picture) as opened:
            assert set(opened.info) <= {"prompt", "workflow"}, "ComfyUI's own, as in every picture that it shows"
    told = metadata(runs["plain"].path)
    assert told.keys() >= ABOUT_THE_RUN, "without the flag these are there"
    assert told["ss_output_name"] == told["modelspec.title"] == "mug"
    assert json.loads(told["lora2"])["training"]["steps"] == 2
    assert "prompt" not in told
    assert "workflow" not in told


def test_disable_metadata_leaves_only_what_reads_the_file(server: ComfyServer, runs: dict[str, Run]) -> None:
    """As ComfyUI's own savers do with it: no prompt, no workflow; here no name, date, size of pictures or setting either."""
    path = runs["quiet"].path
    check_traces(server, runs["quiet"], PERSON, "CheckpointLoaderSimple")
    told = metadata(path)
    assert set(told) == {
        "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_base_model_version", "ss_v2", "lora2",
        "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.prediction_type",
    }  # fmt: skip
    ours = json.loads(told["lora2"])
    assert ours["training"] == {}
    document = pack("lora2.files.document").read(path)
    assert document.notes == []
    for prefix, entry_ in ours["layers"].items():
        assert entry_["rank"] == document.layers[prefix].rank
        assert entry_["order"] == "importance"
    cut = pack("lora2.files.resize").resize(document, share=0.5)
    assert 0 < cut.bytes_after < cut.bytes_before
    assert server.run(look("quiet/mug_00001.safetensors"))["status"]["status_str"] == "success"


def test_the_files_are_the_same_but_for_the_metadata(runs: dict[str, Run]) -> None:
    """The flag changes nothing that was learned."""
    one, other = (pack("lora2.files.document").read(run.path).state_dict() for run in runs.values())
    assert one.keys() == other.keys()
    assert all(bool((one[key] == other[key]).all()) for key in one)


def test_messages_about_files_do_not_tell_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system says of a file holds its whole path."""
    reader = pack("lora2.files.reader")
    path = tmp_path / PERSON / "x.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"")

    def refused(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(reader, "open", refused, raising=False)
    with pytest.raises(
        pack("lora2.util.errors").LoraError, match=r"^x.safetensors cannot be read: Permission denied.$"
    ):
        reader.read_file(path)


def test_templates_hold_no_paths() -> None:
    private = re.compile(r"/(?:home|Users|root|tmp)/|[A-Za-z]:\\\\|\\\\\\\\|@[a-z]+\.[a-z]")
    for path in (ROOT / "workflows").glob("*.json"):
        found = private.search(path.read_text())
        assert found is None, f"{path.name}: {found}"
    for path in (ROOT / "workflows").glob("*.jpg"):
        with Image.open(path) as picture:
            assert not picture.getexif(), path.name
            assert "comment" not in picture.info, path.name

"""What a file says about itself, to other tools and to us."""

from __future__ import annotations

import hashlib
import io
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lora_metadata import file_of

from lora2.files import rank_info as info
from lora2.files.document import parse, read, to_state_dict
from lora2.files.families import FAMILIES
from lora2.files.metadata import MAX_VIEWABLE_HEADER, build, legacy_hash, model_hash
from lora2.files.writer import header, write_new
from lora2.method.factors import Factors
from lora2.util.errors import LoraError


def built(count: int = 3, **changes: Any) -> dict[str, str]:
    tensors, layers = file_of(count)
    config: dict[str, Any] = {"name": "mug", "family": "sdxl", "layers": layers, "training": {"steps": 10}}
    return build(tensors, **{**config, **changes})


# --- what is written


def test_what_other_tools_look_for() -> None:
    metadata = built(prediction="epsilon", resolution=(1024, 768), created=datetime(2026, 1, 2, 3, 4, 5, 6))
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "mug"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.date"] == "2026-01-02T03:04:05"
    assert metadata["modelspec.resolution"] == "1024x768"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert "lora_adapter_metadata" not in metadata
    assert all(type(key) is type(value) is str for key, value in metadata.items())


@pytest.mark.parametrize("family", [*FAMILIES, "some_new_model"])
def test_every_family_has_its_words(family: str) -> None:
    metadata = built(family=family)
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert (metadata["ss_v2"] == "True") == family.startswith("sd2")
    # A1111 and Forge tell SDXL by this beginning.
    assert metadata["ss_base_model_version"].startswith("sdxl_") == (family in ("sdxl", "koala"))


def test_flow_models_have_no_prediction_type_in_modelspec() -> None:
    assert "modelspec.prediction_type" not in built(family="flux", prediction="flow")


def test_the_hashes_are_those_of_sd_scripts(tmp_path: Path) -> None:
    """By its definition, on bytes that safetensors itself made."""
    tensors, layers = file_of(3, rank=40, width=4096)  # 3.9 MB: the old hash reads from 1 MiB on
    metadata = build(tensors, name="ä", family="sd1", layers=layers, training={})
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    reference = io.BytesIO(safetensors.torch.save(tensors, training))
    reference.seek(0x100000)
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(reference.read(0x10000)).hexdigest()[:8]
    reference.seek(0)
    reference.seek(int.from_bytes(reference.read(8), "little") + 8)
    assert metadata["sshs_model_hash"] == hashlib.sha256(reference.read()).hexdigest()
    # The file that is written holds the same data, whatever else its header says.
    content = write_new(tmp_path, "x", tensors, metadata).read_bytes()
    after = content[int.from_bytes(content[:8], "little") + 8 :]
    assert hashlib.sha256(after).hexdigest() == metadata["sshs_model_hash"] == model_hash(tensors)


def test_the_old_hash_of_a_small_file_is_that_of_nothing() -> None:
    tensors, _ = file_of(1)
    assert legacy_hash(tensors, {}) == hashlib.sha256(b"").hexdigest()[:8]


def test_strange_names_and_numbers_can_be_written(tmp_path: Path) -> None:
    training: dict[Any, Any] = {
        "loss": math.nan,
        "rates": [math.inf, 1e-4],
        "path": Path("x"),
        "none": None,
        "name": "\ud800",
        1: True,
    }
    tensors, layers = file_of(1)
    metadata = build(tensors, name="a\ud800\n😀", family="sd1", layers=layers, training=training)
    document = read(write_new(tmp_path, "x", tensors, metadata))
    assert document.metadata == metadata
    assert document.info is not None
    assert document.info["training"] == {
        "loss": None,
        "rates": [None, 1e-4],
        "path": "x",
        "none": None,
        "name": "\ud800",
        "1": True,
    }


def test_what_was_written_is_what_is_read() -> None:
    tensors, layers = file_of(5)
    layers["left_out"] = {"rank": 0, "nu": None, "target": None, "shape": [8, 8], "order": "singular"}
    document = parse(tensors, build(tensors, name="x", family="sd1", layers=layers, training={"seed": 7}))
    assert document.info == {"format": 1, "layers": layers, "training": {"seed": 7}}
    assert document.notes == []


# --- the limit of the header


@pytest.fixture
def small_header(monkeypatch: pytest.MonkeyPatch) -> int:
    """A quarter of the limit, for files of a quarter of the layers."""
    monkeypatch.setattr("lora2.files.metadata.MAX_VIEWABLE_HEADER", MAX_VIEWABLE_HEADER // 4)
    return MAX_VIEWABLE_HEADER // 4


@pytest.mark.parametrize("count", [140, 400, 575])
def test_the_header_stays_below_its_limit(tmp_path: Path, count: int, small_header: int) -> None:
    tensors, layers = file_of(count, rank=1, width=2)
    metadata = build(tensors, name="x", family="sdxl", layers=layers, training={"steps": 10})
    assert len(header(tensors, metadata)) < small_header
    path = write_new(tmp_path, "x", tensors, metadata)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    document = read(path)
    assert document.info is not None
    known = document.info["layers"]
    if count == 140:
        assert known == layers
    if count <= 400:
        # Shape and target went; rank and shape come back from the tensors.
        assert {n: (i["rank"], i["nu"], i["shape"]) for n, i in known.items()} == {
            n: (i["rank"], i["nu"], i["shape"]) for n, i in layers.items()
        }
    assert document.info["training"] == {"steps": 10}


def test_where_the_tensors_alone_are_too_long_nothing_is_dropped(tmp_path: Path, small_header: int) -> None:
    tensors, layers = file_of(1024, rank=1, width=2)
    assert len(header(tensors, {})) > small_header
    document = read(
        write_new(tmp_path, "x", tensors, build(tensors, name="x", family="sd1", layers=layers, training={}))
    )
    assert document.info is not None
    assert document.info["layers"] == layers
    assert len(document.layers) == 1024


def test_enormous_training_settings_go_last() -> None:
    tensors, layers = file_of(2)
    metadata = build(tensors, name="x", family="sd1", layers=layers, training={"notes": "x" * (1 << 20)})
    assert len(header(tensors, metadata)) < MAX_VIEWABLE_HEADER
    document = parse(tensors, metadata)
    assert document.info is not None
    assert document.info["training"] == {}


# --- our JSON from a stranger

FACTORS = {
    "a": Factors(torch.ones(6, 3), torch.ones(3, 4)),
    "b": Factors(torch.ones(6, 1, 1, 1), torch.ones(1, 4, 3, 3)),
}


def text(layers: Any, **more: Any) -> str:
    return json.dumps({"format": 1, "layers": layers, "training": {}, **more})


REFUSED: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "Expecting"),
    "nothing": ("", "Expecting"),
    "a list": ("[]", "no table of layers"),
    "no layers": ('{"format": 1}', "no table of layers"),
    "layers a list": (text([]), "no table of layers"),
    "no format": ('{"layers": {}}', "no format"),
    "format true": (text({}, format=True), "no format"),
    "newer format": (text({}, format=2), "format 2, .* an update may help"),
    "training a list": (text({}, training=[]), "training settings"),
    "NaN": ('{"format": 1, "layers": {}, "training": {"a": NaN}}', "it contains NaN"),
    "infinity": ('{"format": 1, "layers": {}, "training": {"a": -Infinity}}', "it contains -Infinity"),
    "1e999": ('{"format": 1, "layers": {}, "training": {"a": [1e999]}}', "not finite"),
    "long number": ('{"format": ' + "1" * 10_000 + "}", "digits"),
    "deep": (text({}, training={"a": [[[[[[[[1]]]]]]]]}), "nested more than 8"),
    "very deep": ("[" * 200_000, "recursion"),
    "gigantic": ('"' + "x" * (9 << 20) + '"', "9437186 characters"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_hostile_metadata_is_refused_and_the_file_still_read(case: str) -> None:
    content, words = REFUSED[case]
    with pytest.raises(LoraError, match=words):
        info.parse(content, FACTORS)
    document = parse(to_state_dict(FACTORS, "peft", torch.float32), {"lora2": content})
    assert set(document.layers) == {"a", "b"}
    assert document.info is None
    assert len(document.notes) == 1
    assert document.notes[0].isprintable()


ENTRIES: dict[str, tuple[Any, str | None]] = {
    "nothing": ({}, None),
    "rank of another": ({"rank": 4}, "rank differs"),
    "rank true": ({"rank": True}, "rank differs"),
    "rank a text": ({"rank": "3"}, "rank differs"),
    "shape of another": ({"shape": [6, 5]}, "shape differs"),
    "ν negative": ({"nu": -1.0}, "ν is not a positive number"),
    "ν zero": ({"nu": 0}, "ν is not a positive number"),
    "ν a text": ({"nu": "0.1"}, "ν is not a positive number"),
    "ν true": ({"nu": True}, "ν is not a positive number"),
    "ν a long number": ({"nu": 10**400}, "ν is not a positive number"),
    "target negative": ({"target": -3}, "target is not a rank"),
    "target a list": ({"target": [3]}, "target is not a rank"),
    "order unknown": ({"order": "random"}, "order is unknown"),
    "order a list": ({"order": []}, "order is unknown"),
    "malformed": ([3], "entry is malformed"),
}


@pytest.mark.parametrize("case", list(ENTRIES))
def test_the_tensor_wins_over_its_entry(case: str) -> None:
    entry, words = ENTRIES[case]
    parsed, notes = info.parse(text({"a": entry, "b": {"nu": 0.5, "order": "importance"}}), FACTORS)
    assert parsed["layers"] == {
        "a": {"rank": 3, "nu": None, "target": None, "shape": [6, 4], "order": "singular"},
        "b": {"rank": 1, "nu": 0.5, "target": None, "shape": [6, 4, 3, 3], "order": "importance"},
    }
    assert [words in note for note in notes] == [True] if words else notes == []


def test_layers_that_the_file_lacks() -> None:
    empty = {"rank": 0, "shape": [4, 4]}
    raw = {"gone": empty, "ghost": {"rank": 5}, "e1": {"rank": 0}, "e2": {"rank": 0, "shape": [0, -1]}}
    parsed, notes = info.parse(text(raw), FACTORS)
    assert set(parsed["layers"]) == {"gone"}
    assert parsed["layers"]["gone"]["rank"] == 0
    assert len(notes) == 1
    assert "3 layers" in notes[0]
    parsed, _ = info.parse(text({f"e{i}": empty for i in range(info.MAX_REMOVED_LAYERS + 10)}), FACTORS)
    assert len(parsed["layers"]) == info.MAX_REMOVED_LAYERS


def test_many_troubles_make_few_notes() -> None:
    many = {f"x{i}\n": Factors(torch.ones(2, 1), torch.ones(1, 2)) for i in range(1000)}
    _, notes = info.parse(text({name: {"rank": 2, "nu": -1} for name in many}), many)
    assert len(notes) == 2
    assert all("1000 layers" in note and note.isprintable() for note in notes)

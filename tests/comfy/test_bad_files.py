"""A LoRA file that is broken, hostile, or not for this model: one clear sentence, and the model as before."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph import load, random_lora, sample, untouched, write_lora
from training import pack

SmallModel = Callable[[str], Any]


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def with_header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


# What the reader refuses is tested in its own suite; here, that the node passes the message on and leaves the model alone.
BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in the data": (lambda b: b[:-1000], "is truncated.*Download or copy it again"),
    "a pickle": (lambda _: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100), "old PyTorch file.*run code.*convert"),
    "gigantic metadata": (
        lambda _: with_header(b'{"__metadata__":{"a":"' + b"x" * (17 << 20) + b'"}}'), "header claims.*the limit is"
    ),
    "a tensor of terabytes": (
        lambda _: with_header(b'{"a.lora_up.weight":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'),
        "is truncated",
    ),
    "no tensors": (lambda _: with_header(b"{}"), "0 of 0 layers loaded"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_broken_file_is_refused(case: str, model: Any, folders: Path) -> None:
    change, words = BAD_FILES[case]
    path = write_lora(folders, "bad.safetensors", random_lora(model))
    rewritten(path, change)
    with untouched(model), pytest.raises(pack("lora2.util.errors").LoraError, match=words) as error:
        load(model, "bad.safetensors")
    assert case == "no tensors" or str(error.value).startswith("bad.safetensors")
    assert str(folders) not in str(error.value), "a message must not tell where the folders lie"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update({k: torch.randn(3, 128) for k in t if k.endswith("img_attn.proj.lora_A.weight")}),
            "fit together",
        ),
        (
            lambda t: t.update({k: t[k] * math.nan for k in t if k.endswith("qkv.lora_B.weight")}),
            "contains NaN.*another LoRA",
        ),
        (
            lambda t: t.update({k: torch.ones(4) for k in t if k.endswith("qkv.alpha")}),
            "alpha of layer .*qkv is not one",
        ),
    ],
    ids=["factors that do not fit", "NaN", "an alpha of four"],
)
def test_a_damaged_lora_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None], words: str, model: Any, folders: Path
) -> None:
    tensors = random_lora(model)
    change(tensors)
    write_lora(folders, "bad.safetensors", tensors)
    with untouched(model), pytest.raises(pack("lora2.util.errors").LoraError, match=rf"^bad.safetensors: .*{words}"):
        load(model, "bad.safetensors")


def test_layers_of_another_size_are_left_out_and_named(
    model: Any, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As ComfyUI does, which says nothing at the node; when no layer fits it is an error."""
    tensors = random_lora(model)
    key = "diffusion_model.double_blocks.1.img_attn.proj"
    tensors[f"{key}.lora_A.weight"] = torch.randn(4, 99)
    write_lora(folders, "odd.safetensors", tensors)
    with untouched(model), caplog.at_level("INFO", "lora2"):
        load(model, "odd.safetensors")
    assert f"11 of 12 layers loaded; 1 have another size than the layer here: {key}." in caplog.text
    for name in [k for k in tensors if k.endswith("lora_A.weight")]:
        tensors[name] = torch.randn(4, 99)
    write_lora(folders, "odd.safetensors", tensors)
    with (
        untouched(model),
        pytest.raises(pack("lora2.util.errors").LoraError, match="0 of 12 layers loaded; 12 have another"),
    ):
        load(model, "odd.safetensors")


def test_hostile_metadata_costs_a_note_and_not_the_lora(
    model: Any, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten megabytes of our own JSON, a nest of lists, a number that is none: the tensors are loaded all the same."""
    for text in (
        "[" * 9_000_000,
        '{"format":1,"layers":' + "[" * 5000,
        '{"format":1,"layers":{"a":{"nu":NaN}}}',
        "\u202e",
        "",
    ):
        write_lora(
            folders, "odd.safetensors", random_lora(model), {"lora2": text, "ss_output_name": "<b>\x1b[31m" * 1000}
        )
        caplog.clear()
        with untouched(model), caplog.at_level("INFO", "lora2"):
            out = load(model, "odd.safetensors", share=0.5)
        message = next(r.getMessage() for r in caplog.records if "12 of 12 layers loaded" in r.getMessage())
        assert "The rank metadata of this file is not used" in message
        assert message.isprintable()
        assert len(message) < 600
        assert len(out[0].patches) == 12


def test_a_lora_of_another_family_is_refused_naming_both(model: Any, small_model: SmallModel, folders: Path) -> None:
    """Also where most of its layers would fit by name and size: SD 2 reads another text, but has SD 1's sizes."""
    with torch.inference_mode():
        sd15, sd21 = small_model("sd15"), small_model("sd21")
    write_lora(folders, "sd15.safetensors", random_lora(sd15))
    write_lora(folders, "flux.safetensors", random_lora(model))
    wrong = pack("lora2.util.errors").LoraError
    for other, name, words in (
        (sd21, "sd15.safetensors", r"made for SD 1\.x and does not fit this model, which is SD 2\.x"),
        (
            model,
            "sd15.safetensors",
            r"made for SD 1\.x and .*, which is Flux: 0 of \d+ layers loaded.*Connect the model",
        ),
        (sd15, "flux.safetensors", r"made for Flux and .*, which is SD 1\.x"),
    ):
        patches = dict(other.patches)
        with pytest.raises(wrong, match=words):
            load(other, name)
        assert other.patches == patches
    assert sample(model).isfinite().all()


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "C:\\x.safetensors", "a\0b.safetensors", "", "gone.safetensors", "x.ckpt"],
)
def test_a_name_that_is_no_lora_is_refused(name: str, model: Any, folders: Path) -> None:
    """ComfyUI looks for ../x inside the folder, where there is an x; it is refused all the same."""
    write_lora(folders, "x.safetensors", random_lora(model))
    with untouched(model), pytest.raises(pack("lora2.util.errors").LoraError) as error:
        load(model, name)
    assert str(error.value).isprintable()

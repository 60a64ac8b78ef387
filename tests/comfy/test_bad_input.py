"""Whatever is wrong with what training is given: one clear sentence at the node, nothing written, the model as before."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph import files_in, load, refused, train, untouched
from training import captions, latents, pack

SmallModel = Callable[[str], Any]


# --- data


def with_value(value: float) -> list[dict[str, Any]]:
    """Three latents, one number of the second of them changed."""
    bad = latents("flux")
    bad[1]["samples"][0, 3, 2, 1] = value
    return bad


def caption_with(value: float, pooled: bool = False) -> list[Any]:
    """Three captions, one number of the third of them changed."""
    bad = captions("flux", 3)
    (bad[2][0][1]["pooled_output"] if pooled else bad[2][0][0])[..., 5] = value
    return bad


def with_option(name: str) -> list[Any]:
    bad = captions("flux", 3)
    bad[0][0][1][name] = SimpleNamespace()
    return bad


def one(*shape: int) -> list[dict[str, Any]]:
    return [{"samples": torch.zeros(*shape)}]


NESTED = torch.nested.nested_tensor([torch.zeros(16, 8, 8)], layout=torch.jagged)
BAD_DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "no latents": (r"no latents.*Connect the latents", {"latents": []}),
    "a batch of none": (r"no latents", {"latents": one(0, 16, 8, 8)}),
    "no pixels": (r"Latents entry 1 .*\[1, 16, 0, 8\].*no pixels", {"latents": one(1, 16, 0, 8)}),
    "no tensor": (r"Latents entry 1 is not a picture latent.*VAE", {"latents": [{"samples": None}]}),
    "no dict": (r"Latents entry 2 is not a picture latent", {"latents": [latents("flux")[0], torch.zeros(1)]}),
    "nested": (r"Latents entry 1 is not a picture latent", {"latents": [{"samples": NESTED}]}),
    "video": (
        r"Picture 1 has a latent of shape \[16, 5, 8, 8\].*expects 2 dimensions",
        {"latents": one(1, 16, 5, 8, 8) * 3},
    ),
    "audio": (r"Picture 1 .*shape \[16, 32\]", {"latents": one(1, 16, 32) * 3}),
    "wrong channels": (r"Picture 1 has a latent of 4 channels.*expects 16.*VAE", {"latents": one(1, 4, 8, 8) * 3}),
    "NaN": (r"Latents entry 2 holds NaN.*encode again", {"latents": with_value(math.nan)}),
    "infinity": (r"Latents entry 2 holds NaN or infinity", {"latents": with_value(-math.inf)}),
    "no conditioning": (r"no conditioning.*Connect", {"conditioning": []}),
    "empty conditioning": (r"no conditioning", {"conditioning": [[]]}),
    "fewer captions": (r"3 pictures but 2 captions.*Connect", {"conditioning": captions("flux", 2)}),
    "more captions": (r"3 pictures but 4 captions", {"conditioning": captions("flux", 4)}),
    "one entry, other counts": (
        r"entry 1 holds 3 pictures but its conditioning has 2 captions.*Connect",
        {"latents": one(3, 16, 8, 8), "conditioning": [captions("flux", 1)[0] * 2]},
    ),
    "no conditioning at all": (r"not a ComfyUI conditioning", {"conditioning": [3, 4, 5]}),
    "a conditioning of numbers": (r"not a ComfyUI conditioning", {"conditioning": [[1, 2, 3]]}),
    "a caption without text": (r"Caption 1 is not one encoded text", {"conditioning": [[[None, {}]]]}),
    "captions in a batch": (
        r"Caption 1 is not one encoded text.*on its own",
        {"conditioning": [[[torch.zeros(3, 7, 4096), {}]]]},
    ),
    "NaN in a caption": (r"Caption 3 holds NaN.*fp32", {"conditioning": caption_with(math.nan)}),
    "infinity in a pooled text": (r"Caption 3 holds NaN", {"conditioning": caption_with(math.inf, pooled=True)}),
    "another text encoder": (r"width 768.*reads text of width 4096.*Encode", {"conditioning": captions("sd15", 3)}),
    "a ControlNet": (
        r"has control, which training does not support. Remove it",
        {"conditioning": with_option("control")},
    ),
    "hooks": (r"has hooks", {"conditioning": with_option("hooks")}),
    "an empty caption of NaN": (
        r"The empty caption holds NaN",
        {"empty_caption": [[[torch.full((1, 7, 4096), math.nan), {}]]], "caption_dropout": 0.5},
    ),
    "an empty caption of nothing": (r"The empty caption holds no conditioning", {"empty_caption": [[]]}),
    "an empty caption of another encoder": (
        r"width 768.*width 4096",
        {"empty_caption": captions("sd15", 1), "caption_dropout": 1.0},
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused(case: str, model: Any, folders: Path) -> None:
    words, inputs = BAD_DATA[case]
    refused(model, words, folders, **inputs)


def test_a_nested_latent_of_comfyui_is_refused(model: Any, folders: Path) -> None:
    """Models for video with sound hand on two latents in one."""
    from comfy.nested_tensor import NestedTensor

    nested = NestedTensor([torch.zeros(1, 16, 8, 8), torch.zeros(1, 8, 4)])
    refused(model, "Latents entry 1 is not a picture latent", folders, latents=[{"samples": nested}])


def test_captions_without_what_the_model_needs_are_refused(small_model: SmallModel, folders: Path) -> None:
    """SD's text encoder gives no pooled text, which SDXL is conditioned on."""
    with torch.inference_mode():
        model = small_model("koala")
    words = (
        r"does not fit this model \(KeyError: 'pooled_output'\).*Encode the captions with the model's own text encoder"
    )
    refused(model, words, folders, "koala", conditioning=captions("sd15", 3))


# --- layers, ranks, sizes

BAD_CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "include matches nothing": (r"'\*attn9\*' matches no layer.*paths look like 'img_in'", {"include": "*attn9*"}),
    "exclude matches nothing": (r"'nothing' matches no layer", {"exclude": "nothing"}),
    "all excluded": (r"No layer is left to adapt", {"exclude": "*blocks*"}),
    "target too high": (r"target_rank = 129 .*Choose a target of at most 128", {"target_rank": 129}),
    "target above max_rank": (r"target_rank = 8 must not be above max_rank = 4", {"target_rank": 8, "max_rank": 4}),
    "budget too small": (r"budget_mb = 0.001 is smaller than rank 1 on a single layer.*Raise", {"budget_mb": 0.001}),
    "budget too large": (r"budget_mb = 900 is more than the 12 layers can hold.*Lower", {"budget_mb": 900.0}),
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_impossible_choices_are_refused(case: str, model: Any, folders: Path) -> None:
    words, inputs = BAD_CHOICES[case]
    refused(model, words, folders, **inputs)


def test_the_sizes_in_the_messages_are_right(model: Any, folders: Path) -> None:
    """The smallest and the largest size that a message names are accepted."""
    for wrong in (0.001, 900.0):
        message = refused(model, "budget_mb", folders, budget_mb=wrong)
        named = float(message.split(" MB.")[0].split()[-1])
        step = 0.0005 if wrong < 1 else -0.0005  # the message rounds to 0.001
        out = train(model, budget_mb=named + step, steps=1)
        size = (folders / "loras" / out[4]).stat().st_size
        assert size <= (named + step) * 1e6
        shutil.rmtree(folders / "loras" / "t")
        shutil.rmtree(folders / "temp")


def test_a_model_without_adaptable_layers_is_refused(model: Any, folders: Path) -> None:
    nothing = torch.nn.ReLU()
    nothing.dtype = torch.float32
    bare = model.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.model._modules, "diffusion_model", nothing)
        with pytest.raises(pack("lora2.util.errors").LoraError, match="no linear or convolution layer"):
            train(bare)
    assert files_in(folders) == set()


# --- names


BAD_NAMES = {
    "empty": "", "spaces": "   ", "a folder up": "../mug", "up inside": "a/../../mug", "only up": "..",
    "absolute": "/home/mug", "drive": "C:\\mug", "drive relative": "c:mug", "share": "\\\\server\\mug",
    "backslashes up": "..\\..\\mug", "stream": "mug:stream", "hidden": ".mug", "hidden in a folder": "a/.mug",
    "nul byte": "mug\0", "new line": "mug\nmug", "escape": "\x1b[31mmug", "C1": "mug\x9b", "bell": "a\x07/mug",
    "right to left": "mug\u202egpj", "zero width": "mug\u200b", "line separator": "a\u2028b", "surrogate": "mug\ud800",
    "device": "CON/mug", "device with ending": "nul.txt/mug", "device as name": "aux", "port": "a/LPT1.mug",
    "question": "mug?", "star": "m*g", "quote": 'a/"mug"', "pipe": "mug|more", "markup": "<b>mug",
    "long": "m" * 201, "long in bytes": "猫" * 67, "long folder": "f" * 201 + "/mug", "deep": "f/" * 501 + "mug",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NAMES)
def test_a_bad_name_is_refused_before_anything_runs(case: str, model: Any, folders: Path) -> None:
    message = refused(model, r"^save_name '.*subjects/mug", folders, save_name=BAD_NAMES[case])
    assert message.isprintable(), "a message must not carry what it complains about into the terminal"
    assert len(message) < 400


def test_a_link_out_of_the_folder_is_not_followed(model: Any, folders: Path) -> None:
    outside = folders / "outside"
    outside.mkdir()
    (folders / "loras" / "link").symlink_to(outside)
    for name in ("link/mug", "link/new/mug"):
        with (
            untouched(model),
            pytest.raises(pack("lora2.util.errors").LoraError, match="through a link to a folder outside"),
        ):
            train(model, save_name=name)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Tasse", "Tasse_00001.safetensors"),
        ("Öl/猫 🐈", "Öl/猫 🐈_00001.safetensors"),
        ("a\\b\\mug.safetensors", "a/b/mug_00001.safetensors"),
        ("m" * 200, "m" * 200 + "_00001.safetensors"),
        ("v1.5 (final), 50%", "v1.5 (final), 50%_00001.safetensors"),
        ("console/com", "console/com_00001.safetensors"),
    ],
)
def test_good_names_are_kept(given: str, name: str, model: Any, folders: Path) -> None:
    assert train(model, save_name=given, steps=1)[4] == name
    assert (folders / "loras" / name).stat().st_size > 0
    assert load(model, name)[2].layers


def test_a_file_in_the_place_of_a_folder_is_seen_before_training(model: Any, folders: Path) -> None:
    (folders / "loras" / "mug").write_text("mine")
    with (
        untouched(model),
        pytest.raises(pack("lora2.util.errors").LoraError, match=r"mug in .* is a file, not a folder"),
    ):
        train(model, save_name="mug/one")
    assert (folders / "loras" / "mug").read_text() == "mine"


# --- odd, but good

ODD: dict[str, dict[str, Any]] = {
    "one step": {"steps": 1},
    "one step, settled at once": {"steps": 1, "settle_at": 0.0},
    "one step of the paper's form": {"steps": 1, "settle_at": 1.0, "rank_hold": 1.0},
    "a batch larger than the data": {"batch_size": 7},
    "one picture": {"latents": latents("flux")[:1], "conditioning": captions("flux", 1)},
    "one picture, a large batch, accumulated": {
        "latents": latents("flux")[:1], "conditioning": captions("flux", 1), "batch_size": 3, "accumulation": 2,
    },
    "one caption for all": {"conditioning": captions("flux", 1)},
    "no caption ever": {"caption_dropout": 1.0},
    "pictures in one batch": {"latents": one(3, 16, 8, 8), "conditioning": [[c for (c,) in captions("flux", 3)]]},
    "an odd shape": {"latents": one(1, 16, 5, 9), "conditioning": captions("flux", 1)},
    "half precision latents": {"latents": [{"samples": d["samples"].half()} for d in latents("flux")]},
    "all linear + convolution": {"layers": "all linear + convolution", "include": "img_in\nfinal_layer.*"},
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_inputs_train(case: str, model: Any, folders: Path) -> None:
    with untouched(model):
        out = train(model, **ODD[case])
    assert all(math.isfinite(loss) for loss in out[3]["loss"])
    assert files_in(folders / "loras") == {"t/mug_00001.safetensors"}
    assert load(model, out[4])[2].layers


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layers": "nonsense"}, "layers = 'nonsense' must be one of attention"),
        ({"checkpointing": "x"}, "checkpointing = 'x' must be one of auto"),
        ({"precision": "x"}, "precision = 'x' must be one of auto"),
        ({"save_dtype": "fp8"}, "save_dtype = 'fp8' must be one of fp16"),
        ({"save_name": 5}, "save_name must be a text"),
    ],
)
def test_choices_that_no_widget_offers_are_refused(given: dict[str, Any], says: str, model: Any, folders: Path) -> None:
    """A link from another node passes the widgets by."""
    refused(model, says, folders, **given)


def test_a_caption_for_a_part_of_the_timesteps_is_refused(model: Any, folders: Path) -> None:
    given = captions("flux", 3)
    given[1][0][1]["start_percent"] = 0.5
    refused(model, "has start_percent, which training does not support", folders, conditioning=given)
    given[1][0][1]["start_percent"] = 0.0
    assert train(model, conditioning=given, steps=1)

"""Going on and starting from files, on real ComfyUI models, through the node: the same adapter bit for bit, or a refusal."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cancelling import reached
from graph import (
    STATES,
    assert_same_weights,
    files_in,
    patched_weights,
    random_lora,
    stock,
    train,
    untouched,
    write_lora,
)
from server_graphs import training, until
from torch import Tensor
from training import captions, latents, pack

from dev.server import ComfyServer, PromptError
from lora2.files.keys import KEY_STYLES

SmallModel = Callable[[str], Any]
LONG = {"steps": 12, "save_dtype": "fp32", "learning_rate": 1e-2, "state_every": 4, "min_rank": 1}
FORMS: dict[str, dict[str, Any]] = {
    "settling": {"batch_size": 2, "caption_dropout": 0.4},
    "pure": {"settle_at": 1.0, "accumulation": 2, "schedule": "constant"},
    "budget": {"settle_at": 1.0, "budget_mb": 0.3, "initial_rank": 16},
    "half precision": {"precision": "bf16", "checkpointing": "on"},
}


def cancel_after(patch: pytest.MonkeyPatch, step: int) -> type[BaseException]:
    """ComfyUI's cancel reaches the run after this step; returns what is raised."""
    import comfy.model_management as management

    live = pack("nodes.runs.step_callback").StepCallback
    real = live.__call__

    def call(self: Any, now: Any) -> None:
        if now.step == step:
            management.interrupt_current_processing()
        real(self, now)

    patch.setattr(live, "__call__", call)
    error: type[BaseException] = management.InterruptProcessingException
    return error


def cancelled(model: Any, step: int, family: str = "flux", **inputs: Any) -> None:
    """A run that was cancelled after this step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(cancel_after(patch, step)):
        train(model, family, **inputs)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def steps_of(folders: Path) -> list[int]:
    """The steps of the states that are there."""
    return sorted(int(name.split("_")[-1].split(".")[0]) for name in files_in(folders, states=True))


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_cancelled_run_goes_on_to_the_same_adapter(form: str, model: Any, folders: Path) -> None:
    """Three pictures of two sizes, cancelled before and after settling; loss for loss, bit for bit."""
    more = {**LONG, **FORMS[form]}
    whole = train(model, **more, save_name="all")  # as long as the other's name: a budget counts the header's bytes
    for step in (5, 9):
        cancelled(model, step, **more)
        with untouched(model):
            again = train(model, **more, continue_from="newest state")
        assert again[3] == whole[3]
        assert_same(again[0], whole[0])


def test_a_unet_goes_on_too(small_model: SmallModel, folders: Path) -> None:
    with torch.inference_mode():
        unet = small_model("sd15")
    more = {**LONG, "steps": 6, "exclude": "*input_blocks* *output_blocks*", "entropy_weight": 0.1}
    whole = train(unet, "sd15", **more, save_name="whole")
    cancelled(unet, 4, "sd15", **more)
    assert_same(train(unet, "sd15", **more, continue_from="newest state")[0], whole[0])


def test_which_states_there_are(model: Any, folders: Path, said: Callable[[], str]) -> None:
    """Every four steps, the last two; the one it was cancelled in; the last one alone in the end. None in the LoRA folder."""
    cancelled(model, 11, **LONG)
    assert steps_of(folders) == [8, 11]
    assert said().endswith("saved as t/mug_00001.safetensors. To resume, choose 'newest state' in continue_from.")
    train(model, **LONG, continue_from="newest state")
    assert steps_of(folders) == [12]
    assert all(name.startswith(f"{STATES}t/mug/") for name in files_in(folders, states=True))
    assert not [name for name in pack("nodes.comfy.lora_paths").lora_names() if "step" in name]
    cancelled(model, 7, **{**LONG, "state_every": 0, "save_name": "other"})
    assert steps_of(folders) == [7, 12]


def test_more_steps_can_be_asked_for(model: Any, folders: Path, said: Callable[[], str]) -> None:
    """A finished run goes on; the schedule is that of the new total, and its ranks stay."""
    first = train(model, **LONG)
    longer = train(model, **{**LONG, "steps": 16}, continue_from="newest state")
    assert longer[3]["loss"][:12] == first[3]["loss"]
    assert len(longer[3]["loss"]) == 16
    assert steps_of(folders) == [16]
    ranks = [{k: v.shape for k, v in r[0].items() if v.ndim} for r in (first, longer)]
    assert ranks[0] == ranks[1]
    with pytest.raises(
        pack("lora2.util.errors").LoraError, match=r"has 16 steps behind it already\. To continue, set steps above 16"
    ):
        train(model, **{**LONG, "steps": 16}, continue_from="newest state")


def test_a_state_can_be_chosen_by_name(model: Any, folders: Path) -> None:
    """An older one too: what came after it stays."""
    states = pack("nodes.runs.states")
    whole = train(model, **LONG, save_name="whole")
    cancelled(model, 9, **LONG)
    older = next(c for c in states.choices() if c.endswith("step_000008.safetensors"))
    assert older.startswith("state: t/mug/")
    assert_same(train(model, **{**LONG, "save_name": "elsewhere"}, continue_from=older)[0], whole[0])
    assert steps_of(folders) == [8, 9, 12, 12]


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers": "all linear"}, "the adapted layers differ"),
    "fewer layers": ({"exclude": "double_blocks.0.*"}, "the adapted layers differ"),
    "pictures": ({"latents": latents("flux", seed=9)}, "pictures 1, 2, 3 differ"),
    "one picture": ({"latents": [*latents("flux")[:2], *latents("flux", seed=9)[2:]]}, "pictures 3 differ"),
    "captions": ({"conditioning": captions("flux", 3, seed=8)}, "captions 1, 2, 3 differ"),
    "order": ({"latents": latents("flux")[::-1]}, "pictures 1, 3 differ"),
    "count": (
        {"latents": latents("flux")[:2], "conditioning": captions("flux", 2)},
        "there are 2 pictures, there were 3",
    ),
    "optimizer": ({"optimizer": "sgd"}, "optimizer is sgd, it was adamw"),
    "target": ({"target_rank": 1}, "target_rank is 1, it was 2"),
}


@pytest.fixture
def settled(model: Any, folders: Path) -> Any:
    """A model with the training states of a run that was cancelled after its last cut; without the LoRA file."""
    if not PRUNED_STATES:
        cancelled(model, 9, **LONG)
        shutil.rmtree(folders / "loras" / "t")
        PRUNED_STATES.update({name: (folders / name).read_bytes() for name in files_in(folders, states=True)})
    for name, content in PRUNED_STATES.items():
        (folders / name).parent.mkdir(parents=True, exist_ok=True)
        (folders / name).write_bytes(content)
    return model


PRUNED_STATES: dict[str, bytes] = {}
"""Files of the run that `settled` shares between tests."""


def test_pictures_in_another_order_are_resumed_bit_for_bit(
    model: Any, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder lists its files in another order on another disk. One picture with its caption, and one caption, come twice."""
    shapes = ((8, 12), (8, 8), (12, 8))
    data = {
        "latents": [latents("flux", shapes)[i] for i in (0, 1, 1, 2)],
        "conditioning": [captions("flux", 3)[i] for i in (0, 1, 1, 1)],
    }
    turned = {name: entries[::-1] for name, entries in data.items()}
    more = {**LONG, "batch_size": 2, "caption_dropout": 0.4}
    whole = train(model, **more, **data, save_name="whole")
    assert train(model, **more, **turned, save_name="turned")[3] != whole[3], "the order matters"
    cancelled(model, 5, **more, **data)
    with caplog.at_level("INFO", "lora2"):
        cancelled(model, 8, **more, **turned, continue_from="newest state")
    assert (
        "The pictures come in another order than in the state's run: they are taken in the order of that run."
        in caplog.text
    )
    caplog.clear()
    with caplog.at_level("INFO", "lora2"):
        again = train(model, **more, **data, continue_from="newest state")
    assert "another order" not in caplog.text, "the state that was written on the way has the first order"
    assert_same(again[0], whole[0])
    assert again[3] == whole[3]


def test_ranks_that_have_come_to_rest_are_as_fixed_as_settled_ones(
    model: Any, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The paper's form: what decides ranks is refused once it would do nothing; settling after all is not."""
    paper = {**LONG, "settle_at": 1.0}
    cancelled(model, 11, **paper)
    for name, value in {"target_rank": 1, "budget_mb": 0.5, "min_rank": 2, "max_rank": 9, "q": 0.8}.items():
        with pytest.raises(pack("lora2.util.errors").LoraError, match=f"belongs to another run: {name} is {value}"):
            train(model, **{**paper, name: value}, continue_from="newest state")
    with caplog.at_level("INFO", "lora2"):
        cut = train(
            model, **{**paper, "settle_at": 0.5, "target_rank": 1, "rank_weight": 0.5}, continue_from="newest state"
        )
    assert "From here on settle_at is 0.5, it was 1.0." in caplog.text
    assert (
        "rank_weight is 0.5, it was 0.0001: the ranks do not change any more, so it has no effect now." in caplog.text
    )
    assert len(cut[3]["loss"]) == 12


@pytest.mark.parametrize("case", DIFFERENCES)
def test_another_run_is_refused_with_its_differences(case: str, settled: Any, folders: Path) -> None:
    changes, words = DIFFERENCES[case]
    states = {name: (folders / name).read_bytes() for name in files_in(folders, states=True)}
    with untouched(settled), pytest.raises(pack("lora2.util.errors").LoraError, match=words) as error:
        train(settled, **{**LONG, **changes}, continue_from="newest state")
    assert "set on_difference to 'start from its factors'" in str(error.value)
    assert {n for n in files_in(folders) if not n.startswith("temp/")} == set()
    assert {name: (folders / name).read_bytes() for name in files_in(folders, states=True)} == states


def test_another_model_is_refused(settled: Any, fresh_model: SmallModel, folders: Path) -> None:
    """The same family with one weight changed, and with a LoRA applied; the first may start from the factors."""
    error = pack("lora2.util.errors").LoraError
    with torch.inference_mode():
        other = fresh_model("flux")
        other.model.diffusion_model.double_blocks[1].img_attn.proj.weight += 1e-3
        write_lora(folders, "style.safetensors", random_lora(settled, 2))
        styled = stock(settled, "style.safetensors")[0]
    with pytest.raises(error, match="the model's weights differ"):
        train(other, **LONG, continue_from="newest state")
    with pytest.raises(error, match="other LoRAs are applied to the model"):
        train(styled, **LONG, continue_from="newest state")
    assert (
        len(train(other, **LONG, continue_from="newest state", on_difference="start from its factors")[3]["loss"]) == 12
    )


def test_the_same_model_with_the_same_lora_goes_on(model: Any, folders: Path) -> None:
    """Weights are looked at as they lie in the file, so that it does not matter how the host has patched them."""
    with torch.inference_mode():
        write_lora(folders, "style.safetensors", random_lora(model, 2))
    whole = train(stock(model, "style.safetensors")[0], **LONG, save_name="whole")
    cancelled(stock(model, "style.safetensors")[0], 7, **LONG)
    patched_weights(stock(model, "style.safetensors", 0.5)[0])  # another branch of the graph has the model now
    again = train(stock(model, "style.safetensors")[0], **LONG, continue_from="newest state")
    assert_same(again[0], whole[0])


def test_a_new_run_starts_from_the_factors_where_asked(settled: Any, folders: Path, said: Callable[[], str]) -> None:
    """Other pictures, more layers: what was learned is where it starts, and what is new is named."""
    seen = begun(settled, **{**LONG, "layers": "all linear", "latents": latents("flux", seed=9)}, **FROM_FACTORS)
    first = pack("lora2.checkpoints.state").read_state(folders / max(files_in(folders, states=True)), 1 << 30)
    wanted = pack("lora2.training.warm_start").factors_from_state(first.part("network"), 0.9)
    assert len(wanted) == 12
    for name, factors in wanted.items():
        assert (seen[name] - factors.delta().double()).norm() <= 1e-5 * factors.delta().norm()
    words = said()
    assert "12 of 36 layers used. 24 (img_in, " in words
    assert "A new run: the adapted layers differ; pictures 1, 2, 3 differ." in words


FROM_FACTORS = {"continue_from": "newest state", "on_difference": "start from its factors"}


class Begun(Exception):
    """The run has begun; no step is taken."""


def begun(model: Any, family: str = "flux", **inputs: Any) -> dict[str, Tensor]:
    """What every layer adds to its weight when training begins, float64."""
    trainer = pack("lora2.training.trainer").Trainer
    seen: dict[str, Tensor] = {}

    def run(self: Any, *_: Any) -> None:
        seen.update({name: factors.delta().double() for name, factors in self.network.export_factors(False).items()})
        raise Begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "run", run)
        with pytest.raises(Begun):
            train(model, family, **inputs)
    return seen


def test_changed_settings_are_said(settled: Any, folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lora2"):
        train(settled, **{**LONG, "learning_rate": 1e-3, "seed": 5}, continue_from="newest state")
    assert "From here on learning_rate is 0.001, it was 0.01." in caplog.text
    assert "From here on seed is 5, it was 0: it only acts at the start and has no effect now." in caplog.text


def test_another_number_type_goes_on_and_is_said_to_round(settled: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lora2"):
        train(settled, **LONG, precision="bf16", continue_from="newest state")
    assert "not the same bit for bit: the number type is bfloat16, it was float32." in caplog.text


def test_a_state_that_cannot_be_written_costs_nothing_else(
    model: Any, folders: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder of states is a file here; the run goes on, and the LoRA is saved."""
    (folders / "output").mkdir()
    (folders / "output" / "lora2_states").write_bytes(b"")
    with caplog.at_level("INFO", "lora2"):
        train(model, **LONG)
    assert caplog.text.count("Not a folder: the training state was not saved") == 3
    assert "loras/t/mug_00001.safetensors" in files_in(folders)


def test_a_state_says_nothing_of_this_machine(settled: Any, folders: Path) -> None:
    """No path and no picture: fingerprints only, and the settings."""
    path = folders / max(files_in(folders, states=True))
    data = path.read_bytes()
    assert str(folders).encode() not in data
    assert str(Path.home()).encode() not in data or str(Path.home()) == "/root"
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    facts = json.loads(json.loads(header)["__metadata__"]["lora2_state"])
    assert facts.keys() == {
        "format",
        "digest",
        "run",
        "network",
        "optimizer",
        "batches",
        "config",
        "fingerprint",
        "environment",
    }


def test_a_link_out_of_the_folder_of_states_is_refused(model: Any, folders: Path) -> None:
    (folders / STATES / "t").mkdir(parents=True)
    (folders / "outside").mkdir()
    (folders / STATES / "t" / "mug").symlink_to(folders / "outside", target_is_directory=True)
    with pytest.raises(pack("lora2.util.errors").LoraError, match="has a link that leads to another folder"):
        train(model)
    assert list((folders / "outside").iterdir()) == []


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("newest state", "There is no training state of save_name 'mug' yet"),
        (
            "state: t/mug/00001_abcdef_step_000001.safetensors",
            "does not exist any more: a run keeps only its last states",
        ),
        ("state: ../../loras/x.safetensors", "does not exist any more"),
        ("LoRA: ../x.safetensors", "is not the name of a file inside"),
        ("LoRA: gone.safetensors", "is not in ComfyUI's LoRA folders any more"),
        ("anything", "must be one of 'nothing', 'newest state', 'state: …' and 'LoRA: …'"),
        (7, "must be one of"),
    ],
)
def test_what_is_not_there_is_refused_in_words(choice: Any, words: str, model: Any, folders: Path) -> None:
    with untouched(model), pytest.raises(pack("lora2.util.errors").LoraError, match=words):
        train(model, continue_from=choice)
    assert files_in(folders) == set()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"state_every": -1}, "state_every = -1 must lie between 0 and"),
        ({"states_kept": 0}, "states_kept = 0 must lie between 1 and"),
        ({"states_kept": 1.5}, "states_kept must be a whole number"),
        ({"on_difference": "ask"}, "on_difference = 'ask' must be one of refuse, start from its factors"),
    ],
)
def test_impossible_requests_are_refused(inputs: dict[str, Any], words: str, model: Any, folders: Path) -> None:
    with pytest.raises(pack("lora2.util.errors").LoraError, match=words):
        train(model, **inputs)


# -- any LoRA as a start ---------------------------------------------------------------------------------------------


def mixed_lora(model: Any, style: str = "") -> dict[str, Tensor]:
    """A LoRA with another rank and alpha for every layer; style: the keys' endings, those of the family if empty."""
    plain = random_lora(model, 6)
    own = next(name for name, (_, down) in KEY_STYLES.items() if any(k.endswith(down) for k in plain))
    up, down = KEY_STYLES[style or own]
    tensors: dict[str, Tensor] = {}
    for index, key in enumerate(k.removesuffix(".alpha") for k in list(plain) if k.endswith(".alpha")):
        rank = 1 + index % 6
        tensors[key + up] = plain[key + KEY_STYLES[own][0]][:, :rank].contiguous()
        tensors[key + down] = plain[key + KEY_STYLES[own][1]][:rank].contiguous()
        if index % 3:
            tensors[key + ".alpha"] = torch.tensor(0.7 * index)
    return tensors


def assert_starts_as(model: Any, name: str, family: str, count: int, **inputs: Any) -> None:
    """Training begins where ComfyUI's own loader puts the model with this file at strength 1."""
    seen = begun(model, family, **inputs, continue_from=f"LoRA: {name}")
    loaded = stock(model, name)[0]
    keys = sorted(loaded.patches)
    before, after = patched_weights(model, keys), patched_weights(loaded)
    assert len(keys) == count
    for key in keys:
        wanted = after[key].double() - before[key].double()
        got = seen[key.removeprefix("diffusion_model.").removesuffix(".weight")]
        # The host's sum is rounded to float32 at the size of the weight.
        rounding = 1e-6 * float(before[key].abs().max())
        assert float((got.reshape(wanted.shape) - wanted).abs().max()) <= rounding + 1e-5 * float(wanted.abs().max()), (
            key
        )


@pytest.mark.parametrize("style", ["peft", "kohya", "diffusers", "bare", "peft-default"])
def test_any_plain_file_is_where_training_starts(
    style: str, model: Any, folders: Path, said: Callable[[], str]
) -> None:
    """Mixed ranks, alphas of their own or none, in every style of keys."""
    write_lora(folders, "start.safetensors", mixed_lora(model, style))
    assert_starts_as(model, "start.safetensors", "flux", 12)
    assert said() == "Training 12 layers on 3 pictures, 3 steps. Starts from start.safetensors: 12 of 12 layers used."


@pytest.fixture
def unet(small_model: SmallModel, folders: Path) -> Any:
    """The small SD1.x."""
    with torch.inference_mode():
        return small_model("sd15")


@pytest.mark.parametrize("start", ["unet.", "base_model.model."])
@pytest.mark.parametrize("style", ["peft", "diffusers-processor"])
def test_a_unet_starts_from_the_names_of_diffusers(start: str, style: str, unet: Any, folders: Path) -> None:
    """unet.….to_q.lora_A.weight: the host's loader knows only the older form, so a file in kohya's names is the measure."""
    import comfy.utils

    diffusers = comfy.utils.unet_to_diffusers(unet.model.model_config.unet_config)
    names = {"lora_unet_" + k.removesuffix(".weight").replace(".", "_"): k.removesuffix(".weight") for k in diffusers}
    kohya, tensors = random_lora(unet, 3), {}
    for key, tensor in kohya.items():
        stem, ending = key.split(".", 1)
        ending = dict(zip((e[1:] for e in KEY_STYLES["kohya"]), KEY_STYLES[style], strict=True)).get(
            ending, f".{ending}"
        )
        tensors[start + names[stem] + ending] = tensor
    write_lora(folders, "diffusers.safetensors", tensors)
    write_lora(folders, "kohya.safetensors", kohya)
    assert_starts_as(unet, "kohya.safetensors", "sd15", len(kohya) // 3)
    one, other = (begun(unet, "sd15", continue_from=f"LoRA: {name}.safetensors") for name in ("diffusers", "kohya"))
    assert_same(one, other)


def test_convolutions_start_from_a_file_too(unet: Any, folders: Path) -> None:
    everything = {"layers": "all linear + convolution"}
    tensors = random_lora(unet, 2, everything["layers"])
    write_lora(folders, "convolutions.safetensors", tensors)
    assert_starts_as(unet, "convolutions.safetensors", "sd15", len(tensors) // 3, **everything)


def test_parts_of_a_fused_projection_are_put_together(model: Any, folders: Path, said: Callable[[], str]) -> None:
    """Diffusers splits Flux's qkv; the ranks of the parts add up."""
    g = torch.Generator().manual_seed(4)
    tensors = {}
    for part, rank in (("to_q", 3), ("to_k", 2), ("to_v", 4), ("to_out.0", 5)):
        for block in (0, 1):
            name = f"transformer.transformer_blocks.{block}.attn.{part}"
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(128, rank, generator=g)
            tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(rank, 128, generator=g)
            tensors[f"{name}.alpha"] = torch.tensor(rank * 0.5)
    write_lora(folders, "split.safetensors", tensors)
    assert_starts_as(model, "split.safetensors", "flux", 4)
    assert "4 of 12 layers used. 8 (" in said()
    assert "start without." in said()


def test_what_is_not_taken_is_named(model: Any, folders: Path, said: Callable[[], str]) -> None:
    tensors = random_lora(model, 2, "all linear")
    stems = sorted({k.rsplit(".lora", 1)[0].removesuffix(".alpha") for k in tensors})
    attention = [s for s in stems if "attn" in s or ("single_blocks" in s and "linear" in s)]
    for suffix in (".lora_A.weight", ".lora_B.weight", ".alpha"):
        del tensors[attention[0] + suffix]
    tensors[attention[0] + ".lokr_w1"] = torch.ones(2, 2)
    tensors[attention[0] + ".lokr_w2"] = torch.ones(64, 64)
    tensors[attention[1] + ".dora_scale"] = torch.ones(128, 1)
    tensors[attention[2] + ".lora_A.weight"] = torch.ones(2, 77)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(8, 2)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(2, 8)
    tensors["lora_unet_nowhere.lora_up.weight"] = torch.ones(8, 2)
    tensors["lora_unet_nowhere.lora_down.weight"] = torch.ones(2, 8)
    write_lora(folders, "mixed.safetensors", tensors)
    begun(model, continue_from="LoRA: mixed.safetensors")
    words = said()
    assert "9 of 12 layers used. 3 (" in words
    assert f"2 not used (no plain LoRA layer): {attention[0]}, {attention[1]}" in words
    assert f"1 not used (have another size than the layer here): {attention[2]}" in words
    assert "1 not used (text encoder, which is not trained): lora_te1_text" in words
    assert "1 not used (belong to no layer here): lora_unet_nowhere" in words
    assert "24 not used (not trained here): diffusion_model." in words


def test_a_file_with_nothing_for_the_model_is_refused(model: Any, small_model: SmallModel, folders: Path) -> None:
    with torch.inference_mode():
        foreign = random_lora(small_model("sd15"), 2)
    write_lora(folders, "sd15.safetensors", foreign)
    write_lora(
        folders, "lokr.safetensors", {"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)}
    )
    for name, words in (
        ("sd15", "was made for SD 1.x and has no layer that is trained here"),
        ("lokr", "no plain LoRA layer"),
    ):
        with untouched(model), pytest.raises(pack("lora2.util.errors").LoraError, match=words):
            train(model, continue_from=f"LoRA: {name}.safetensors")
    assert files_in(folders / "loras") == {"sd15.safetensors", "lokr.safetensors"}


def test_a_lora_of_another_unet_is_refused(small_model: SmallModel, folders: Path) -> None:
    """Its self-attention would fit by size; its cross-attention reads other text."""
    with torch.inference_mode():
        unet, other = small_model("sd15"), small_model("sd21")
        write_lora(folders, "sd21.safetensors", random_lora(other, 2))
    with pytest.raises(pack("lora2.util.errors").LoraError, match=r"was made for SD 2.x and does not fit this model"):
        train(unet, "sd15", continue_from="LoRA: sd21.safetensors")


def test_our_own_file_is_where_training_starts(model: Any, folders: Path) -> None:
    trained = train(model, **LONG)
    assert trained[4] == "t/mug_00001.safetensors"
    assert_starts_as(model, trained[4], "flux", 12)
    more = train(model, **LONG, continue_from="LoRA: t/mug_00001.safetensors")
    assert more[3]["loss"][0] < trained[3]["loss"][0], "it begins below where the first run began"
    assert_same_weights(more[1], stock(model, more[4])[0])


def test_a_file_that_changed_is_read_again(model: Any, folders: Path) -> None:
    """ComfyUI asks for a fingerprint before it takes a node's outputs from its cache."""
    node = pack("nodes.train").TrainAdaptiveLora
    path = write_lora(folders, "start.safetensors", random_lora(model, 2))
    before = node.fingerprint_inputs(continue_from=["LoRA: start.safetensors"], steps=[3])
    time.sleep(0.01)
    path.write_bytes(path.read_bytes() + b"")
    assert node.fingerprint_inputs(continue_from=["LoRA: start.safetensors"]) != before
    assert node.fingerprint_inputs(continue_from=["newest state"]) == node.fingerprint_inputs() == ""


# -- over the real server --------------------------------------------------------------------------------------------


def state_choices(server: ComfyServer) -> list[str]:
    """The states that the node offers now."""
    kind, *more = server.object_info("LoRA2_TrainAdaptiveLora")["input"]["optional"]["continue_from"]
    options: list[str] = kind if isinstance(kind, list) else more[0]["options"]
    assert options[:2] == ["nothing", "newest state"]
    return [o for o in options if o.startswith("state: resume/")]


def test_a_run_cancelled_in_the_server_goes_on_to_the_same_adapter(server: ComfyServer) -> None:
    """Trained, cancelled over /interrupt, continued over /prompt by name though the list is new: equal bit for bit."""
    read = pack("lora2.files.document").read
    more = {"save_dtype": "fp32", "state_every": 3}
    server.run(training(8, **more, save_name="resume/whole"))
    server.post("/probe/arm", {"point": "step", "skip": 4})
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(server.run, training(8, **more, save_name="resume/mug"))
        until(lambda: run.done() or reached(server), 60)
        server.interrupt()
        with pytest.raises(PromptError, match="interrupted at node 4"):
            run.result(60)
    assert (
        "the LoRA so far is saved as resume/mug_00001.safetensors. To resume, choose 'newest state'" in server.texts[-1]
    )
    offered = [c for c in state_choices(server) if "/mug/" in c]
    stopped = int(offered[0].split("_")[-1].split(".")[0])
    assert 4 <= stopped <= 5
    server.run(training(8, **more, save_name="resume/mug", continue_from=offered[0]))
    assert f"8 steps. Resumes after step {stopped} of resume/mug/" in server.texts[0]
    one, other = (read(server.base / f"models/loras/resume/{n}.safetensors") for n in ("whole_00001", "mug_00002"))
    assert_same(one.state_dict(), other.state_dict())
    # The finished run has one state, and what is gone is refused in words.
    assert [c.endswith("step_000008.safetensors") for c in state_choices(server) if "/mug/" in c] == [True]
    with pytest.raises(PromptError, match="does not exist any more: a run keeps only its last states"):
        server.run(training(8, **more, save_name="resume/mug", continue_from=offered[0]))
    with pytest.raises(PromptError, match="has 8 steps behind it already"):
        server.run(training(8, **more, save_name="resume/mug", continue_from="newest state"))

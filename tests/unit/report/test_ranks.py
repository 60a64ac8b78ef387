"""What the report says of a LoRA: places, ranks, sizes, and nothing of a stranger's markup."""

from __future__ import annotations

import json
import random
import unicodedata
from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_names import document, experts, flux, text_encoder, unet, waves

from lora2.files.document import LoraDocument
from lora2.method.factors import Factors
from lora2.method.svd import energy_rank, squared_singular_values
from lora2.report.layer_names import parse_layer_name
from lora2.report.markdown import markdown
from lora2.report.ranks import build_report
from lora2.util.errors import LoraError
from lora2.util.text import clean, escape_markdown, format_size

GIB = 2**30

PLACES = [
    (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_3_attn1_to_q",
        "UNet",
        "down 1.0",
        3,
        "attn1 q",
    ),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_9_ff_net_0_proj", "UNet", "mid", 9, "ff in"),
    ("lora_unet_up_blocks_0_resnets_2_time_emb_proj", "UNet", "up 0.2", None, "res time"),
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "UNet", "input 4", 0, "attn1 q"),
    ("diffusion_model.middle_block.1.transformer_blocks.2.attn2.to_out.0", "UNet", "middle", 2, "attn2 o"),
    ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "UNet", "input 4", 0, "attn1 q"),
    (
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.processor.to_v_lora",
        "UNet",
        "up 1.2",
        0,
        "attn1 v",
    ),
    ("diffusion_model.double_blocks.0.img_attn.qkv", "", "double 0", None, "img attn qkv"),
    ("lora_unet_double_blocks_0_txt_mlp_2", "", "double 0", None, "txt mlp out"),
    ("diffusion_model.single_blocks.12.linear1", "", "single 12", None, "linear1"),
    ("transformer.transformer_blocks.0.attn.to_q", "", "block 0", None, "attn q"),
    ("transformer.transformer_blocks.0.attn.add_k_proj", "", "block 0", None, "add attn k"),
    ("transformer.single_transformer_blocks.37.proj_mlp", "", "single 37", None, "mlp in"),
    ("diffusion_model.blocks.3.cross_attn.v", "", "block 3", None, "cross v"),
    ("diffusion_model.joint_blocks.3.context_block.attn.qkv", "", "joint 3", None, "ctx attn qkv"),
    ("diffusion_model.layers.3.feed_forward.w1", "", "layer 3", None, "ff w1"),
    ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "text encoder 1", "layer 0", None, "self q"),
    ("text_encoder_2.text_model.encoder.layers.11.mlp.fc2", "text encoder 2", "layer 11", None, "mlp out"),
    ("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0", "text encoder 3", "layer 0", None, "ff wi_0"),
    ("diffusion_model.final_layer.linear", "", "out", None, "final layer linear"),
    ("diffusion_model.time_embed.0", "", "in", None, "time embed 0"),
    ("model.layers.3.experts.17.w1", "", "layer 3", None, "experts 17 w1"),
    ("anything", "", "other", None, "anything"),
]


@pytest.mark.parametrize(("name", "part", "block", "unit", "projection"), PLACES)
def test_names_of_all_styles_are_understood(
    name: str, part: str, block: str, unit: int | None, projection: str
) -> None:
    where = parse_layer_name(name)
    assert (where.part, where.block, where.unit, where.projection) == (part, block, unit, projection)


@pytest.mark.parametrize("layers", [unet("sd15"), unet("sdxl"), unet("koala"), flux()])
def test_layers_stand_in_the_order_of_the_network(layers: list[tuple[str, int, int]]) -> None:
    """The lists here are written in that order; a file holds them in any."""
    expected = list(dict.fromkeys(parse_layer_name(name).block for name, _, _ in layers))
    shuffled = random.Random(1).sample(layers, len(layers))
    report = build_report(document(shuffled, 4), "x")
    assert list(dict.fromkeys(layer.block for layer in report.layers)) == expected


def test_blocks_are_counted_not_spelt() -> None:
    """Block 10 follows block 9, input comes before middle, the model before its text encoders."""
    blocks = ["input_blocks.10.1.x", "output_blocks.2.0.x", "input_blocks.9.1.x", "middle_block.1.x"]
    report = build_report(document([(name, 4, 4) for name in ["lora_te1_layers_0_q", *blocks]], 2), "x")
    assert [layer.block for layer in report.layers] == [
        "input 9",
        "input 10",
        "middle",
        "output 2",
        "layer 0",
    ]


def test_sizes_of_sdxl_are_those_of_the_paper() -> None:
    """1,451,520 parameters per unit of rank; rank 512 in float32 is 2.77 GiB, mean rank 74 is 0.40 GiB."""
    report = build_report(document(unet("sdxl"), 74, torch.float32), "sdxl")
    assert len(report.layers) == 560
    assert sum(layer.cost for layer in report.layers) == 1_451_520
    assert report.uniform_bytes[512] / GIB == pytest.approx(2.77, abs=0.005)
    assert report.bytes / GIB == pytest.approx(0.40, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_rank_for_all_weighs_what_the_table_says(dtype: torch.dtype) -> None:
    report = build_report(document(unet("koala"), 16, dtype), "x")
    assert report.bytes == report.uniform_bytes[16]
    assert (report.min_rank, report.mean_rank, report.max_rank) == (16, 16, 16)
    assert report.dtype == str(dtype).removeprefix("torch.")


def test_mean_rank_is_the_one_rank_of_the_same_size() -> None:
    report = build_report(document(flux(), waves), "x")
    cost = sum(layer.cost for layer in report.layers)
    # One rounding in float64.
    assert report.mean_rank * cost * report.number_bytes == pytest.approx(report.bytes, rel=1e-12)


def test_convolutions_count_their_kernel() -> None:
    layer = Factors(torch.zeros(8, 2, 1, 1), torch.zeros(2, 4, 3, 3))
    report = build_report(LoraDocument({"lora_unet_conv_in": layer}, {"lora_unet_conv_in": "kohya"}), "x")
    assert (report.layers[0].d_in, report.layers[0].d_out, report.layers[0].parameters) == (36, 8, 88)


def test_layers_left_out_of_the_file_are_rank_zero() -> None:
    """Our metadata names them; what it says of shapes is believed only where it is one."""
    doc = document(unet("koala")[:2], 4)
    entry = {"rank": 0, "nu": None, "target": None, "shape": [640, 2048], "order": "singular"}
    odd = {**entry, "shape": ["a"]}
    layers: dict[str, Any] = {unet("koala")[5][0]: entry, "x": odd}
    doc.info = {"format": 1, "layers": layers, "training": {}}
    report = build_report(doc, "x")
    assert [layer.rank for layer in report.layers] == [4, 4, 0]
    assert (report.layers[2].d_in, report.layers[2].d_out, report.min_rank) == (2048, 640, 0)


def test_what_is_no_plain_pair_is_counted_beside() -> None:
    doc = document(unet("koala")[:2], 4)
    doc.other = {"a.dora_scale": torch.zeros(640, 1), "b.diff": torch.zeros(10)}
    report = build_report(doc, "x")
    assert (report.other_tensors, report.other_bytes) == (2, 2600)
    assert report.bytes == 2600 + 2 * 4 * 1280 * 2
    assert "2 of 2.6 KB" in markdown(report)


def test_a_file_without_plain_layers_is_refused() -> None:
    with pytest.raises(LoraError, match="no plain LoRA layer"):
        build_report(LoraDocument({}, {}, other={"x.hada_w1_a": torch.zeros(3)}), "x")


@pytest.mark.parametrize("shape", [(24, 32, 6), (3, 32, 6), (24, 4, 6), (8, 9, 1)])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_ranks_in_use_are_those_of_an_svd(shape: tuple[int, int, int], share: float) -> None:
    """Also where the rank is larger than the matrix, and for a scale other than 1."""
    d_out, d_in, rank = shape
    g = torch.Generator().manual_seed(rank)
    down = torch.randn(rank, d_in, generator=g) * torch.logspace(0, -3, rank)[:, None]
    factors = Factors(torch.randn(d_out, rank, generator=g), down, 3.0)
    sigma = torch.linalg.svdvals(factors.up.double() @ factors.down.double())[: min(shape)]
    # The eigenvalues carry rounding of about 1e-15 of the largest.
    torch.testing.assert_close(
        squared_singular_values(factors), sigma.square(), rtol=1e-9, atol=1e-12 * float(sigma[0]) ** 2
    )
    if share < 1:
        kept = sigma.square().cumsum(0) / sigma.square().sum()
        assert energy_rank(factors, share) == int((kept < share).sum()) + 1
    assert energy_rank(factors, 1.0) <= min(shape)


def test_a_layer_that_changes_nothing_uses_no_rank() -> None:
    assert energy_rank(Factors(torch.zeros(4, 3), torch.ones(3, 5)), 0.99) == 0
    assert energy_rank(Factors(torch.ones(4, 3), torch.ones(3, 5), 0.0), 0.99) == 0


def test_ranks_in_use_are_told_in_every_form() -> None:
    """A matrix of rank 1 stored at rank 8."""
    layer = Factors(torch.ones(16, 8), torch.ones(8, 16))
    report = build_report(LoraDocument({"a.0.q": layer}, {"a.0.q": "kohya"}), "x", energy=True)
    assert (report.layers[0].rank, report.layers[0].energy_rank, report.mean_energy_rank) == (8, 1, 1.0)
    assert "1.0 on average hold 99 % of the energy" in markdown(report)
    assert build_report(LoraDocument({"a.0.q": layer}, {"a.0.q": "kohya"}), "x").mean_energy_rank is None


def test_data_is_plain_json() -> None:
    report = build_report(document(unet("koala"), waves), "név\u202e \x00")
    data = json.loads(report.to_json())
    assert data["title"] == "név"
    assert report.to_json().isascii()
    assert len(data["layers"]) == 168
    assert data["layers"][0] == {
        "name": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "part": "UNet", "block": "down 1.0", "projection": "attn1 q", "rank": 1, "d_in": 640, "d_out": 640,
        "parameters": 1280, "energy_rank": None, "nu": None,
    }  # fmt: skip


def test_markdown_has_a_row_per_block_and_a_column_per_projection() -> None:
    report = build_report(document(unet("koala") + text_encoder(1, 2, 64), 8), "a")
    text = markdown(report)
    heads = [f"{attention} {projection}" for attention in ("attn1", "attn2") for projection in "qkvo"]
    assert f"| block | {' | '.join(heads)} | mean |" in text
    assert "| down 1.0 | 8 | 8 | 8 | 8 | 8 | 8 | 8 | 8 | 8.0 |" in text
    assert "### text encoder 1" in text
    assert f"| this LoRA | {format_size(report.bytes)} |" in text


def test_markdown_of_differing_ranks_gives_mean_and_range() -> None:
    layers = [layer for layer in unet("koala")[:16] if layer[0].endswith("attn1_to_q")]
    text = markdown(build_report(document(layers, lambda i: 2 + 2 * i), "a"))
    assert "| down 1.0 | 3.0 (2-4) | 3.0 |" in text


def test_the_training_is_told_without_paths() -> None:
    doc = document(unet("koala")[:1], 4)
    doc.metadata = {
        "ss_sd_model_name": "C:\\people\\me\\base.safetensors",
        "ss_epoch": "3",
        "ss_steps": "None",
    }
    doc.info = {"format": 1, "layers": {}, "training": {"learning_rate": 0.001, "nested": {"a": 1}}}
    facts = dict(build_report(doc, "x").facts)
    assert facts == {"trained on": "base.safetensors", "epoch": "3", "learning rate": "0.001"}


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "a|b\n| --- |\n# title",
    "[click](javascript:alert(1)) ![i](http://evil.example/x.png)",
    "https://evil.example www.evil.example <a@b.c>",
    "`code` **bold** _it_ ~~no~~ $x$ \\",
    "\u202egnp.exe \u200b\x1b[31m \x00 \u2028 \ud800",
    "z" * 5_000_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_strangers_words_stay_words(text: str) -> None:
    """In names, title, metadata, notes: no tag, no link, no table break, no control character, no end."""
    doc = document([(f"{text}.{i}.{text[:99]}", 4, 4) for i in range(3)], 2)
    doc.metadata = {"ss_base_model_version": text, "ss_network_dim": text}
    doc.info = {"format": 1, "layers": {}, "training": {text: text}}
    doc.notes = [text]
    report = build_report(doc, text)
    shown = markdown(report)
    assert "<" not in shown
    assert "://" not in shown
    assert "](" not in shown.replace("\\](", "")
    assert "www." not in shown
    assert not [c for c in shown if c != "\n" and unicodedata.category(c)[0] == "C"]
    assert len(shown) < 10_000
    table = [line for line in shown.split("### ")[1].splitlines() if line[:1] == "|"]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert len(json.loads(report.to_json())["layers"][0]["name"]) <= 300


def test_thousands_of_layers_stay_readable() -> None:
    report = build_report(document(experts(4000), waves), "x")
    assert len(report.layers) == 4000
    assert len(markdown(report)) < 60_000
    assert "160 blocks and 75 projections; the data lists every layer" in markdown(report)


def test_text_is_cut_at_its_limit() -> None:
    assert clean("a" * 50, 10) == "a" * 9 + "…"
    assert clean("  a\t\nb  ") == "a b"
    assert escape_markdown("a_b & c|d") == "a\\_b &amp; c\\|d"


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (12_345, "12.3 KB"), (999_600, "1 MB"), (2e12, "2000 GB")],
)
def test_sizes_in_words(number: float, words: str) -> None:
    assert format_size(number) == words


def test_notes_of_the_reader_are_handed_on() -> None:
    doc = replace(document(unet("koala")[:1], 4), notes=["Metadata of 1 layer not used."])
    assert build_report(doc, "x").notes == ("Metadata of 1 layer not used.",)

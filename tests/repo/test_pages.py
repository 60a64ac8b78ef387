"""Figures, defaults and links in the hand-written pages, against the code and the kept records."""

from __future__ import annotations

import json
import math
import re
import types
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import tomllib
import torch
from training import pack

from dev import docs
from dev.host import ROOT
from lora2.adapters.layer import module_shape
from lora2.config import LAYER_CHOICES, TrainingConfig
from lora2.method import attention_entropy, importance
from lora2.method.allocation import next_cut_size
from lora2.method.factors import cost
from lora2.method.init import initial_ranks

README, GUIDE, METHOD = ROOT / "README.md", ROOT / "docs" / "training-guide.md", ROOT / "docs" / "method.md"
SUMMARY = ROOT / "docs" / "evidence" / "summary.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GENERATED = (ROOT / "docs" / "evidence" / "README.md", docs.REFERENCE)
README_BYTES = 8192
PICTURE_BYTES = 300_000

# UNets as ComfyUI describes them (comfy/model_detection.py, unet_config_from_diffusers_unet).
_ALL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
}
_XL = {**_ALL, "num_classes": "sequential", "adm_in_channels": 2816, "context_dim": 2048, "num_head_channels": 64}
_SD = {
    **_ALL,
    "num_res_blocks": [2] * 4,
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1.x": {**_SD, "use_linear_in_transformer": False, "context_dim": 768, "num_heads": 8},
    "SD 2.x": {**_SD, "use_linear_in_transformer": True, "context_dim": 1024, "num_head_channels": 64},
    "SDXL": {
        **_XL,
        "num_res_blocks": [2] * 3,
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "use_linear_in_transformer": True,
    },
    "KOALA-700M": {
        **_XL,
        "num_res_blocks": [1] * 3,
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 2, 5],
        "transformer_depth_middle": -2,
        "transformer_depth_output": [0, 0, 2, 2, 5, 5],
        "use_linear_in_transformer": True,
    },
}
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}


def text(path: Path) -> str:
    """A page as one line of words."""
    return re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))


def record(name: str) -> Any:
    """A kept record, by its path below docs/."""
    return json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))


def percent(mean: float, error: float, digits: int) -> str:
    """A difference with its error as the pages write it, halves rounded away from zero."""
    value, spread = (round_half_up(100 * Decimal(repr(x)), Decimal(10) ** -digits) for x in (mean, error))
    return f"{value:+} ± {spread}".replace("-", "−")


def round_half_up(value: Decimal, unit: Decimal) -> Decimal:
    return value.quantize(unit, ROUND_HALF_UP)


# -- links ---------------------------------------------------------------------------------------------------------


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(page: Path) -> None:
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
    for link in (link or source for link, source in found):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link
        assert target.suffix not in (".png", ".jpg") or target.stat().st_size < PICTURE_BYTES, link


def test_paths_in_the_pages_exist() -> None:
    """Files and folders of the repository that README, CONTRIBUTING and the hand-written pages name."""
    tops = ("lora2", "nodes", "dev", "benchmarks", "tests", "web", "locales", "workflows", "docs")
    for page in (path for path in PAGES if path not in GENERATED):
        for name in re.findall(r"`([\w./*-]+)`", page.read_text(encoding="utf-8")):
            if name.split("/")[0] in tops and not re.search(r"NAME|PACKAGE|\*|safetensors", name):
                assert (ROOT / name).exists(), f"{page.name}: {name}"


# -- README --------------------------------------------------------------------------------------------------------


def test_readme_is_short_and_opens_with_a_picture() -> None:
    assert README.stat().st_size <= README_BYTES
    assert README.read_text(encoding="utf-8").split("\n")[2].startswith("<img ")


@pytest.mark.parametrize(
    "page", [README, ROOT / "CONTRIBUTING.md", ROOT / "docs" / "reliability.md"], ids=lambda p: p.name
)
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"(?:`|^)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    assert [c for c in commands if f"\n{c}:" not in makefile] == []


def full_size(name: str) -> torch.nn.Module:
    """A model of a family at its full size, without memory."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    options = {"dtype": torch.float32, "device": "meta", "operations": comfy.ops.disable_weight_init}
    return Flux(**FLUX, **options) if name == "Flux" else UNetModel(**UNETS[name], **options)


@pytest.mark.parametrize("name", [*UNETS, "Flux"])
def test_file_sizes(comfy: Any, name: str) -> None:
    """Attention layers and two bytes per parameter, the defaults."""
    model = types.SimpleNamespace(diffusion_model=full_size(name))
    layers = pack("nodes.comfy.layers").select_layers(model, LAYER_CHOICES[0])
    unit = 2 * sum(cost(module_shape(layer)) for layer in layers.values()) / 1e6
    rank = TrainingConfig().target_rank
    assert f"at target rank {rank} |" in text(GUIDE)
    assert f"| {name} | {len(layers)} | {unit:.2f} | {rank * unit:.1f} MB |" in text(GUIDE)
    if name in ("SDXL", "Flux"):
        assert f"{rank * unit:.0f} MB for {name.replace('Flux', 'FLUX.1')}" in text(README)


def test_defaults_that_the_pages_name() -> None:
    inputs = {name: options for name, _, options, _ in docs.inputs(docs.schemas()["LoRA2_TrainAdaptiveLora"])}
    assert inputs["layers"]["default"] == LAYER_CHOICES[0] == "attention"
    assert inputs["save_dtype"]["default"] == "fp16"
    assert f"{inputs['save_name']['default']}_00001.safetensors" in text(README)
    assert f"`target_rank` ({inputs['target_rank']['default']})" in text(README)
    assert f"Start with {inputs['target_rank']['default']}." in text(GUIDE)
    rate, steps, batch = (inputs[name]["default"] for name in ("learning_rate", "steps", "batch_size"))
    assert f"The defaults, {rate:g} and {steps} steps at batch {batch}," in text(GUIDE)
    assert f"every `state_every` steps ({inputs['state_every']['default']})" in text(ROOT / "docs" / "resuming.md")
    assert f"last `states_kept` states ({inputs['states_kept']['default']})" in text(ROOT / "docs" / "resuming.md")


def test_minutes_in_the_readme() -> None:
    """600 steps at the measured medians; SDXL's first figure is a whole run."""
    families, speed = record("benchmarks/families.json"), record("benchmarks/speed.json")
    ms = {row["model"]: row["ms"] for row in families["rows"]}
    by_work = {row["work"]: row for row in speed if row["name"] == "ours"}
    low, flux = (
        by_work[work]
        for work in (
            "SDXL 1024², batch 1, checkpointing, 8 GB allowed",
            "Flux 12 B, fp8, 1024², batch 1, checkpointing, 24 GB allowed",
        )
    )
    main = by_work["SDXL 1024², batch 1, attention, rank 64"]

    def minutes(step: float) -> str:
        return f"{600 * step / 60_000:.1f}"

    (whole,) = families["whole_runs"]
    assert whole["steps"] == TrainingConfig().steps == 600
    page = text(README)
    ckpt = f"ckpt, {low['peak_gib']:.1f} GiB"
    usual = f"{main['peak_gib']:.1f} GiB"
    times = f"{whole['seconds'] / 60:.1f} (ckpt: {minutes(low['ms'])})"
    assert f"| SDXL, bf16 | 4.8 GiB | {ckpt} | {ckpt} | {usual} | {usual} | {times} |" in page
    parameters = {row["model"]: row["parameters_b"] for row in families["rows"] if "parameters_b" in row}
    for model in ("FLUX.1", "FLUX.2 klein 4B", "Z-Image"):
        weights = f"{parameters[model] * 2e9 / 2**30:.1f} GiB"
        assert f"| {model}, bf16 | {weights} | – | – | – | – | {minutes(ms[model])} |" in page
    weights = f"{parameters['FLUX.1'] * 1e9 / 2**30:.1f} GiB"
    assert f"| FLUX.1, fp8 | {weights} | – | – | – | ckpt, {flux['peak_gib']:.1f} GiB | {minutes(flux['ms'])} |" in page


def test_families_in_the_notes() -> None:
    notes = text(ROOT / "docs" / "benchmarks" / "notes.md")
    for found in record("benchmarks/families.json")["rows"]:
        size = f", {found['parameters_b']:g} B" if "parameters_b" in found else ""
        times = f"{found['limit_ms']} ms | {found['ms']} ms | {found['ms'] / found['limit_ms']:.2f}"
        assert f"| {found['model']}{size} | {found['rank']} | {times} |" in notes


# -- results -------------------------------------------------------------------------------------------------------


def against_plain(pictures: int, rank: int, key: str) -> tuple[float, float]:
    """Relative difference of `key`, LoRA² against a plain LoRA: mean over subjects and 1.96 standard errors."""
    points = {(p["method"], p["subject"]): p[key] for p in record("evidence/pareto.json")["points"]
              if (p["pictures"], p["rank"]) == (pictures, rank)}  # fmt: skip
    subjects = {subject for _, subject in points}
    found = [points["settling", s] / points["fixed", s] - 1 for s in subjects]
    return mean(found), 1.96 * stdev(found) / math.sqrt(len(found))


COLUMNS = ((24, 4), (24, 8), (5, 8))


def control(arm: str, against: str) -> list[tuple[float, float]]:
    """A control's differences, by column."""
    rows = {(r["pictures"], r["rank"]): r for r in record("evidence/controls.json")["rows"]
            if (r["arm"], r["against"]) == (arm, against)}  # fmt: skip
    return [(rows[column]["mean"], rows[column]["error"]) for column in COLUMNS]


def row(title: str, cells: list[tuple[float, float]], digits: int) -> str:
    """A table's row."""
    return f"| {title} | {' | '.join(percent(*cell, digits) + ' %' for cell in cells)} |"


def test_results_in_the_readme() -> None:
    page = text(README)
    gains = [against_plain(*column, "loss") for column in COLUMNS]
    assert row("LoRA² against a plain LoRA", gains, 1) in page
    forgotten = [against_plain(*column, "drift") for column in COLUMNS]
    assert row("forgetting: loss on other pictures, LoRA² against a plain LoRA", forgotten, 1) in page
    one_rank = "LoRA² with every layer cut to one rank, against a plain LoRA"
    assert row(one_rank, control("one rank", "plain"), 1) in page
    assert row("LoRA² against the same LoRA with every layer cut to one rank", control("ours", "one rank"), 1) in page
    assert f"{-100 * gains[1][0]:.1f}–{-100 * gains[0][0]:.1f} % below" in page
    assert f"{100 * forgotten[0][0]:.0f}–{100 * forgotten[1][0]:.0f} % higher" in page


def test_controls_agree_with_the_records() -> None:
    """The controls' own comparison with a plain LoRA is that of the records within half its error."""
    for column, (value, error) in zip(COLUMNS, control("ours", "plain"), strict=True):
        assert abs(against_plain(*column, "loss")[0] - value) < error / 2


def test_controls_in_the_pages() -> None:
    for page, default in ((METHOD, "default"), (SUMMARY, "default")):
        assert row(f"{default} against a plain LoRA", control("ours", "plain"), 2) in text(page)
        assert row("every layer cut to one rank, against a plain LoRA", control("one rank", "plain"), 2) in text(page)
    profile = "plain LoRA with our mean ranks from other subjects, against a plain LoRA"
    assert row(profile, control("profile", "plain"), 2) in text(METHOD)
    assert row("default against every layer cut to one rank", control("ours", "one rank"), 2) in text(METHOD)


def test_comparisons_in_the_pages() -> None:
    """Mean differences and counts of subjects, as results.json has them."""
    results, summary, readme = record("evidence/results.json")["pareto"], text(SUMMARY), text(README)

    def less(found: dict[str, Any]) -> str:
        return f"{-100 * found['difference']:.1f} %"

    for pictures in (24, 5):
        found = results[f"pictures_{pictures}"]
        fixed, resized, energy = found["fixed"], found["resized"], found["allocated"]
        pairs = f"{found['pairs_better']} of {found['pairs']}"
        assert f"| {pictures} | −{less(fixed)} | {pairs} | {fixed['subjects_beaten']} of 10 (goal: 9" in summary
        beaten = f"{resized['subjects_beaten']} of 10"
        assert f"| {pictures} | −{less(resized)}, {beaten}" in summary
        assert f"| −{less(energy)}, {energy['subjects_beaten']} of 10 |" in summary
    both = [less(results[f"pictures_{pictures}"]["resized"]) for pictures in (24, 5)]
    assert f"{both[0]} lower in the mean with 24 pictures, {both[1]} with 5" in readme


# -- method --------------------------------------------------------------------------------------------------------


def ablation(setting: str, change: str) -> str:
    """A row of the ablations with 24 pictures, as the pages write it."""
    rows = record("evidence/ablations.json")["rows"]
    found = [r for r in rows if (r["pictures"], r["setting"], str(r["change"])) == (24, setting, change)]
    assert len(found) == 1, (setting, change)
    return percent(found[0]["difference"], found[0]["error"], 2)


@pytest.mark.parametrize(
    ("setting", "change", "title"),
    [
        ("rank_hold", "1 (ranks never adapt)", "ranks frozen until the first cut"),
        ("rank_hold", "0.0", "no hold (`rank_hold` 0)"),
        ("first position", "1", "components counted from 1"),
        ("gain of Λ", "none", "no gain"),
        ("init", "paper", "`init` = `paper`"),
        ("what a cut goes by", "energy alone", "cut by energy alone (s_ℓ = 1)"),
        ("min_rank", "1", "`min_rank` 1"),
        ("learning rate before the last cut", "as given", "learning rate without size factor"),
        ("weight_decay", "0.0", "no weight decay"),
    ],
)
def test_ablations_in_the_method_page(setting: str, change: str, title: str) -> None:
    assert f"| {title} | {ablation(setting, change)} % |" in text(METHOD)


def test_the_sentence_about_learned_ranks() -> None:
    frozen = ablation("rank_hold", "1 (ranks never adapt)")
    for page in (README, METHOD, SUMMARY):
        assert f"{frozen} %" in text(page)


def test_figures_of_the_method_page() -> None:
    page, defaults = text(METHOD), TrainingConfig()
    c = importance.mass_constant(0.9)
    counted_from_1 = sum(math.exp(-c / 8 * j) * -math.expm1(-c / 8) for j in range(1, 9))
    assert f"would hold only {counted_from_1:.3f} of it at q = 0.9" in page
    assert f"would move the rank by {512**2 / c * 1e-4:.0f}." in page
    start = importance.paper_down_std(importance.kept_energy(64, c / 64))
    assert f"at D = 64 it is {start:.1f}." in page
    for rank in (16, 64, 256):
        gain = importance.gain(rank, importance.kept_energy(rank, c / rank))
        first, last = (gain * importance.importance(torch.tensor([0.0, rank - 1.0]), torch.tensor(c / rank))).tolist()
        assert (round(first), round(last, 1)) == (2, 0.2)
        assert rank != 16 or f"about {gain:.0f} at rank 16" in page
    assert "from about 2 at the first component to about 0.2 at the last" in page
    assert f"first {100 * defaults.rank_hold:.0f} % of the steps" in page
    most = attention_entropy.MAX_QUERIES
    counted = len(range(0, most + 1, math.ceil((most + 1) / most)))
    assert f"At most {most} queries per block count" in page
    assert f"{most + 1} queries count as {counted}" in page
    assert f"every {defaults.sync_every} steps" in page
    assert "Three cuts (`settle_cuts`) follow at 15, 30 and 45 % of the steps (`settle_at` is the last)." in page
    assert [step / defaults.steps for step in defaults.cut_steps] == [0.15, 0.3, 0.45]
    sizes = [32 * 100]
    for remaining in (2, 1, 0):
        sizes.append(next_cut_size(sizes[-1], 8 * 100, remaining))
    assert f"from rank 32 to 8 over {sizes[1] / 100:.1f} and {sizes[2] / 100:.1f}." in page
    assert sizes[3] == 8 * 100
    assert "Layers start at four times the target, at least 16 (`initial_rank`)." in page
    assert [initial_ranks(target, [512], defaults) for target in (2, 4, 8, 32)] == [[16], [16], [32], [128]]


def test_adams_bound_in_the_method_page() -> None:
    """Max |m̂| / √v̂ for β = (0.9, 0.99), by Cauchy and Schwarz, as the number of steps grows."""
    from lora2.training.optimizer import BETAS

    first, second = BETAS
    bound = (1 - first) / math.sqrt(1 - second) / math.sqrt(1 - first**2 / second)
    assert f"with β = ({first}, {second}) is {bound:.2f} times that" in text(METHOD)


def test_the_automatic_size() -> None:
    values: dict[str, Any] = {"target_rank": 32, "settle_keep": 0.98}
    for page in (README, GUIDE):
        assert all(re.search(rf"`{name}`( to)? {value}\b", text(page)) for name, value in values.items())
    assert initial_ranks(values["target_rank"], [512], TrainingConfig(**values)) == [128]
    assert initial_ranks(values["target_rank"], [512], TrainingConfig(**values, initial_rank=64)) == [64]
    assert TrainingConfig(**values).keep_share == 0.98
    assert TrainingConfig(**values, budget_mb=1.0).keep_share == 1, "a budget is filled"


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"## {project['project']['version']} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    floor = project["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert floor in text(README)

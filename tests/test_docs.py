"""What README, method page and help pages say, against the code; and the help pages where ComfyUI's frontend asks for them."""

from __future__ import annotations

import math
import re
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from training import pack

from dev import docs
from dev.host import ROOT
from dev.server import ComfyServer
from lora2.adapters.layer import module_shape
from lora2.config import LAYER_CHOICES, TrainingConfig
from lora2.method import attention_entropy, importance
from lora2.method.allocation import next_cut_size
from lora2.method.factors import cost
from lora2.method.init import initial_ranks

README = ROOT / "README.md"
METHOD = ROOT / "docs" / "method.md"
WORDS = "See python -m dev.docs."

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
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", docs.documents(), ids=lambda path: path.name)
def test_tables_say_what_the_nodes_say(page: Path) -> None:
    assert docs.render(text(page), docs.schemas()) == text(page), WORDS


@pytest.mark.parametrize("page", docs.documents(), ids=lambda path: path.name)
def test_every_input_and_output_is_in_a_table(page: Path) -> None:
    nodes = [page.stem] if page.stem in docs.NODES else list(docs.NODES)
    tables = [(m[2], m[3]) for m in docs.BLOCK.finditer(text(page))]
    for node in nodes:
        kinds = {"inputs", "outputs"}
        kinds |= {"advanced"} if any(o.get("advanced") for _, _, o, _ in docs.inputs(docs.schemas()[node])) else set()
        assert sorted(kind for kind, name in tables if name == node) == sorted(kinds)


def test_the_tables_come_from_what_the_server_says(server: ComfyServer) -> None:
    for node, info in docs.schemas().items():
        assert docs.texts(server.object_info(node)) == docs.texts(info)


def help_address(server: ComfyServer, node: str) -> str:
    """Where the frontend (1.47) looks for help: the pack's folder is the second part of the node's python module."""
    module = server.object_info(node)["python_module"]
    assert module.startswith("custom_nodes.")
    return f"{server.url}/extensions/{module.split('.')[1].split('@')[0]}/docs/{node}"


@pytest.mark.parametrize("node", docs.NODES)
def test_the_frontend_finds_the_help_page(server: ComfyServer, node: str) -> None:
    """It asks for a page in its language first, then for the one without; HTML in the place of either counts as none."""
    address = help_address(server, node)
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(f"{address}/en.md", timeout=30)  # noqa: S310 (our own server)
    assert missing.value.code == 404
    with urllib.request.urlopen(f"{address}.md", timeout=30) as reply:  # noqa: S310
        assert reply.status == 200
        assert "text/html" not in reply.headers["Content-Type"]
        page = reply.read().decode()
    assert page == text(docs.HELP / f"{node}.md")
    assert page.startswith(f"# {docs.schemas()[node]['display_name']}\n")


def test_help_pages_are_those_of_the_nodes() -> None:
    assert {path.stem for path in docs.HELP.iterdir()} == set(docs.NODES)


def full_size(name: str) -> torch.nn.Module:
    """A model of a family at its full size, without memory."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    options = {"dtype": torch.float32, "device": "meta", "operations": comfy.ops.disable_weight_init}
    return Flux(**FLUX, **options) if name == "Flux" else UNetModel(**UNETS[name], **options)


@pytest.mark.parametrize("name", [*UNETS, "Flux"])
def test_sizes_in_the_readme(comfy: Any, name: str) -> None:
    """Attention layers, the default, at the default's two bytes per parameter."""
    model = types.SimpleNamespace(diffusion_model=full_size(name))
    layers = pack("nodes.comfy.layers").select_layers(model, LAYER_CHOICES[0])
    unit = 2 * sum(cost(module_shape(layer)) for layer in layers.values()) / 1e6
    rank = TrainingConfig().target_rank
    assert f"at target rank {rank} |" in text(README)
    assert f"| {name} | {len(layers)} | {unit:.2f} | {rank * unit:.1f} MB |" in text(README)


def test_the_defaults_that_the_readme_counts_on() -> None:
    inputs = {name: options for name, _, options, _ in docs.inputs(docs.schemas()["LoRA2_TrainAdaptiveLora"])}
    assert inputs["layers"]["default"] == LAYER_CHOICES[0] == "attention"
    assert inputs["save_dtype"]["default"] == "fp16"
    assert f"{inputs['save_name']['default']}_00001.safetensors" in text(README)
    assert f"Start with {inputs['target_rank']['default']}." in text(README)


def test_figures_of_the_method_page() -> None:
    page, defaults = text(METHOD).replace("\n", " "), TrainingConfig()
    c = importance.mass_constant(0.9)
    counted_from_1 = sum(math.exp(-c / 8 * j) * -math.expm1(-c / 8) for j in range(1, 9))
    assert f"hold only {counted_from_1:.3f} of it at q = 0.9" in page
    assert f"move the rank by {512**2 / c * 1e-4:.0f}." in page
    start = importance.paper_down_std(importance.kept_energy(64, c / 64))
    assert f"at D = 64 it is {start:.1f}." in page
    for rank in (16, 64, 256):
        gain = importance.gain(rank, importance.kept_energy(rank, c / rank))
        first, last = (gain * importance.importance(torch.tensor([0.0, rank - 1.0]), torch.tensor(c / rank))).tolist()
        assert (round(first), round(last, 1)) == (2, 0.2), "about 2 at the first position and about 0.2 at the last"
        assert rank != 16 or f"about {gain:.0f} at rank 16" in page
    assert "from about 2 at the first position to about 0.2 at the last" in page
    assert f"first {defaults.rank_hold:.0%} of the steps".replace("%", " %") in page
    assert f"at most {attention_entropy.MAX_QUERIES} queries" in page
    assert f"every {defaults.sync_every} steps" in page
    assert "In three cuts (`settle_cuts`), at 15, 30 and 45 % of the steps (`settle_at` is the last)" in page
    assert [step / defaults.steps for step in defaults.cut_steps] == [0.15, 0.3, 0.45]
    sizes = [32 * 100]
    for left in (2, 1, 0):
        sizes.append(next_cut_size(sizes[-1], 8 * 100, left))
    assert f"From rank 32 to 8, that is over {sizes[1] / 100:.1f} and {sizes[2] / 100:.1f}." in page
    assert sizes[3] == 8 * 100
    assert "Layers start at four times the target, at least 16 (`initial_rank`)." in page
    assert [initial_ranks(target, [512], defaults) for target in (2, 4, 8, 32)] == [[16], [16], [32], [128]]


def test_the_recipe_without_a_rank() -> None:
    told: dict[str, Any] = {"target_rank": 32, "settle_keep": 0.98}
    for page in (README, docs.HELP / "LoRA2_TrainAdaptiveLora.md"):
        words = text(page).replace("\n", " ")
        assert all(re.search(rf"`{name}`( to)? {value}\b", words) for name, value in told.items())
    assert initial_ranks(told["target_rank"], [512], TrainingConfig(**told)) == [128]
    assert initial_ranks(told["target_rank"], [512], TrainingConfig(**told, initial_rank=64)) == [64]
    assert TrainingConfig(**told).keep_share == 0.98
    from benchmarks.evidence.hero import LEARNED

    assert told.items() <= LEARNED.items(), "the picture is drawn with it"
    assert TrainingConfig(**told, budget_mb=1.0).keep_share == 1, "as the page says: a budget is filled"


@pytest.mark.parametrize("page", [README, METHOD, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_and_pictures_exist(page: Path) -> None:
    found = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text(page))
    local = [link or source for link, source in found if "://" not in link + source]
    assert all((page.parent / link).exists() for link in local)
    for picture in (link for link in local if link.endswith((".png", ".jpg"))):
        assert (page.parent / picture).stat().st_size < 300_000


def test_readme_opens_with_a_picture_and_names_real_commands() -> None:
    readme, makefile = text(README), text(ROOT / "Makefile")
    assert readme.split("\n")[2].startswith("<img ")
    commands = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert commands
    assert all(f"\n{command}:" in makefile for command in commands)


def test_versions_agree() -> None:
    project = tomllib.loads(text(ROOT / "pyproject.toml"))
    assert f"## {project['project']['version']} " in text(ROOT / "CHANGELOG.md")
    floor = project["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert floor in text(README)

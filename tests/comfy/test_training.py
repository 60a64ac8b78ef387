"""Training on real ComfyUI models of every family, and the file as ComfyUI's own loader reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training import WIDTHS, captions, latents, pack

Train = Callable[..., Any]


@pytest.fixture
def inside_a_node() -> Iterator[None]:
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


def run(model: Any, family: str, **changes: Any) -> Any:
    """A short run through the host bridge, the file in float32."""
    session = pack("nodes.runs.run")
    request = {
        k: changes.pop(k) for k in ("layers", "include", "exclude", "checkpointing", "precision") if k in changes
    }
    request = {"layers": "attention", "save_name": "t/subject", "save_dtype": "fp32", **request}
    config = {
        "steps": 4,
        "batch_size": 2,
        "target_rank": 4,
        "learning_rate": 1e-2,
        "sync_every": 2,
        "min_snr_gamma": 5.0,
        **changes,
    }
    data = {"latents": latents(family), "conditioning": captions(family, 3)} | {
        k: config.pop(k) for k in ("latents", "conditioning") if k in config
    }
    return session.train(
        model,
        data["latents"],
        data["conditioning"],
        pack("lora2.config").TrainingConfig(**config),
        session.RunRequest(**request),
    )


def weights(patcher: Any) -> dict[str, torch.Tensor]:
    """The diffusion model's weights as they are now, copied."""
    return {k: v.clone() for k, v in patcher.model.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "settle_at"),
    [*((family, 0.5) for family in WIDTHS), ("flux", 1.0)],
    ids=[*(f"{family}-pruned" for family in WIDTHS), "flux-paper's form"],
)
def test_every_family_trains_and_its_file_is_exact_in_comfyui(
    family: str, settle_at: float, comfy: Any, small_model: Callable[[str], Any], lora_folder: Path, inside_a_node: None
) -> None:
    """ComfyUI's loader gives base + ΔW of training; the base model stays bit for bit what it was."""
    model = small_model(family)
    before = weights(model)
    trained = run(model, family, steps=2, settle_at=settle_at, settle_cuts=1, caption_dropout=0.3)
    assert len(trained.losses) == 2
    assert torch.tensor(trained.losses).isfinite().all()
    after = weights(model)
    assert all(torch.equal(after[k], before[k]) for k in before)

    lora = comfy.utils.load_torch_file(str(trained.path), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    document = pack("lora2.files.document").read(trained.path)
    assert len(patched.patches) == len(document.layers) > 0
    comfy.model_management.load_models_gpu([patched])
    now = weights(patched)
    changed = {k for k in before if not torch.equal(now[k], before[k])}
    assert changed == set(patched.patches)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    for prefix, factors in document.layers.items():
        key = keys[prefix]
        update = factors.up.double().flatten(1) @ factors.down.double().flatten(1)
        expected = before[key].double() + factors.scale * update
        # float32: one rounding in the product's sum, one in the scale, one in the addition.
        error = (now[key].double() - expected).abs().max() / expected.abs().max()
        assert error <= 1e-6
    assert not torch.equal(sampled(patched, family), sampled(model, family)), "the LoRA must be seen in what is sampled"


def sampled(patcher: Any, family: str) -> torch.Tensor:
    """Two steps of ComfyUI's own sampler, finite."""
    import comfy.sample

    noise = torch.randn(1, WIDTHS[family][0], 8, 8, generator=torch.Generator().manual_seed(5))
    text = captions(family, 1, seed=5)[0]
    empty = torch.zeros_like(noise)
    out = comfy.sample.sample(patcher, noise, 2, 1.0, "euler", "normal", text, text, empty, seed=5, disable_pbar=True)
    assert out.isfinite().all()
    return out


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_the_training_forward_equals_the_saved_file_applied(
    family: str,
    comfy: Any,
    small_model: Callable[[str], Any],
    lora_folder: Path,
    inside_a_node: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the last step's network answers is what ComfyUI answers with the file loaded."""
    network_module, session = pack("lora2.adapters.network"), pack("nodes.runs.run")
    answers: list[torch.Tensor] = []
    model = small_model(family)
    finishing = pack("nodes.runs.finish")
    original = finishing.save_trained

    def ask(patcher: Any) -> torch.Tensor:
        g = torch.Generator().manual_seed(7)
        channels, context, pooled = WIDTHS[family]
        extra = {"y": torch.randn(1, pooled, generator=g), "guidance": torch.tensor([3.5])} if family == "flux" else {}
        x = torch.randn(1, channels, 8, 8, generator=g)
        return patcher.model.apply_model(
            x, torch.tensor([0.8]), c_crossattn=torch.randn(1, 7, context, generator=g), **extra
        )

    def listen(trainer: Any, plan: Any) -> Any:
        network = trainer.network
        with network.attached(), torch.no_grad():
            network.refresh()
            answers.append(ask(model))
        return original(trainer, plan)

    monkeypatch.setattr(finishing, "save_trained", listen)
    assert network_module.AdaptiveNetwork is session.AdaptiveNetwork
    trained = run(model, family, learning_rate=3e-2)
    comfy.model_management.load_models_gpu([model])
    plain = ask(model)
    applied = pack("nodes.comfy.apply_lora").apply_lora(model, None, dict(trained.lora), 1.0, 0.0)[0]
    comfy.model_management.load_models_gpu([applied])
    moved = (answers[0] - plain).norm() / plain.norm()
    error = (ask(applied) - answers[0]).norm() / answers[0].norm()
    assert moved > 1e-3, "training must have changed the answer for this test to mean anything"
    assert error < 1e-5, "float32 on both sides, in another order of operations"


def test_checkpointing_gives_the_same_adapter(
    small_model: Callable[[str], Any], lora_folder: Path, inside_a_node: None
) -> None:
    """Recomputing blocks changes nothing, for a model that adds in place too."""
    for family in ("sd15", "flux"):
        on, off = (run(small_model(family), family, checkpointing=choice, settle_cuts=1) for choice in ("on", "off"))
        assert on.losses == pytest.approx(off.losses, rel=1e-5), family
        one, other = (pack("lora2.files.document").parse(r.lora).layers for r in (on, off))
        for name in one:
            # Adam divides by the gradient's own size, so rounding of 1e-7 grows to about 1e-4 of the update in four steps.
            difference = (one[name].delta() - other[name].delta()).norm() / other[name].delta().norm()
            assert difference < 2e-3, (family, name, difference)


def test_a_seed_decides_everything(small_model: Callable[[str], Any], lora_folder: Path, inside_a_node: None) -> None:
    """The same seed gives the same adapter bit for bit, another seed another one; no file is written over."""
    runs = [run(small_model("flux"), "flux", seed=seed) for seed in (3, 3, 4)]
    assert [r.path.name for r in runs] == [
        "subject_00001.safetensors",
        "subject_00002.safetensors",
        "subject_00003.safetensors",
    ]
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(runs[0].lora[k], runs[1].lora[k]) for k in runs[0].lora)
    assert any(not torch.equal(runs[0].lora[k], runs[2].lora[k]) for k in runs[0].lora.keys() & runs[2].lora.keys())


def test_the_file_says_which_weight_decay_the_pictures_chose(
    small_model: Callable[[str], Any], lora_folder: Path, inside_a_node: None
) -> None:
    trained = run(small_model("flux"), "flux")
    assert pack("lora2.files.document").read(trained.path).info["training"]["weight_decay"] == 5.0, "of three pictures"


def test_the_budget_is_met_from_below(
    small_model: Callable[[str], Any], lora_folder: Path, inside_a_node: None
) -> None:
    """The file is never above what was asked, and within 2 % of it."""
    for megabytes in (0.1, 0.3):
        for settle_at in (0.5, 1.0):
            trained = run(small_model("flux"), "flux", budget_mb=megabytes, settle_at=settle_at, initial_rank=64)
            size = trained.path.stat().st_size
            assert 0.98 * megabytes * 1e6 <= size <= megabytes * 1e6, (megabytes, settle_at, size)


@pytest.mark.parametrize(("family", "changes"), [
    ("sd15", {"entropy_weight": 1e-2, "caption_dropout": 0.5, "checkpointing": "on"}),
    ("flux", {"conditioning": captions("flux", 2, tokens=7) + captions("flux", 1, tokens=9), "batch_size": 1}),
], ids=["entropy, dropped captions, checkpointing", "captions of two lengths"])  # fmt: skip
def test_a_share_of_what_was_learned_is_found_on_real_models(
    family: str, changes: dict[str, Any], small_model: Callable[[str], Any], lora_folder: Path, inside_a_node: None,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Pictures of two shapes; the file is smaller than the target's, and not without anything."""
    monkeypatch.setattr(pack("lora2.method.size_search"), "SAMPLES", 4)  # a UNet takes its time on a CPU
    caplog.set_level("INFO", "lora2")
    trained = run(small_model(family), family, settle_keep=0.5, steps=10, target_rank=8, learning_rate=3e-3, **changes)
    [share] = re.findall(r"(\d+) % of the target size is sufficient", caplog.text)
    assert 1 <= int(share) < 90
    layers = pack("lora2.files.document").read(trained.path).layers
    assert sum(f.parameters for f in layers.values()) > 0
    assert len(trained.losses) == 10


def test_each_picture_has_its_own_size_conditioning(small_model: Callable[[str], Any], inside_a_node: None) -> None:
    """SDXL is told every picture's own width and height; a dropped caption too."""
    model_module, dataset = pack("nodes.comfy.model"), pack("nodes.comfy.dataset")
    with torch.inference_mode(False):
        host = model_module.HostModel(small_model("koala"))
        images, texts = dataset.pictures_and_captions(latents("koala"), captions("koala", 3))
        scaled = host.scale_latents(images)
        assert torch.allclose(scaled[0], images[0] * host.model.latent_format.scale_factor)
        with host.training(scaled, texts, model_module.empty_caption(texts, None), 1, "off"):
            sizes = [cond["y"].cond[0, 1280:] for cond in host._captions]
            wide = host._empty_for((1, 4, 8, 12))["y"].cond[0, 1280:]
    assert torch.equal(sizes[0], sizes[1])
    assert not torch.equal(sizes[0], sizes[2])
    assert torch.equal(wide, sizes[2])


def test_captions_of_different_lengths_train_in_one_batch(
    small_model: Callable[[str], Any], lora_folder: Path, inside_a_node: None
) -> None:
    """Flux cannot join texts of different lengths; such samples run apart and still count as one batch."""
    texts = captions("flux", 2, tokens=7) + captions("flux", 1, tokens=9)
    trained = run(small_model("flux"), "flux", conditioning=texts, latents=latents("flux", ((8, 8),) * 3), batch_size=3)
    assert len(trained.losses) == 4


def test_what_comes_from_bucket_nodes_keeps_its_captions(inside_a_node: None, comfy: Any) -> None:
    """ComfyUI's ResolutionBucket gives one batch and one list of captions per shape; picture i keeps caption i."""
    from comfy_extras.nodes_dataset import ResolutionBucket

    given, texts = latents("sd15"), captions("sd15", 3)
    bucketed = ResolutionBucket.execute(given, texts).result
    images, entries = pack("nodes.comfy.dataset").pictures_and_captions(*bucketed)
    for image, entry in zip(images, entries, strict=True):
        match = next(
            i
            for i, d in enumerate(given)
            if d["samples"].shape[1:] == image.shape and torch.equal(d["samples"][0], image)
        )
        assert torch.equal(entry[0], texts[match][0][0])


def test_a_single_caption_counts_for_a_whole_batch_of_pictures(comfy: Any) -> None:
    batches, texts = [{"samples": torch.zeros(count, 4, 8, 8)} for count in (2, 1)], captions("sd15", 2)
    images, entries = pack("nodes.comfy.dataset").pictures_and_captions(batches, texts)
    assert len(images) == len(entries) == 3
    for entry, text in zip(entries, (0, 0, 1), strict=True):
        assert torch.equal(entry[0], texts[text][0][0])

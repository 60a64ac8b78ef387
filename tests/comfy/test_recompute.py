"""Inputs that are recomputed in the backward pass of real ComfyUI models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import captions, latents, pack


@pytest.mark.parametrize(
    ("family", "operations"),
    [("sd15", {"MulBackward0", "SiluBackward0"}), ("flux", {"GeluBackward0", "SiluBackward0"})],
)
def test_training_a_host_model_is_bit_identical(
    family: str,
    operations: set[str],
    small_model: Callable[[str], Any],
    lora_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All layers of a UNet and of a transformer: losses and file with and without recomputation (of all inputs but norms')."""
    found: list[str] = []
    module = pack("lora2.adapters.recompute")
    monkeypatch.delitem(module._RECIPES, "NativeLayerNormBackward0")
    for name, of in module._RECIPES.items():
        monkeypatch.setitem(module._RECIPES, name, lambda node, name=name, of=of: found.append(name) or of(node))
    session, losses, layers = pack("nodes.runs.run"), [], []
    for min_bytes in (0, 10**12):
        monkeypatch.setattr(module, "MIN_BYTES", min_bytes)
        config = pack("lora2.config").TrainingConfig(steps=2, batch_size=1, target_rank=4, learning_rate=1e-3)
        request = session.RunRequest("t/x", "all linear + convolution", save_dtype="fp32", checkpointing="off")
        result = session.train(small_model(family), latents(family), captions(family, 3), config, request)
        losses.append(result.losses)
        layers.append(result.lora)
        assert set(found) == operations
    assert losses[0] == losses[1]
    assert layers[0].keys() == layers[1].keys()
    assert all(torch.equal(value, layers[1][key]) for key, value in layers[0].items())

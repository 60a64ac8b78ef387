"""Inputs that are made again in the backward pass: what they were, and not held in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_network import frozen, pictures, randomise, relative, settings
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from training import captions, latents, pack

from lora2 import inputs
from lora2.inputs import recipe_of
from lora2.network import AdaptiveNetwork

SIZE = 64
"""Rows and columns: in float32 just as large as inputs have to be here."""


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LARGE", 4 * SIZE * SIZE)


# what a host puts before a layer: from a tensor twice as wide
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "a gated unit": lambda wide: wide.chunk(2, dim=-1)[0] * F.gelu(wide.chunk(2, dim=-1)[1]),
    "a gated unit by SiLU": lambda wide: F.silu(wide[..., :SIZE]) * wide[..., SIZE:],
    "a product that is broadcast": lambda wide: wide[..., :SIZE] * wide[:1, SIZE:],
    "SiLU": lambda wide: F.silu(wide[..., :SIZE]),
    "SiLU in place": lambda wide: F.silu(wide[..., :SIZE] + 0, inplace=True),
    "GELU": lambda wide: F.gelu(wide[..., :SIZE]),
    "GELU by tanh": lambda wide: F.gelu(wide[..., :SIZE], approximate="tanh"),
}


def layer_of(kind: str, compute: torch.dtype) -> tuple[nn.Module, AdaptiveNetwork]:
    """An adapted layer for inputs of SIZE × SIZE: linear, linear that others have a hand in, or a convolution."""
    layer = frozen((nn.Conv2d(4, 8, 3, padding=1) if kind == "convolution" else nn.Linear(SIZE, 16)).to(compute))
    plain = None if kind == "linear" else (lambda _module: False)
    network = AdaptiveNetwork({"a.to_q": layer}, settings(initial_rank=8), compute=compute, plain=plain)
    return layer, randomise(network)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear with a hook", "convolution"])
@pytest.mark.parametrize("before", BEFORE)
def test_an_input_is_made_again(
    before: str, kind: str, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and all gradients to the last bit, since the same operation is done on the same numbers; no memory until then."""
    seen: list[list[Tensor | None]] = []
    for large, held in ((inputs.LARGE, False), (10**12, True)):
        monkeypatch.setattr(inputs, "LARGE", large)
        layer, network = layer_of(kind, compute)
        network.refresh()
        wide = pictures(2 * SIZE, 2 * SIZE).to(compute).requires_grad_()
        x = BEFORE[before](wide)
        if kind == "convolution":
            x = x.view(8, 4, SIZE // 4, SIZE // 4)
            x = F.silu(x)  # a view is not what an operation has put out
        storage = StorageWeakRef(x.untyped_storage())
        with network.attached():
            out = layer(x)
        del x
        assert storage.expired() != held
        (out.float() * pictures(*out.shape)).sum().backward()
        network.finish_gradients()
        seen.append([out, wide.grad, network.adapters[0].down.grad, network.adapters[0].up.grad])
    for one, other in zip(*seen, strict=True):
        assert one is not None
        assert other is not None
        assert one.any()
        assert torch.equal(one, other)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_a_norm_is_made_again_for_a_wide_layer(affine: bool, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To float32's rounding: gradients against those with the input kept, 1e-6 of their norm; no memory until then."""
    norm = frozen(nn.LayerNorm(SIZE, elementwise_affine=affine))
    if affine:
        norm.weight.data, norm.bias.data = 1 + pictures(SIZE), pictures(SIZE, seed=2)
    seen = []
    for large in (inputs.LARGE, 10**12):
        monkeypatch.setattr(inputs, "LARGE", large)
        layer = frozen(nn.Linear(SIZE, inputs.WIDE * SIZE - (not wide)))
        network = randomise(AdaptiveNetwork({"a.to_q": layer}, settings(initial_rank=8)))
        network.refresh()
        whole = (3 + pictures(SIZE, SIZE)).requires_grad_()
        x = norm(whole)
        storage = StorageWeakRef(x.untyped_storage())
        with network.attached():
            out = layer(x)
        del x
        assert storage.expired() == (wide and large == inputs.LARGE < 10**12)
        (out * pictures(*out.shape)).sum().backward()
        network.finish_gradients()
        seen.append([whole.grad, network.adapters[0].down.grad, network.adapters[0].up.grad])
    for one, other in zip(*seen, strict=True):
        assert one is not None
        assert other is not None
        assert relative(one, other) <= (1e-6 if wide else 0)


def test_a_norms_coarse_moments_are_not_enough() -> None:
    """On a CPU bfloat16 norms keep them in bfloat16: what was made of them would be off in the third digit."""
    coarse = F.layer_norm(pictures(SIZE, SIZE).bfloat16().requires_grad_(), (SIZE,), torch.ones(SIZE).bfloat16())
    assert recipe_of(coarse, 8 * SIZE) is None


def test_a_convolutions_cast_factor_is_made_again() -> None:
    """Of A in the model's type, what the backward pass needs beyond the factor itself: not a number of it is kept."""
    layer = frozen(nn.Conv2d(4, 8, 3, padding=1).bfloat16())
    network = randomise(AdaptiveNetwork({"a.to_q": layer}, settings(initial_rank=8), compute=torch.bfloat16))
    out = network.adapters[0](pictures(1, 4, 8, 8).bfloat16())
    path, *_ = out.grad_fn.next_functions  # type: ignore[union-attr]
    inner: Any = path[0]
    kept = inner._raw_saved_weight.data
    assert isinstance(kept, inputs.Recipe)
    assert kept.parts[0].data_ptr() == network.adapters[0].down.data_ptr()


def test_what_cannot_be_made_again_is_kept() -> None:
    """A tensor that nothing made, one half of whose making is not kept, that was changed since, or that is small."""
    wide = pictures(SIZE, SIZE).requires_grad_()
    assert recipe_of(F.silu(wide), 8) is not None
    changed = F.silu(wide)
    changed += 1
    others = [wide, wide.detach(), wide * 2, wide * pictures(SIZE, SIZE), wide + wide, F.silu(wide[:8]), F.silu(wide).view(-1)]
    others.append(changed)
    assert not any(recipe_of(x, 8) for x in others)
    with torch.no_grad():
        assert recipe_of(F.silu(wide), 8) is None


def test_a_forward_of_others_is_given_back() -> None:
    """As the host sets around a layer whose weights it changes: ours calls it, and leaves it as it was."""
    layer = frozen(nn.Conv2d(4, 8, 3))
    own = layer.forward

    def twice(x: Tensor) -> Tensor:
        return 2 * own(x)

    layer.forward = twice  # type: ignore[method-assign]
    network = randomise(AdaptiveNetwork({"a.to_q": layer}, settings(initial_rank=8)))
    x = pictures(2, 4, 8, 8)
    with network.attached():
        assert relative(layer(x), 2 * own(x) + network.adapters[0](x)) < 1e-6
    assert vars(layer)["forward"] is twice


def test_a_checkpointed_block_keeps_what_it_is_told_to() -> None:
    """What is kept there is asked for once, in the backward pass: asking earlier would run the block again."""
    calls: list[int] = []
    found: list[object] = []

    def block(x: Tensor) -> Tensor:
        calls.append(1)
        y = F.silu(x)
        found.append(recipe_of(y, 8))
        return y.square().sum()

    checkpoint(block, pictures(SIZE, SIZE).requires_grad_(), use_reentrant=False).backward()
    assert len(calls) == 2
    assert found == [None, None]


def test_a_part_that_is_changed_meanwhile_is_noticed() -> None:
    """By autograd, as if the operation itself had kept it."""
    layer = frozen(nn.Linear(SIZE, 16))
    network = randomise(AdaptiveNetwork({"a.to_q": layer}, settings(initial_rank=8)))
    wide = pictures(SIZE, SIZE).requires_grad_() + 0
    with network.attached():
        out = layer(F.silu(wide))
    wide += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.fixture
def lora_folder(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's LoRA folder, empty."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.mark.parametrize(
    ("family", "made"),
    [("sd15", {"MulBackward0", "SiluBackward0"}), ("flux", {"GeluBackward0", "SiluBackward0"})],
)
def test_training_a_host_model_is_the_same_to_the_last_bit(
    family: str, made: set[str], comfy: Any, lora_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers of a UNet, and of a transformer: losses and the file, whether inputs are kept or made again (but for norms')."""
    from dev import assets

    found: list[str] = []
    module = pack("lora2.inputs")
    monkeypatch.delitem(module._KNOWN, "NativeLayerNormBackward0")
    for name, of in module._KNOWN.items():
        monkeypatch.setitem(module._KNOWN, name, lambda node, name=name, of=of: found.append(name) or of(node))
    session, losses, layers = pack("nodes.host.session"), [], []
    for large in (0, 10**12):
        monkeypatch.setattr(module, "LARGE", large)
        told = pack("lora2.settings").Settings(steps=3, batch_size=1, target_rank=4, learning_rate=1e-3)
        request = session.Request("t/x", "all linear + convolution", save_dtype="fp32", checkpointing="off")
        model = comfy.sd.load_diffusion_model(str(assets.family(family)))
        result = session.train(model, latents(family), captions(family, 3), told, request)
        losses.append(result.losses)
        layers.append(result.lora)
        assert set(found) == made
    assert losses[0] == losses[1]
    assert layers[0].keys() == layers[1].keys()
    assert all(torch.equal(value, layers[1][key]) for key, value in layers[0].items())

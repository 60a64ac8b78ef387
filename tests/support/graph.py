"""Shared by the tests that run the pack's nodes on real models: a node as the graph runs it, and what must stay as it was."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from training import captions, latents, pack

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SHORT = {"steps": 3, "target_rank": 2, "learning_rate": 1e-2, "save_name": "t/mug"}
LISTS = ("latents", "conditioning", "empty_caption")


def run_node(node: Any, **inputs: Any) -> Any:
    """A node's outputs, run as ComfyUI runs it: on a locked copy of the class, in inference mode, with its own defaults."""
    from comfy_api.latest import io

    schema = node.define_schema()
    values = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None} | inputs
    if schema.is_input_list:
        values = {k: v if k in LISTS else [v] for k, v in values.items()}
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "7"}})
    with torch.inference_mode():
        return clone.EXECUTE_NORMALIZED(**values).result


def train(model: Any, family: str = "flux", **inputs: Any) -> Any:
    """(lora, model, ranks, loss, file) of Train Adaptive LoRA; a short run on three small pictures unless told otherwise."""
    data = {"latents": latents(family), "conditioning": captions(family, 3)}
    return run_node(pack("nodes.train").TrainAdaptiveLora, model=model, **(data | SHORT | inputs))


def load(model: Any, lora_name: str, **inputs: Any) -> Any:
    """(model, clip, ranks) of Load Adaptive LoRA."""
    return run_node(pack("nodes.load").LoadAdaptiveLora, model=model, lora_name=lora_name, **inputs)


def random_lora(model: Any, rank: int = 4, target: str = "attention", seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a LoRA for a model under the keys that its family uses, each alpha half the rank."""
    layers_module, shape_of = pack("nodes.comfy.layers"), pack("lora2.adapters.layer").module_shape
    layers = layers_module.select_layers(model.model, target)
    prefixes, style = layers_module.file_prefixes(model.model, list(layers))
    up_suffix, down_suffix = pack("lora2.files.keys").KEY_STYLES[style]
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in layers.items():
        d_out, *inner = shape_of(module)
        tensors[prefixes[name] + up_suffix] = 0.1 * torch.randn(d_out, rank, *[1] * (len(inner) - 1), generator=g)
        tensors[prefixes[name] + down_suffix] = 0.1 * torch.randn(rank, *inner, generator=g)
        tensors[prefixes[name] + ".alpha"] = torch.tensor(rank / 2)
    return tensors


def write_lora(folders: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A LoRA file in ComfyUI's LoRA folder."""
    path = folders / "loras" / name
    save_file(tensors, path, metadata)
    return path


def sample(model: Any, family: str = "flux") -> Tensor:
    """What ComfyUI's own sampler makes of the model in two steps."""
    import comfy.sample

    with torch.inference_mode():
        text = captions(family, 1, seed=5)[0]
        noise = latents(family, ((8, 8),), seed=6)[0]["samples"]
        empty = [[torch.zeros_like(text[0][0]), text[0][1]]]
        return comfy.sample.sample(
            model, noise, 2, 2.0, "euler", "simple", text, empty, torch.zeros_like(noise), disable_pbar=True, seed=1
        )


def patched_weights(model: Any, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """A model's or text encoder's weights with its patches in them, as ComfyUI computes them: those that have patches."""
    import comfy.model_management

    patcher = getattr(model, "patcher", model)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        weights = patcher.model.state_dict()
        found = {k: weights[k].clone() for k in (patcher.patches if names is None else names)}
        patcher.detach()
    return found


def stock(model: Any, name: str, strength: float = 1.0, clip: Any = None, strength_clip: float = 1.0) -> Any:
    """What ComfyUI's LoraLoader gives, or LoraLoaderModelOnly without a text encoder."""
    import nodes

    with torch.inference_mode():
        if clip is None:
            return (*nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength), None)
        return nodes.LoraLoader().load_lora(model, clip, name, strength, strength_clip)


def assert_same_weights(ours: Any, theirs: Any) -> dict[str, Tensor]:
    """The same patched weights bit for bit; returns them."""
    one, other = patched_weights(ours), patched_weights(theirs)
    assert one.keys() == other.keys()
    assert len(one) > 0
    for key, weight in one.items():
        assert torch.equal(weight, other[key]), key
    return one


def updates(patched: Any) -> dict[str, Tensor]:
    """ΔW of every patched weight in float64, from the last patch that was added."""
    found = {}
    for key, patches in patched.patches.items():
        up, down, alpha, *_ = patches[-1][1].weights
        rank = down.shape[0]
        found[key] = (1.0 if alpha is None else alpha / rank) * (up.double().flatten(1) @ down.double().flatten(1))
    return found


def imported(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The pack in a folder, imported as ComfyUI does it, under a name of its own."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


STATES = "output/lora2_states/"


def files_in(folder: Path, states: bool = False) -> set[str]:
    """Every file below a folder, but for the training states in ComfyUI's output folder: those alone if `states`."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    return {name for name in found if name.startswith(STATES) == states}


def refused(model: Any, words: str, folders: Path, family: str = "flux", **inputs: Any) -> str:
    """The sentence with which training is refused; nothing is written, nothing trained, the model stays as it is."""
    with (
        untouched(model, family, sampled=False),
        pytest.raises(pack("lora2.util.errors").LoraError, match=words) as error,
    ):
        train(model, family, **inputs)
    assert files_in(folders) == set()
    message = str(error.value)
    assert message.endswith("."), message
    return message


@contextmanager
def untouched(model: Any, family: str = "flux", sampled: bool = True) -> Iterator[None]:
    """What happens inside must leave the model as it was.

    The same tensors in every slot with the same bits and flags, no hook and no wrapped forward left, ComfyUI out of
    training, and (sampled) the same picture from the stock sampler.
    """
    import comfy.model_management

    picture = sample(model, family) if sampled else None
    before, hooks = _state(model.model), _hooks(model.model)
    copies = {name: tensor.clone() for name, (tensor, _) in before.items()}
    yield
    after = _state(model.model)
    assert after.keys() == before.keys()
    for name, (tensor, flags) in after.items():
        assert tensor is before[name][0], f"{name} is another object"
        assert flags == before[name][1], f"{name} has other flags: {flags}"
        assert torch.equal(tensor, copies[name]), f"{name} has other values"
    assert _hooks(model.model) == hooks
    assert not comfy.model_management.in_training
    if picture is not None:
        assert torch.equal(sample(model, family), picture)


def _state(module: torch.nn.Module) -> dict[str, tuple[Tensor, tuple[Any, ...]]]:
    """Every parameter and buffer with the flags that autograd looks at."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: (t, (t.requires_grad, t.is_inference(), t.is_leaf, t.grad is None)) for name, t in named}


def _hooks(module: torch.nn.Module) -> dict[str, Any]:
    """What could have been left on every module."""
    return {
        name: ([len(getattr(m, kind)) for kind in HOOKS], "forward" in vars(m), m.training)
        for name, m in module.named_modules()
    }


def trouble_at(monkeypatch: pytest.MonkeyPatch, model: Any, call: int, trouble: Callable[[torch.Tensor], Any]) -> None:
    """The model's call of this number meets trouble: a function that raises, or that answers something else."""
    import comfy.model_base

    real, calls = comfy.model_base.BaseModel.apply_model, iter(range(1, 10_000))

    def apply_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        return trouble(answer) if self is model.model and next(calls) == call else answer

    monkeypatch.setattr(comfy.model_base.BaseModel, "apply_model", apply_model)

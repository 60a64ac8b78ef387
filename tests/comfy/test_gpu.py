"""What only a GPU can show: recorded steps do what written ones do, and memory comes back. `make test-gpu`."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import captions, latents, pack

pytestmark = pytest.mark.gpu

STEPS = 32
SHAPES = ((16, 16), (16, 24), (24, 16))


@pytest.fixture
def lora_folder(lora_folder: Path) -> Iterator[Path]:
    """ComfyUI's LoRA folder, empty; tests run as nodes do, in inference mode."""
    with torch.inference_mode():
        yield lora_folder


@pytest.fixture
def model_of(comfy: Any) -> Callable[[str, torch.dtype], Any]:
    """A small model of a family in a type."""
    from dev import assets

    return lambda family, dtype: comfy.sd.load_diffusion_model(
        str(assets.family(family)), model_options={"dtype": dtype}
    )


class Seen:
    """What a run did beside its result: recordings by success, resizes, and ranks at the end."""

    def __init__(self) -> None:
        self.recorded = self.refused = self.resized = 0


def run(model: Any, family: str, graphs: bool = True, shapes: Any = SHAPES[:1] * 3, **told: Any) -> tuple[Any, Seen]:
    """A run of the whole bridge, its steps recorded or not."""
    session, engine, trainer = pack("nodes.runs.run"), pack("lora2.training.cuda_graph"), pack("lora2.training.trainer")
    network = pack("lora2.adapters.network").AdaptiveNetwork
    seen = Seen()
    record, sync, step_runner = engine.GraphStepRunner._record, network.sync_capacities, trainer.step_runner

    def counted(self: Any, work: Any) -> Any:
        out = record(self, work)
        seen.recorded += out is not None
        seen.refused += out is None
        return out

    def watched(self: Any, *given: Any, **more: Any) -> bool:
        changed = sync(self, *given, **more)
        seen.resized += changed
        return bool(changed)

    engine.GraphStepRunner._record, network.sync_capacities = counted, watched
    if not graphs:
        trainer.step_runner = lambda net, loss, _: engine.StepRunner(net, loss)
    request = {k: told.pop(k) for k in ("checkpointing", "precision", "layers") if k in told}
    config = {
        "steps": STEPS, "batch_size": 2, "target_rank": 6, "initial_rank": 12, "learning_rate": 1e-3, "sync_every": 4,
        "rank_learning_rate": 0.05, "rank_weight": 1e-2, **told,
    }  # fmt: skip
    try:
        result = session.train(
            model, latents(family, shapes), captions(family, len(shapes)), pack("lora2.config").TrainingConfig(**config),
            session.RunRequest(
                **{"save_name": "t/x", "layers": "attention", "save_dtype": "fp32", "checkpointing": "off", **request}
            ),
        )  # fmt: skip
    finally:
        engine.GraphStepRunner._record, network.sync_capacities, trainer.step_runner = record, sync, step_runner
    return result, seen


def difference(one: Any, other: Any) -> float:
    """Of two runs' updates, all layers together, relative; 1 where ranks differ."""
    a, b = (pack("lora2.files.document").parse(r.lora).layers for r in (one, other))
    assert a.keys() == b.keys()
    apart = sum(float((a[n].delta() - b[n].delta()).square().sum()) for n in a) ** 0.5
    return apart / sum(float(b[n].delta().square().sum()) for n in b) ** 0.5


CASES = {
    "ranks grow and shrink": {"settle_at": 1.0, "rank_weight": 3.0, "initial_rank": 40, "target_rank": 4},
    "ranks grow": {"settle_at": 1.0, "rank_weight": 3.0, "initial_rank": 4, "target_rank": 40},
    "settled half-way": {},
    "buckets": {"shapes": SHAPES * 2},
    "accumulation and dropped captions": {"accumulation": 2, "caption_dropout": 0.3},
    "checkpointing": {"checkpointing": "on"},
    "plain gradient descent": {"optimizer": "sgd", "learning_rate": 1e-2},
}


# Every case on a transformer in bf16, and those that record most often on a UNet in both types.
RUNS = [(case, "flux", torch.bfloat16) for case in CASES] + [
    (case, "koala", dtype) for case in ("ranks grow and shrink", "buckets") for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("case", "family", "dtype"), RUNS, ids=lambda value: str(value).removeprefix("torch."))
def test_recorded_steps_do_what_written_steps_do(
    case: str, family: str, dtype: torch.dtype, model_of: Callable[..., Any], lora_folder: Path
) -> None:
    """Losses and weights after 32 steps.

    A graph launches the same kernels, but the libraries may choose others while it is recorded, and some add up in no fixed
    order: so the written steps are run twice, and the recorded ones may be as far from them as a few times that, or as rounding
    grows to through 32 steps of Adam, which divides by the gradient's own size.
    """
    told = CASES[case]
    recorded, seen = run(model_of(family, dtype), family, **told)
    written, _ = run(model_of(family, dtype), family, graphs=False, **told)
    again, _ = run(model_of(family, dtype), family, graphs=False, **told)
    assert seen.recorded >= 2
    assert not seen.refused
    if "ranks" in case:
        assert seen.resized
    rounding = 1e-3 if dtype == torch.float32 else 5e-2
    losses = [torch.tensor(r.losses) for r in (recorded, written, again)]
    noise = float(((losses[2] - losses[1]) / losses[1]).abs().max())
    assert float(((losses[0] - losses[1]) / losses[1]).abs().max()) <= max(5 * noise, rounding)
    assert difference(recorded, written) <= max(5 * difference(again, written), 10 * rounding)


def held() -> int:
    """Bytes that tensors hold on the GPU once everything that can go has gone."""
    import comfy.model_management as management

    management.unload_all_models()
    gc.collect()
    management.soft_empty_cache()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


@pytest.mark.parametrize("at", [None, 1, 2, 3, 4, 9])
def test_memory_comes_back_after_training_and_after_a_cancel(
    at: int | None, model_of: Callable[..., Any], lora_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the cancel comes: while libraries warm up, while a step is recorded, while it is replayed."""
    import comfy.model_management as management

    run(model_of("koala", torch.bfloat16), "koala", steps=6)  # libraries take their workspaces, and keep them
    model = model_of("koala", torch.bfloat16)
    weights = {k: v.clone() for k, v in model.model.state_dict().items()}
    before = held()
    if at is not None:
        callback = pack("nodes.runs.step_callback").StepCallback
        live, calls = callback.__call__, []

        def cancel(self: Any, progress: Any) -> None:
            live(self, progress)
            calls.append(progress.step)
            if len(calls) == at:
                raise management.InterruptProcessingException

        monkeypatch.setattr(callback, "__call__", cancel)
        with pytest.raises(management.InterruptProcessingException):
            run(model, "koala")
        assert len(calls) == at
    else:
        run(model, "koala")
    assert all(torch.equal(v.cpu(), weights[k].cpu()) for k, v in model.model.state_dict().items())
    assert held() - before <= 2**20, "a MiB for what libraries keep of a new shape"


class Mixed(nn.Module):
    """A model in bfloat16 that keeps its middle layer in float32, as a denoiser."""

    prediction, sigma_data = "x0", 1.0

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.parts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3)).requires_grad_(False).to(self.device)
        self.parts[0].bfloat16()
        self.parts[2].bfloat16()

    def layers(self) -> dict[str, nn.Module]:
        return {str(i): part for i, part in enumerate(self.parts)}

    def sigma(self, time: Tensor, shifted: bool) -> Tensor:
        return torch.ones_like(time)

    def add_noise(self, sigma: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
        return noise

    def conditions(self, chosen: Sequence[int], shape: torch.Size) -> list[tuple[list[int], Any]]:
        return [(list(range(len(chosen))), {})]

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        x = torch.tanh(self.parts[0](noisy.bfloat16()))
        x = torch.tanh(self.parts[1](x.float()))
        return self.parts[2](x.bfloat16()).float()


def mixed_run(graphs: bool, device: str = "cuda") -> tuple[list[float], list[Tensor]]:
    """Losses and factors of a run on `Mixed`."""
    model = Mixed(device)
    config = pack("lora2.config").TrainingConfig(
        steps=30, learning_rate=3e-3, target_rank=4, initial_rank=8, batch_size=4, sync_every=5
    )
    network = pack("lora2.adapters.network").AdaptiveNetwork(model.layers(), config, model.device, torch.bfloat16)
    g = torch.Generator().manual_seed(1)
    pictures = [torch.randn(6, 32, generator=g) for _ in range(4)]
    trainer = pack("lora2.training.trainer").Trainer(network, model, pictures, config, graphs=graphs)
    losses = trainer.run().losses
    return losses, [f.delta() for f in network.export_factors().values()]


def test_a_float32_layer_in_a_bfloat16_model_learns_in_recorded_steps() -> None:
    """Its gradients reach the sums of the others; as in written steps, to bf16's 8 bits through 30 steps."""
    (losses, deltas), (expected, others) = mixed_run(True), mixed_run(False)
    assert losses == pytest.approx(expected, rel=2e-2)
    for delta, other in zip(deltas, others, strict=True):
        assert bool(delta.any())
        assert float((delta - other).norm() / other.norm()) < 0.2


def test_a_model_that_waits_for_the_gpu_trains_all_the_same_and_the_log_says_so(
    model_of: Callable[..., Any], lora_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a step cannot be recorded: it runs as written, from the first refusal on."""
    caplog.set_level(logging.INFO, "lora2")
    model = model_of("koala", torch.bfloat16)
    first = next(m for m in model.model.diffusion_model.modules() if isinstance(m, nn.Linear))

    def wait(_module: nn.Module, _args: Any, out: Tensor) -> None:
        out.sum().item()

    handle = first.register_forward_hook(wait)
    try:
        result, seen = run(model, "koala", steps=8, settle_at=1.0)  # a cut would begin the update anew
    finally:
        handle.remove()
    assert seen.refused == 1
    assert seen.recorded == 1, "an update, before the model was due"
    assert len(result.losses) == 8
    assert any("cannot be recorded" in r.getMessage() for r in caplog.records)


FIRST = """
import torch
from dev.host import import_comfy
import_comfy()
import comfy.ops
from dev.packs import pack

class Block(torch.nn.Linear):
    def forward(self, x):
        q = super().forward(x).view(1, 64, 2, 64).transpose(1, 2)
        return comfy.ops.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(1, 64, 128)

block = Block(128, 128, device="cuda", dtype=torch.bfloat16)
with pack("nodes.comfy.checkpointing").checkpointed([block]):
    block(torch.randn(1, 64, 128, device="cuda", dtype=torch.bfloat16)).sum().backward()
print("same", bool(block.weight.grad.any()))
"""


def test_a_processs_first_attention_may_lie_in_a_checkpointed_block(comfy: Any) -> None:
    """A text encoder on the CPU leaves it to the model; torch chooses the first one's kernel in a way of its own."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=80, check=False)
    assert "same True" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("checkpointing", ["auto", "off"])
def test_weights_that_wait_in_the_cpus_memory_train_like_those_on_the_gpu(
    checkpointing: str,
    model_of: Callable[..., Any],
    lora_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The host copies them when they are needed, also in recorded steps, and also in a second run, when they are loaded again.

    Losses to float32's rounding through eight steps; then all is as it was. Meanwhile another patcher of the model goes away.
    """
    import comfy.model_management as management

    from benchmarks.sections import left_for_weights

    caplog.set_level(logging.INFO, "lora2")
    streams = getattr(management, "NUM_STREAMS", None)
    told: dict[str, Any] = {"steps": 8, "checkpointing": checkpointing}
    whole, _ = run(model_of("sd15", torch.float32), "sd15", **told)
    assert "are offloaded to the CPU" not in caplog.text
    management.unload_all_models()
    model, network = model_of("sd15", torch.float32), pack("lora2.adapters.network").AdaptiveNetwork
    sync = network.sync_capacities
    monkeypatch.setattr(network, "sync_capacities", lambda *given, **more: (model.clone(), sync(*given, **more))[1])
    for _ in range(2):
        caplog.clear()
        with left_for_weights(0):
            part, seen = run(model, "sd15", **told)
        assert "are offloaded to the CPU" in caplog.text
        assert ("gradient checkpointing is on" in caplog.text) == (checkpointing == "auto")
        assert part.losses == pytest.approx(whole.losses, rel=1e-3)
        assert seen.recorded >= 2
        assert not seen.refused
    assert getattr(management, "NUM_STREAMS", None) == streams

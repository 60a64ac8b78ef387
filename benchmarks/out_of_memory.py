"""Real out-of-memory on a GPU: `python -m benchmarks.out_of_memory`, on whatever CUDA device there is.

The small SD1.x model learns large latents, eight at a time, in less and less memory: torch may take only a part of what a run
without a limit takes (torch.cuda.set_per_process_memory_fraction), so the allocator itself says no. Every run must end with the
same losses, or with our message and what was learned in a file; afterwards a run without a limit must give what the first
one gave, and hold no more memory. Prints a table; ends with an error where one of that does not hold.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import models

SIDE, BATCH, STEPS = 96, 8, 8
SHARES = (1.0, 0.8, 0.5, 0.3, 0.15, 0.05, 0.0)
"""Of the memory that a run without a limit takes beyond the loaded model. With none, what torch has in reserve is taken too."""

CLOSE = 0.02
"""Losses may differ by this share: convolutions in TF32 choose other kernels for other batches."""


@dataclass
class Outcome:
    """How a run ended: its losses, or the message; what it said; bytes that are still held, and the most it took."""

    losses: list[float]
    message: str
    said: list[str]
    held: int
    peak: int


def dataset() -> tuple[list[dict[str, Any]], list[Any]]:
    """Eight random pictures and their captions."""
    import torch

    g = torch.Generator().manual_seed(0)
    pictures = [{"samples": torch.randn(1, 4, SIDE, SIDE, generator=g)} for _ in range(BATCH)]
    return pictures, [[[torch.randn(1, 77, 768, generator=g), {}]] for _ in range(BATCH)]


def run(patcher: Any, **changes: Any) -> Outcome:
    """One training run, as the node starts it."""
    import torch

    session, settings = models.pack("nodes.runs.run"), models.pack("lora2.config").TrainingConfig
    request = session.RunRequest("t/oom", "attention", checkpointing=changes.pop("checkpointing", "auto"))
    said: list[str] = []
    torch.cuda.reset_peak_memory_stats()
    losses, message = [], ""
    with torch.inference_mode():
        try:
            told = settings(steps=STEPS, batch_size=BATCH, learning_rate=1e-3, **changes)
            losses = session.train(patcher, *dataset(), told, request, say=said.append).losses
        except models.pack("lora2.util.errors").LoraError as error:
            message = str(error)
    gc.collect()
    torch.cuda.empty_cache()
    return Outcome(losses, message, said, torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved())


def differs(one: Outcome, other: Outcome) -> float:
    """The largest relative difference between two runs' losses."""
    return max(abs(a / b - 1) for a, b in zip(one.losses, other.losses, strict=True))


@contextmanager
def limited_to(size: int) -> Iterator[None]:
    """While inside, torch may take so many bytes of the GPU."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def filled() -> Iterator[None]:
    """While inside, all is taken that torch may still give: it keeps room beside tensors, which small steps may fit into."""
    import torch

    held = []
    for size in (16 << 20, 2 << 20, (1 << 20) + 512):
        with suppress(torch.cuda.OutOfMemoryError):
            while True:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    try:
        yield
    finally:
        held.clear()


@contextmanager
def lora_folder() -> Iterator[Path]:
    """ComfyUI's LoRA and output folders, elsewhere for a while."""
    import folder_paths

    with tempfile.TemporaryDirectory() as folder:
        loras, output = folder_paths.folder_names_and_paths["loras"], folder_paths.get_output_directory()
        folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
        folder_paths.set_output_directory(str(Path(folder) / "output"))
        try:
            yield Path(folder)
        finally:
            folder_paths.folder_names_and_paths["loras"] = loras
            folder_paths.set_output_directory(output)


def loras(folder: Path) -> list[Path]:
    """The LoRAs in a folder that holds the output folder, with states of runs, too."""
    return [path for path in folder.rglob("*.safetensors") if "output" not in path.relative_to(folder).parts]


def measure(**changes: Any) -> list[dict[str, Any]]:
    """A row for each limit; raises AssertionError where a promise is broken."""
    import comfy.model_management
    import comfy.sd
    import torch

    from dev import assets

    patcher = comfy.sd.load_diffusion_model(str(assets.family("sd15")))
    rows: list[dict[str, Any]] = []
    with lora_folder() as folder:
        first = run(patcher, **changes)
        assert first.losses, first.message
        plenty = run(patcher, **changes)
        assert differs(first, plenty) < CLOSE, "two runs without a limit differ: nothing can be compared here"
        model = plenty.held
        for share in SHARES:
            before = len(loras(folder))
            with limited_to(model + int(share * (plenty.peak - model))):
                comfy.model_management.load_models_gpu([patcher])
                with nullcontext() if share else filled():
                    outcome = run(patcher, **changes)
            files = len(loras(folder)) - before
            worst = differs(outcome, plenty) if outcome.losses else 0.0
            rows.append({"share": share, "files": files, "worst": worst, **vars(outcome)})
            if outcome.losses:
                assert worst < CLOSE, f"losses differ by {worst:.3f} at {share}"
                assert files == 1
            else:
                assert outcome.message.startswith("Memory ran out"), outcome.message
                assert files == ("the LoRA so far is saved" in outcome.message)
            assert not list(folder.rglob("*.partial"))
        comfy.model_management.load_models_gpu([patcher])
        again = run(patcher, **changes)
        assert differs(again, plenty) < CLOSE, "a run after all this differs from the first"
        assert again.held <= plenty.held + (1 << 20), "memory was kept"
    assert not torch.cuda.is_current_stream_capturing()
    return rows


def main() -> None:
    """Print the table."""
    import torch

    models.import_comfy()
    if not torch.cuda.is_available():
        raise SystemExit(
            "This needs a CUDA device: on a CPU, tests/comfy/test_out_of_memory_on_models.py simulates it."
        )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {SIDE} × {SIDE} latents, batch {BATCH}")
    for choices in ({}, {"checkpointing": "off"}, {"on_out_of_memory": "stop"}):
        print(f"\n{choices or 'default settings'}")
        for row in measure(**choices):
            end = row["message"] or row["said"][-1]
            print(f"{row['share']:5.0%}  peak {row['peak'] / 1e6:7.0f} MB  losses within {row['worst']:.4f}  {end}")


if __name__ == "__main__":
    main()

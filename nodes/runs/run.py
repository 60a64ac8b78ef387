"""A training run: plan, train, finish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch

from ...lora2.adapters.network import AdaptiveNetwork
from ...lora2.checkpoints.directory import CheckpointDirectory
from ...lora2.checkpoints.state import State
from ...lora2.config import TrainingConfig
from ...lora2.method.attention_entropy import EntropyProbe
from ...lora2.training.trainer import Trainer
from ...lora2.util.errors import LoraError
from ...lora2.util.memory import OutOfMemory, free_cached_memory, is_out_of_memory
from ..comfy.layers import cross_attention, is_plain
from .fingerprint import model_digests
from .finish import CheckpointWriter, TrainedLora, finish, finish_stopped
from .plan import Plan, make_plan
from .request import RunRequest
from .resume import check_model, environment
from .save import write_unsaved
from .step_callback import StepCallback

__all__ = ["RunRequest", "TrainedLora", "train"]

log = logging.getLogger("lora2")

OUT_OF_MEMORY_AT_START = (
    "Memory ran out before the first step, while the model was loaded and the LoRA laid out. Close other programs that use the "
    "GPU, adapt fewer layers, or lower initial_rank or target_rank."
)


def train(
    patcher: Any,
    latents: Sequence[dict[str, Any]],
    conditioning: Sequence[Any],
    config: TrainingConfig,
    request: RunRequest,
    empty: Sequence[Any] | None = None,
    say: Callable[[str], None] = log.info,
) -> TrainedLora:
    """Check everything, train, and save.

    empty: conditioning that replaces a dropped caption. say: shows a sentence to the user. Whatever stops the run after its first
    step, the LoRA so far is saved. Raises LoraError, OutOfMemory, Diverged, and what else stops the run.
    """
    write_unsaved(say)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return run(make_plan(patcher, latents, conditioning, config, request, empty, say), say)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = str(error) if isinstance(error, LoraError) else OUT_OF_MEMORY_AT_START
    # Only now: the exception kept the tensors of the failed attempt alive. ComfyUI unloads its models in this case too.
    free_cached_memory()
    with torch.inference_mode():  # as in every other node: weights that are moved stay inference tensors
        comfy.model_management.unload_all_models()
    raise OutOfMemory(message)


def run(plan: Plan, say: Callable[[str], None]) -> TrainedLora:
    """Train as planned, and save. Raises LoraError where the loaded model is not that of the run to resume."""
    host, layers, request = plan.host, plan.layers, plan.request
    with host.training(plan.latents, plan.captions, plan.empty_caption, plan.config.batch_size, request.checkpointing):
        weights, patches = model_digests(host.patcher, layers)
        fingerprint = replace(plan.fingerprint, weights=weights, patches=patches)
        made_with = environment(host.device, host.compute)
        start = check_model(plan.start, fingerprint, made_with, plan.config, request.on_difference, layers)
        continued = start.saved.path if start.saved is not None else None
        network = AdaptiveNetwork(layers, start.config, host.device, host.compute, is_plain)
        probe = EntropyProbe(cross_attention(host.model))
        trainer = Trainer(network, host, plan.latents, start.config, probe, notify=say)
        start.apply(trainer)
        learned = trainer.progress.applied
        directory = CheckpointDirectory(plan.states_folder, request.states_kept, plan.file_bytes, continued)
        inputs = {"fingerprint": fingerprint.state(), "environment": State({}, made_with)}
        checkpoints = CheckpointWriter(trainer, directory, inputs, say)
        counts = f"Training {len(layers)} layers on {len(plan.latents)} pictures, {start.config.steps} steps."
        say(" ".join([counts, *start.messages]))
        try:
            trainer.run(StepCallback(network, plan.file, plan.target, say), checkpoints.save, request.state_every)
        except BaseException as reason:
            if trainer.progress.applied == learned:
                raise
            finish_stopped(reason, trainer, plan, checkpoints, say)
        return finish(trainer, plan, checkpoints, say)

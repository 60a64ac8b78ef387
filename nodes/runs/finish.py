"""End of a run, complete or stopped: save the LoRA and the training state, and say where they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...lora2.adapters.prune import final_factors
from ...lora2.checkpoints.directory import CheckpointDirectory
from ...lora2.checkpoints.state import State
from ...lora2.files.document import LoraStateDict
from ...lora2.training.monitor import Diverged
from ...lora2.training.progress import Progress
from ...lora2.training.trainer import Trainer
from ...lora2.util.errors import LoraError
from ...lora2.util.memory import OutOfMemory, free_cached_memory, is_out_of_memory, try_allocating
from .plan import Plan
from .save import save_lora
from .states import NEWEST

MAX_NAMED = 5
"""Skipped steps that a message names."""


@dataclass(frozen=True)
class TrainedLora:
    """Result of a run: the LoRA, its file, the file's name in ComfyUI's list, and the loss of every step that was taken."""

    lora: LoraStateDict
    path: Path
    name: str
    losses: list[float]


class CheckpointWriter:
    """Saves a run's training states. A state that cannot be written is reported and does not stop the run.

    inputs: the parts of a state that do not change in a run.
    """

    def __init__(
        self,
        trainer: Trainer,
        directory: CheckpointDirectory,
        inputs: Mapping[str, State],
        say: Callable[[str], None],
    ) -> None:
        self.trainer, self.directory, self.inputs, self.say = trainer, directory, inputs, say
        self._last: tuple[int, Path] | None = None

    def save(self) -> bool:
        """Save the state of the last completed step, unless it has been saved; whether it is on the disk."""
        step = self.trainer.progress.step
        if self._last is not None and self._last[0] == step and self._last[1].is_file():
            return True
        try:
            path = self.directory.save(self.trainer.state().with_parts(**self.inputs))
        except Diverged:
            raise
        except LoraError as error:
            self.say(str(error))
            return False
        except (OSError, RuntimeError, MemoryError) as error:  # not its message, which may contain a local path
            reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__
            self.say(f"The training state was not saved: {reason}.")
            return False
        self._last = step, path
        return True


def finish(trainer: Trainer, plan: Plan, checkpoints: CheckpointWriter, say: Callable[[str], None]) -> TrainedLora:
    """Save the LoRA and the last training state of a complete run; its older states are removed.

    Raises LoraError where the LoRA cannot be saved in its folder.
    """
    try:
        trained = save_trained(trainer, plan)
    except LoraError as error:
        if not checkpoints.save():
            raise
        advice = f"The training state is saved: choose '{NEWEST}' in continue_from, with more steps."
        raise type(error)(f"{error} {advice}") from error
    if checkpoints.save():
        checkpoints.directory.prune(1)
    say(f"Saved as {trained.name}.{_notes(trainer.progress)}")
    return trained


def finish_stopped(
    reason: BaseException, trainer: Trainer, plan: Plan, checkpoints: CheckpointWriter, say: Callable[[str], None]
) -> NoReturn:
    """Save the LoRA and the training state of a run that `reason` stopped, then raise it: LoraErrors with what was saved.

    Raises LoraError in its place where the LoRA cannot be saved in its folder.
    """
    done = f"Stopped after {trainer.progress.step} of {trainer.config.steps} steps"
    try:
        trained = save_trained(trainer, plan)
    except LoraError as error:
        message = f"{reason} " if isinstance(reason, Exception) else ""
        if checkpoints.save():
            message += f"The training state is saved: choose '{NEWEST}' in continue_from to resume. "
        kind = OutOfMemory if is_out_of_memory(reason) or is_out_of_memory(error) else LoraError
        raise kind(f"{message}{done}. {error}") from reason
    message = f"{done}; the LoRA so far is saved as {trained.name}.{_notes(trainer.progress)}"
    if checkpoints.save():
        message += f" To resume, choose '{NEWEST}' in continue_from."
    say(message)
    if isinstance(reason, LoraError):
        raise type(reason)(f"{reason} {message}") from reason.__cause__
    if is_out_of_memory(reason):
        raise OutOfMemory(f"Memory ran out between two steps. {message}") from reason.__cause__
    raise reason from reason.__cause__


def save_trained(trainer: Trainer, plan: Plan) -> TrainedLora:
    """Save the LoRA; once more with all caches freed where memory runs out. Raises LoraError."""
    for _ in range(2):
        if done := try_allocating(lambda: _save(trainer, plan)):
            return done[0]
        free_cached_memory()
    raise OutOfMemory("Memory ran out twice while the LoRA was saved: it is lost. Close other programs first.")


def _save(trainer: Trainer, plan: Plan) -> TrainedLora:
    network, progress = trainer.network, trainer.progress
    losses = [loss for loss in progress.losses if math.isfinite(loss)]
    training: dict[str, Any] = dict(
        trainer.config.to_dict(),
        layers=plan.request.layers,
        pictures=len(plan.latents),
        steps_done=progress.step,
        last_loss=losses[-1],
        seconds=round(progress.seconds, 1),
    )
    factors, singular_order = final_factors(network, trainer.optimizer.sensitivities())
    rates = dict.fromkeys(factors) if singular_order else network.nu_by_layer()
    lora = plan.file.state_dict(factors, plan.target.stem, training, rates, network.target_rank)
    path = save_lora(plan.target, lora)
    return TrainedLora(lora, path, plan.target.name_of(path), losses)


def _notes(progress: Progress) -> str:
    """Sentences about skipped steps and about memory that ran out; empty without any."""
    notes = ""
    if skipped := progress.skipped:
        steps = ", ".join(map(str, skipped[:MAX_NAMED])) + (" and others" if len(skipped) > MAX_NAMED else "")
        notes += f" Steps that were skipped: {len(skipped)} ({steps})."
    if progress.changes:
        notes += f" Memory ran out on the way: {'; '.join(progress.changes)}."
    return notes

"""One training run on a host model: checks, training, live pictures, saving."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor, nn

from ...lora2.adapters.layer import module_shape
from ...lora2.adapters.network import AdaptiveNetwork
from ...lora2.adapters.prune import final_factors
from ...lora2.checkpoints.directory import CheckpointDirectory
from ...lora2.checkpoints.state import State
from ...lora2.config import TrainingConfig
from ...lora2.files.document import LoraStateDict
from ...lora2.method.attention_entropy import EntropyProbe
from ...lora2.method.factors import cost
from ...lora2.method.init import initial_ranks, rank_limit
from ...lora2.report.preview import preview_picture
from ...lora2.training.monitor import Diverged
from ...lora2.training.progress import Progress
from ...lora2.training.trainer import Trainer
from ...lora2.util.errors import LoraError
from ...lora2.util.memory import OutOfMemory, free_cached_memory, is_out_of_memory, try_allocating
from ..comfy.dataset import pictures_and_captions
from ..comfy.layers import cross_attention, family_of, file_prefixes, is_plain, select_layers
from ..comfy.model import HostModel, empty_caption, training_dtype
from .fingerprint import fingerprint_of
from .request import RunRequest
from .resume import SavedRun, about_run, decide_start, open_source
from .save import DTYPES, LoraFile, SaveTarget, check_target, free_bytes, save_lora, save_target, write_unsaved
from .states import NEWEST, CheckpointSource, resolve_source, states_folder

log = logging.getLogger("lora2")

NO_ROOM_TO_START = (
    "Memory ran out before the first step, while the model was loaded and the LoRA laid out. Close other programs that use the "
    "GPU, adapt fewer layers, or lower initial_rank or target_rank."
)

PREVIEW_SHARE = 0.03
"""Live pictures may take this share of the time."""


@dataclass(frozen=True)
class TrainedLora:
    """What a run leaves: the adapter, its file, and how the loss went."""

    lora: LoraStateDict
    path: Path
    name: str
    losses: list[float]


def train(
    patcher: Any,
    latents: Sequence[dict[str, Any]],
    conditioning: Sequence[Any],
    config: TrainingConfig,
    request: RunRequest,
    empty: Sequence[Any] | None = None,
    say: Callable[[str], None] = log.info,
) -> TrainedLora:
    """Check everything, train, save. Whatever stops the training, what was learned until then is saved and said."""
    write_unsaved(say)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return _train(patcher, latents, conditioning, config, request, empty, say)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            words = str(error) if isinstance(error, LoraError) else NO_ROOM_TO_START
    # Only now: what the failed attempt held went with its error. The host does the same when it sees one itself.
    free_cached_memory()
    with torch.inference_mode():  # as every other node: weights that are moved stay inference tensors
        comfy.model_management.unload_all_models()
    raise OutOfMemory(words)


def _train(
    patcher: Any,
    latents: Sequence[dict[str, Any]],
    conditioning: Sequence[Any],
    config: TrainingConfig,
    request: RunRequest,
    empty: Sequence[Any] | None,
    say: Callable[[str], None],
) -> TrainedLora:
    place = save_target(request.save_name)
    folder = states_folder(place)
    source = resolve_source(request.continue_from, place)
    images, captions = pictures_and_captions(latents, conditioning)
    host = HostModel(patcher, training_dtype(patcher, request.precision))
    host.check_latents(images)
    layers = select_layers(host.model, request.layers, request.include.split(), request.exclude.split())
    past = open_source(source, layers)
    if isinstance(past, SavedRun):
        images, captions = past.in_order(images, captions)
    files = _file_info(host, layers, images, request)
    shapes = {name: module_shape(m) for name, m in layers.items()}
    config = config.resolved_for(len(images))
    told = config.to_dict()
    of_a_layer = files.layer_overhead(shapes, place.stem, told) if config.budget_mb else 0
    config = replace(
        config,
        file_overhead=files.overhead(shapes, place.stem, told),
        bytes_per_parameter=files.dtype.itemsize,
        layer_overhead=of_a_layer,
    )
    least, most = _bytes(shapes, config)
    check_target(place, least)
    if least < most and free_bytes(place) < most:
        say(
            f"Ranks may grow: the LoRA may become up to {most / 1e6:.1f} MB, and the disk has {free_bytes(place) / 1e6:.1f} MB free."
        )
    given, images = images, host.scale_latents(images)
    nothing = empty_caption(captions, empty)
    with host.training(images, captions, nothing, config.batch_size, request.checkpointing):
        dropped = nothing if config.caption_dropout > 0 else None
        about, made_of = (
            about_run(host.device, host.compute),
            cache(partial(fingerprint_of, host, layers, given, captions, dropped)),
        )
        begin = decide_start(past, request.on_difference, config, host.model, layers, made_of, about)
        del past  # a state may be large
        config = begin.config
        network = AdaptiveNetwork(layers, config, host.device, host.compute, is_plain)
        trainer = Trainer(network, host, images, config, EntropyProbe(cross_attention(host.model)), notify=say)
        begin.apply(trainer)
        begun = trainer.progress.applied
        say(" ".join([f"Training {len(layers)} layers on {len(images)} pictures, {config.steps} steps.", *begin.words]))
        finish = _Finish(trainer, files, place, config, request, len(images))
        goes_on = source.path if begun and isinstance(source, CheckpointSource) else None
        keeper = CheckpointDirectory(folder, request.states_kept, least, goes_on)
        states = _States(trainer, keeper, {"origin": made_of().state(), "about": State({}, about)}, say)
        try:
            trainer.run(
                _Live(network, files, partial(_warn_of_disk, place, config, say)), states.save, request.state_every
            )
        except BaseException as stopped:
            if trainer.progress.applied == begun:
                raise
            done = f"Stopped after {trainer.progress.step} of {config.steps} steps"
            try:
                trained = finish()
            except LoraError as error:
                reason = f"{stopped} " if isinstance(stopped, Exception) else ""
                if states.save():
                    reason += f"The training state is kept: choose '{NEWEST}' in continue_from to go on. "
                kind = OutOfMemory if is_out_of_memory(stopped) or is_out_of_memory(error) else LoraError
                raise kind(f"{reason}{done}. {error}") from stopped
            words = f"{done}; what was learned is saved as {trained.name}.{_notes(trainer.progress)}"
            if states.save():
                words += f" To go on, choose '{NEWEST}' in continue_from."
            say(words)
            raise _explained(stopped, " " + words) from stopped.__cause__
        try:
            trained = finish()
        except LoraError as error:
            if not states.save():
                raise
            kept = f"The training state is kept: choose '{NEWEST}' in continue_from, with more steps."
            raise type(error)(f"{error} {kept}") from error
        if states.save():
            keeper.prune(1)
        say(f"Saved as {trained.name}.{_notes(trainer.progress)}")
        return trained


class _States:
    """Writes the run's states, with what the run is made of; one that cannot be written is said, and costs nothing else."""

    def __init__(
        self, trainer: Trainer, keeper: CheckpointDirectory, made_of: Mapping[str, State], say: Callable[[str], None]
    ) -> None:
        self.trainer, self.keeper, self.made_of, self.say = trainer, keeper, made_of, say
        self._written: tuple[int, Path] | None = None

    def save(self) -> bool:
        """Write the state that the run is in, unless it is written; whether it is on the disk."""
        step = self.trainer.progress.step
        if self._written is not None and self._written[0] == step and self._written[1].is_file():
            return True
        try:
            state = self.trainer.state()
            path = self.keeper.save(state.with_parts(**self.made_of))
        except Diverged:
            raise
        except (LoraError, OSError, RuntimeError, MemoryError) as error:
            why = (isinstance(error, OSError) and error.strerror) or type(
                error
            ).__name__  # no more: it may hold a local path
            self.say(str(error) if isinstance(error, LoraError) else f"The training state was not saved: {why}.")
            return False
        self._written = step, path
        return True


class _Finish:
    """Turns the network's state into a saved file."""

    def __init__(
        self,
        trainer: Trainer,
        files: LoraFile,
        place: SaveTarget,
        config: TrainingConfig,
        request: RunRequest,
        pictures_and_captions: int,
    ) -> None:
        self.trainer, self.files, self.place = trainer, files, place
        self.config, self.request, self.pictures = config, request, pictures_and_captions

    def __call__(self) -> TrainedLora:
        """Save; a second time where memory ran out, with all given back that can be."""
        if not (done := try_allocating(self._save)):
            free_cached_memory()
            done = try_allocating(self._save)
        if not done:
            raise OutOfMemory("Memory ran out while the LoRA was saved, twice: it is lost. Close other programs first.")
        return done[0]

    def _save(self) -> TrainedLora:
        network, progress = self.trainer.network, self.trainer.progress
        losses = [loss for loss in progress.losses if math.isfinite(loss)]
        training: dict[str, Any] = dict(
            self.config.to_dict(),
            layers=self.request.layers,
            pictures=self.pictures,
            steps_done=progress.step,
            last_loss=losses[-1],
            seconds=round(progress.seconds, 1),
        )
        factors, ordered = final_factors(network, self.trainer.optimizer.sensitivities())
        rates = dict.fromkeys(factors) if ordered else network.nu_by_layer()
        lora = self.files.state_dict(factors, self.place.stem, training, rates, network.target_rank)
        path = save_lora(self.place, lora)
        return TrainedLora(lora, path, self.place.name_of(path), losses)


class _Live:
    """After every step: the progress bar, now and then a picture, and the host's request to stop."""

    def __init__(self, network: AdaptiveNetwork, files: LoraFile, warn_of_disk: Callable[[int], bool]) -> None:
        self.warn_of_disk, self._warned = warn_of_disk, False
        self.bar = comfy.utils.ProgressBar(network.config.steps)
        self.files = files
        self.costs = {files.prefixes[name]: a.cost for name, a in zip(network.names, network.adapters, strict=True)}
        self._next_picture = self._drawn = 0.0
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        preview: tuple[str, Image.Image, int] | None = None
        due = now >= self._next_picture or now < self._drawn  # the second: a clock that jumped back
        if due or progress.phase != self._phase or progress.step == progress.steps:
            picture = self._picture(progress)
            parameters = sum(rank * self.costs[self.files.prefixes[name]] for name, rank in progress.ranks.items())
            self._warned = self._warned or self.warn_of_disk(parameters)
            preview = ("JPEG", picture, max(picture.size))
            self._phase = progress.phase
            self._drawn = time.monotonic()
            self._next_picture = self._drawn + max(0.5, (self._drawn - now) / PREVIEW_SHARE)
        self.bar.update_absolute(progress.step, progress.steps, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _picture(self, progress: Progress) -> Image.Image:
        return preview_picture(
            progress.losses,
            progress.steps,
            {self.files.prefixes[name]: rank for name, rank in progress.ranks.items()},
            progress.phase,
            costs=self.costs,
            number_bytes=self.files.dtype.itemsize,
            cuts=progress.cuts,
        )


def _file_info(
    host: HostModel, layers: Mapping[str, nn.Module], images: Sequence[Tensor], request: RunRequest
) -> LoraFile:
    prefixes, style = file_prefixes(host.model, list(layers))
    largest = max(images, key=lambda t: t.shape[-1] * t.shape[-2])
    ratio = getattr(host.latent_format, "spacial_downscale_ratio", 8)
    size = (largest.shape[-1] * ratio, largest.shape[-2] * ratio)
    family = family_of(host.model, host.prediction)
    return LoraFile(prefixes, style, family, host.prediction, size, DTYPES[request.save_dtype])


def _bytes(shapes: Mapping[str, tuple[int, ...]], config: TrainingConfig) -> tuple[int, int]:
    """The file's size that has to fit, and the largest that it may grow to.

    They differ only in the paper's own form without a budget, whose ranks end where they like: θ moves by its learning rate
    at most, in every step. Raises LoraError for a target or budget that the layers cannot have.
    """
    limits = [rank_limit(s, config) for s in shapes.values()]
    costs = [cost(s) for s in shapes.values()]
    parameters = config.budget(costs, limits)
    most = parameters
    if config.settle_at >= 1 and not config.budget_mb:
        growth = math.exp(min(config.rank_learning_rate * config.steps, 20.0))
        starts = initial_ranks(parameters / sum(costs), limits, config)
        parameters = max(parameters, sum(c * start for c, start in zip(costs, starts, strict=True)))
        most = sum(c * min(limit, int(start * growth)) for c, limit, start in zip(costs, limits, starts, strict=True))
    as_bytes = [config.file_overhead + n * config.bytes_per_parameter for n in (parameters, most)]
    return as_bytes[0], max(as_bytes)


def _warn_of_disk(place: SaveTarget, config: TrainingConfig, say: Callable[[str], None], parameters: int) -> bool:
    """Say when what has been learned so far would not fit the disk any more; whether it was said."""
    size, free = config.file_overhead + parameters * config.bytes_per_parameter, free_bytes(place)
    if size <= free or config.settle_at < 1:
        return False
    say(
        f"The LoRA has grown to {size / 1e6:.1f} MB, but its disk has {free / 1e6:.1f} MB free: make room before the run ends."
    )
    return True


def _explained(stopped: BaseException, words: str) -> BaseException:
    """The exception to go on with: the host's own for a cancel, ours with where the file lies."""
    if is_out_of_memory(stopped) and not isinstance(stopped, LoraError):
        return OutOfMemory(f"Memory ran out between two steps.{words}")
    return type(stopped)(f"{stopped}{words}") if isinstance(stopped, LoraError) else stopped


def _notes(progress: Progress) -> str:
    """What a person should know of how a run went, beside its end."""
    notes = ""
    if progress.skipped:
        steps = ", ".join(map(str, progress.skipped[:5])) + (" and others" if len(progress.skipped) > 5 else "")
        notes += f" Steps that were skipped: {len(progress.skipped)} ({steps})."
    if progress.changes:
        notes += f" Memory ran out on the way: {'; '.join(progress.changes)}."
    return notes

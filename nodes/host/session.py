"""One training run on a host model: checks, training, live pictures, saving."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor, nn

from ...lora2.adapter import cost, module_shape
from ...lora2.errors import LoraError
from ...lora2.format import LoraStateDict
from ...lora2.keeper import Keeper
from ...lora2.live import live_picture
from ...lora2.losses import EntropyProbe
from ...lora2.network import AdaptiveNetwork, rank_limit
from ...lora2.settings import PRECISIONS, TARGETS, TRISTATE, Settings
from ...lora2.state import State
from ...lora2.trainer import Diverged, Progress, Trainer
from .beginning import ON_DIFFERENCE, REFUSE, about_run, beginning
from .dataset import pictures
from .layers import cross_attention, family_of, file_prefixes, select_layers
from .model import HostModel, empty_caption, training_dtype
from .origin import origin_of
from .saving import DTYPES, FileInfo, Place, check_place, place_for, save
from .states import NEWEST, NOTHING, StateSource, chosen, states_folder

log = logging.getLogger("lora2")

PREVIEW_SHARE = 0.03
"""Live pictures may take this share of the time."""


@dataclass(frozen=True)
class Request:
    """What the node was asked for, beside the settings."""

    save_name: str
    target: str
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    checkpointing: str = "auto"
    precision: str = "auto"
    save_dtype: str = "fp16"
    continue_from: str = NOTHING
    on_difference: str = REFUSE
    state_every: int = 200
    states_kept: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.save_name, str):
            raise LoraError("save_name must be a text: the file's name, such as subjects/mug.")
        for name, choices in (
            ("target", TARGETS),
            ("checkpointing", TRISTATE),
            ("precision", PRECISIONS),
            ("save_dtype", tuple(DTYPES)),
            ("on_difference", ON_DIFFERENCE),
        ):
            if getattr(self, name) not in choices:
                label = "layers" if name == "target" else name
                raise LoraError(f"{label} = {getattr(self, name)!r} must be one of {', '.join(choices)}.")
        for name, least in (("state_every", 0), ("states_kept", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise LoraError(f"{name} = {value!r} must be a whole number, at least {least}.")


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the adapter, its file, and how the loss went."""

    lora: LoraStateDict
    path: Path
    name: str
    losses: list[float]


def train(
    patcher: Any,
    latents: Sequence[dict[str, Any]],
    conditioning: Sequence[Any],
    settings: Settings,
    request: Request,
    empty: Sequence[Any] | None = None,
    say: Callable[[str], None] = log.info,
) -> Trained:
    """Check everything, train, save. Whatever stops the training, what was learned until then is saved and said."""
    with torch.inference_mode(False), torch.enable_grad():
        return _train(patcher, latents, conditioning, settings, request, empty, say)


def _train(
    patcher: Any,
    latents: Sequence[dict[str, Any]],
    conditioning: Sequence[Any],
    settings: Settings,
    request: Request,
    empty: Sequence[Any] | None,
    say: Callable[[str], None],
) -> Trained:
    place = place_for(request.save_name)
    folder = states_folder(place)
    source = chosen(request.continue_from, place)
    images, captions = pictures(latents, conditioning)
    host = HostModel(patcher, training_dtype(patcher, request.precision))
    host.check_latents(images)
    layers = select_layers(host.model, request.target, request.include, request.exclude)
    files = _file_info(host, layers, images, request)
    shapes = {name: module_shape(m) for name, m in layers.items()}
    settings = settings.with_file(files.overhead(shapes, place.stem, settings.to_dict()), files.dtype.itemsize)
    most = _most_bytes(shapes, settings)
    check_place(place, most)
    given, images = images, host.scale_latents(images)
    nothing = empty_caption(captions, empty)
    with host.training(images, captions, nothing, settings.batch_size, request.checkpointing):
        dropped = nothing if settings.caption_dropout > 0 else None
        about, made_of = about_run(host.device, host.compute), cache(partial(origin_of, host, layers, given, captions, dropped))
        begin = beginning(source, request.on_difference, settings, host.model, layers, made_of, about)
        settings = begin.settings
        network = AdaptiveNetwork(layers, settings, host.device, host.compute)
        trainer = Trainer(network, host, images, settings, EntropyProbe(cross_attention(host.model)))
        begin.apply(trainer)
        begun = trainer.progress.step
        say(" ".join([f"Training {len(layers)} layers on {len(images)} pictures, {settings.steps} steps.", *begin.words]))
        finish = _Finish(network, trainer.progress, files, place, settings, request, len(images))
        goes_on = source.path if begun and isinstance(source, StateSource) else None
        keeper = Keeper(folder, request.states_kept, most, goes_on)
        states = _States(trainer, keeper, State.joined(origin=made_of().state(), about=State({}, about)), say)
        try:
            trainer.run(_Live(network, files), states.save, request.state_every)
        except BaseException as stopped:
            if trainer.progress.step == begun:
                raise _explained(stopped, "") from stopped.__cause__
            done = f"Stopped after {trainer.progress.step} of {settings.steps} steps"
            try:
                trained = finish()
            except LoraError as error:
                reason = f"{stopped} " if isinstance(stopped, Exception) else ""
                raise LoraError(f"{reason}{done}. {error}") from stopped
            words = f"{done}; what was learned is saved as {trained.name}."
            if states.save():
                words += f" To go on, choose '{NEWEST}' in continue_from."
            say(words)
            raise _explained(stopped, " " + words) from stopped.__cause__
        trained = finish()
        if states.save():
            keeper.prune(1)
        say(f"Saved as {trained.name}.")
        return trained


class _States:
    """Writes the run's states, with what the run is made of; one that cannot be written is said, and costs nothing else."""

    def __init__(self, trainer: Trainer, keeper: Keeper, made_of: State, say: Callable[[str], None]) -> None:
        self.trainer, self.keeper, self.made_of, self.say = trainer, keeper, made_of, say
        self._written = 0

    def save(self) -> bool:
        """Write the state that the run is in, unless it is written; whether it is on the disk."""
        if self._written == self.trainer.progress.step:
            return True
        try:
            state = self.trainer.state()
            self.keeper.save(state.having(**{name: self.made_of.part(name) for name in self.made_of.facts}))
        except Diverged:
            raise
        except (LoraError, OSError, RuntimeError, MemoryError) as error:
            self.say(str(error) if isinstance(error, LoraError) else f"The training state was not saved: {error}")
            return False
        self._written = self.trainer.progress.step
        return True


class _Finish:
    """Turns the network's state into a saved file."""

    def __init__(
        self,
        network: AdaptiveNetwork,
        progress: Progress,
        files: FileInfo,
        place: Place,
        settings: Settings,
        request: Request,
        pictures: int,
    ) -> None:
        self.network, self.progress, self.files, self.place = network, progress, files, place
        self.settings, self.request, self.pictures = settings, request, pictures

    def __call__(self) -> Trained:
        network, progress = self.network, self.progress
        training: dict[str, Any] = dict(
            self.settings.to_dict(),
            layers=self.request.target,
            pictures=self.pictures,
            steps_done=progress.step,
            last_loss=progress.losses[-1],
            seconds=round(progress.seconds, 1),
        )
        factors, ordered = network.final_factors()
        rates = dict.fromkeys(factors) if ordered else network.rates()
        lora = self.files.state_dict(factors, self.place.stem, training, rates, network.target_rank)
        path = save(self.place, lora)
        return Trained(lora, path, self.place.name_of(path), list(progress.losses))


class _Live:
    """After every step: the progress bar, now and then a picture, and the host's request to stop."""

    def __init__(self, network: AdaptiveNetwork, files: FileInfo) -> None:
        self.bar = comfy.utils.ProgressBar(network.settings.steps)
        self.files = files
        self.costs = {files.prefixes[name]: a.cost for name, a in zip(network.names, network.adapters, strict=True)}
        self._next_picture = 0.0
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        preview: tuple[str, Image.Image, int] | None = None
        if now >= self._next_picture or progress.phase != self._phase or progress.step == progress.steps:
            picture = self._picture(progress)
            preview = ("JPEG", picture, max(picture.size))
            self._phase = progress.phase
            drawn = time.monotonic()
            self._next_picture = drawn + max(0.5, (drawn - now) / PREVIEW_SHARE)
        self.bar.update_absolute(progress.step, progress.steps, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _picture(self, progress: Progress) -> Image.Image:
        return live_picture(
            progress.losses,
            progress.steps,
            {self.files.prefixes[name]: rank for name, rank in progress.ranks.items()},
            progress.phase,
            costs=self.costs,
            number_bytes=self.files.dtype.itemsize,
            settled_at=progress.settled_at,
        )


def _file_info(
    host: HostModel, layers: Mapping[str, nn.Module], images: Sequence[Tensor], request: Request
) -> FileInfo:
    prefixes, style = file_prefixes(host.model, list(layers))
    largest = max(images, key=lambda t: t.shape[-1] * t.shape[-2])
    ratio = getattr(host.latent_format, "spacial_downscale_ratio", 8)
    size = (largest.shape[-1] * ratio, largest.shape[-2] * ratio)
    family = family_of(host.model, host.prediction)
    return FileInfo(prefixes, style, family, host.prediction, size, DTYPES[request.save_dtype])


def _most_bytes(shapes: Mapping[str, tuple[int, ...]], settings: Settings) -> int:
    """The file's size at most; raises LoraError for a target or budget that the layers cannot have."""
    limits = [rank_limit(s, settings) for s in shapes.values()]
    costs = [cost(s) for s in shapes.values()]
    parameters = settings.budget(costs, limits)
    if settings.settle_at >= 1:
        parameters = max(
            parameters, sum(c * min(limit, settings.initial_rank) for c, limit in zip(costs, limits, strict=True))
        )
    return settings.file_overhead + parameters * settings.bytes_per_parameter


def _explained(stopped: BaseException, words: str) -> BaseException:
    """The exception to go on with: the host's own for a cancel, ours with advice for what a person can change."""
    if isinstance(stopped, torch.OutOfMemoryError):
        return LoraError(
            "The GPU ran out of memory. Turn checkpointing on, lower batch_size (and raise accumulation), train on smaller "
            "pictures, or adapt fewer layers." + words
        )
    if isinstance(stopped, LoraError) and words:
        return type(stopped)(f"{stopped}{words}")
    return stopped

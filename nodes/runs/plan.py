"""Plan of a run: everything that can be checked and decided before the model is loaded and captions are encoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...lora2.adapters.layer import module_shape
from ...lora2.checkpoints.fingerprint import Fingerprint
from ...lora2.config import TrainingConfig
from ...lora2.method.factors import cost
from ...lora2.method.init import initial_ranks, rank_limit
from ..comfy.dataset import Caption, pictures_and_captions
from ..comfy.layers import family_of, file_prefixes, select_layers
from ..comfy.model import HostModel, empty_caption, training_dtype
from .fingerprint import data_fingerprint
from .lora_file import DTYPES, LoraFile
from .request import RunRequest
from .resume import RunStart, SavedRun, open_source, plan_start
from .states import resolve_source, states_folder
from .target import SaveTarget, check_target, free_bytes, save_target

REORDERED = "The pictures come in another order than in the state's run: they are taken in the order of that run."


@dataclass(frozen=True)
class Plan:
    """A run that has passed all checks.

    latents: in the scale of the model, one per caption. empty_caption: replaces a dropped caption. config: of a run that does not
    resume; `start.config` is the one to train with. fingerprint: without the model's weights. file_bytes: reserved for the LoRA.
    """

    request: RunRequest
    config: TrainingConfig
    host: HostModel
    layers: Mapping[str, nn.Module]
    latents: list[Tensor]
    captions: list[Caption]
    empty_caption: Caption
    target: SaveTarget
    file: LoraFile
    file_bytes: int
    states_folder: Path
    start: RunStart
    fingerprint: Fingerprint


def make_plan(
    patcher: Any,
    latents: Sequence[dict[str, Any]],
    conditioning: Sequence[Any],
    config: TrainingConfig,
    request: RunRequest,
    empty: Sequence[Any] | None,
    say: Callable[[str], None],
) -> Plan:
    """Check a request and its inputs. Raises LoraError for the first thing that is wrong; nothing is loaded or written."""
    target = save_target(request.save_name)
    folder = states_folder(target)
    source = resolve_source(request.continue_from, target)
    pictures, captions = pictures_and_captions(latents, conditioning)
    replacement = empty_caption(captions, empty)
    host = HostModel(patcher, training_dtype(patcher, request.precision))
    host.check_latents(pictures)
    layers = select_layers(host.model, request.layers, request.include.split(), request.exclude.split())
    saved = open_source(source, layers)
    dropped = replacement if config.caption_dropout > 0 else None
    fingerprint = data_fingerprint(host, layers, pictures, captions, dropped)
    order = fingerprint.order_of(saved.fingerprint) if isinstance(saved, SavedRun) else None
    reordered = order is not None and order != sorted(order)
    if order is not None and reordered:
        pictures, captions = [pictures[i] for i in order], [captions[i] for i in order]
        fingerprint = fingerprint.reordered(order)
    file = _lora_file(host, layers, pictures, request)
    config, file_bytes = _with_file_size(config.resolved_for(len(pictures)), file, layers, target, say)
    start = plan_start(saved, fingerprint, config, request.on_difference, host.model, layers)
    start.messages[:0] = [REORDERED] * reordered
    return Plan(
        request=request,
        config=config,
        host=host,
        layers=layers,
        latents=host.scale_latents(pictures),
        captions=captions,
        empty_caption=replacement,
        target=target,
        file=file,
        file_bytes=file_bytes,
        states_folder=folder,
        start=start,
        fingerprint=fingerprint,
    )


def _lora_file(
    host: HostModel, layers: Mapping[str, nn.Module], pictures: Sequence[Tensor], request: RunRequest
) -> LoraFile:
    prefixes, style = file_prefixes(host.model, list(layers))
    largest = max(pictures, key=lambda t: t.shape[-1] * t.shape[-2])
    pixels = getattr(host.latent_format, "spacial_downscale_ratio", 8)
    resolution = (largest.shape[-1] * pixels, largest.shape[-2] * pixels)
    family = family_of(host.model, host.prediction)
    return LoraFile(prefixes, style, family, host.prediction, resolution, DTYPES[request.save_dtype])


def _with_file_size(
    config: TrainingConfig,
    file: LoraFile,
    layers: Mapping[str, nn.Module],
    target: SaveTarget,
    say: Callable[[str], None],
) -> tuple[TrainingConfig, int]:
    """The configuration with the bytes of the file's header, and the bytes to reserve for the file, which fit on the disk."""
    shapes = {name: module_shape(module) for name, module in layers.items()}
    table = config.to_dict()
    layer_overhead = file.layer_overhead(shapes, target.stem, table) if config.budget_mb else 0
    config = replace(
        config,
        file_overhead=file.overhead(shapes, target.stem, table),
        bytes_per_parameter=file.dtype.itemsize,
        layer_overhead=layer_overhead,
    )
    size, max_size = file_size_range(shapes, config)
    check_target(target, size)
    if size < max_size and free_bytes(target) < max_size:
        say(
            f"Ranks may grow: the LoRA may become up to {max_size / 1e6:.1f} MB, and the disk has "
            f"{free_bytes(target) / 1e6:.1f} MB free."
        )
    return config, size


def file_size_range(shapes: Mapping[str, tuple[int, ...]], config: TrainingConfig) -> tuple[int, int]:
    """The file's size in bytes that must fit on the disk, and the largest that it may grow to.

    They differ only in the paper's form without a budget, where θ moves by at most its learning rate in every step. Raises
    LoraError for a target or a budget that the layers cannot have.
    """
    limits = [rank_limit(s, config) for s in shapes.values()]
    costs = [cost(s) for s in shapes.values()]
    parameters = config.budget(costs, limits)
    max_parameters = parameters
    if config.settle_at >= 1 and not config.budget_mb:
        growth = math.exp(min(config.rank_learning_rate * config.steps, 20.0))
        starts = initial_ranks(parameters / sum(costs), limits, config)
        parameters = max(parameters, sum(c * start for c, start in zip(costs, starts, strict=True)))
        max_parameters = sum(
            c * min(limit, int(start * growth)) for c, limit, start in zip(costs, limits, starts, strict=True)
        )
    size, max_size = (config.file_overhead + n * config.bytes_per_parameter for n in (parameters, max_parameters))
    return size, max(size, max_size)

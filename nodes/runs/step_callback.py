"""After every step: ComfyUI's progress bar, a preview now and then, a warning about the disk, and the cancel button."""

from __future__ import annotations

import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from PIL import Image

from ...lora2.adapters.network import AdaptiveNetwork
from ...lora2.report.preview import preview_picture
from ...lora2.training.progress import Progress
from .lora_file import LoraFile
from .target import SaveTarget, free_bytes

PREVIEW_SHARE = 0.03
"""Largest share of the time that previews take."""

MIN_SECONDS = 0.5
"""Between two previews."""


class StepCallback:
    """Shows the progress of a run on its node; raises ComfyUI's exception where the run is cancelled."""

    def __init__(
        self, network: AdaptiveNetwork, file: LoraFile, target: SaveTarget, say: Callable[[str], None]
    ) -> None:
        self.config, self.file, self.target, self.say = network.config, file, target, say
        self.bar = comfy.utils.ProgressBar(network.config.steps)
        self.costs = {file.prefixes[name]: a.cost for name, a in zip(network.names, network.adapters, strict=True)}
        self._drawn_at = self._next_at = 0.0
        self._phase = ""
        self._warned = False

    def __call__(self, progress: Progress) -> None:
        """Show a step that is done."""
        now = time.monotonic()
        preview: tuple[str, Image.Image, int] | None = None
        due = now >= self._next_at or now < self._drawn_at  # the second: the clock jumped back
        if due or progress.phase != self._phase or progress.step == progress.steps:
            ranks = {self.file.prefixes[name]: rank for name, rank in progress.ranks.items()}
            picture = preview_picture(
                progress.losses,
                progress.steps,
                ranks,
                progress.phase,
                costs=self.costs,
                number_bytes=self.file.dtype.itemsize,
                cuts=progress.cuts,
            )
            self._warn_about_disk(sum(rank * self.costs[prefix] for prefix, rank in ranks.items()))
            preview = ("JPEG", picture, max(picture.size))
            self._phase = progress.phase
            self._drawn_at = time.monotonic()
            self._next_at = self._drawn_at + max(MIN_SECONDS, (self._drawn_at - now) / PREVIEW_SHARE)
        self.bar.update_absolute(progress.step, progress.steps, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _warn_about_disk(self, parameters: int) -> None:
        """Warn once where a LoRA of this size does not fit on the disk. Later cuts bring it to a size that was checked."""
        config = self.config
        size = config.file_overhead + parameters * config.bytes_per_parameter
        if self._warned or config.settle_at < 1 or size <= free_bytes(self.target):
            return
        self._warned = True
        self.say(
            f"The LoRA has grown to {size / 1e6:.1f} MB, but its disk has {free_bytes(self.target) / 1e6:.1f} MB free: free some "
            "space before the run ends."
        )

"""Automatic size at the last cut: losses of candidate sizes on a fixed set of samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..method import size_search
from ..util.memory import try_allocating
from .batches import Batches
from .step import MicroBatch

log = logging.getLogger("lora2")


class SizeSelection:
    """Selects the smallest size that preserves the `keep_share` of the loss reduction (method/size_search.py).

    The losses are compared on samples with a seed of their own: the run's own order of pictures and noise does not change.
    batches: those of the run, for pictures and the samples that run together. check_cancelled: called before every size, since
    the comparison takes a while; it may raise.
    """

    def __init__(
        self,
        batches: Batches,
        loss: Callable[[MicroBatch], Tensor],
        release_memory: Callable[[], None],
        check_cancelled: Callable[[], object],
        config: TrainingConfig,
        notify: Callable[[str], None],
    ) -> None:
        self.loss, self.release_memory, self.check_cancelled = loss, release_memory, check_cancelled
        self.config, self.notify = config, notify
        batch_size, seeds = size_search.BATCH_SIZE, (config.seed + 3, config.seed + 4)
        self.batches = Batches(batches.buckets.latents, batches.denoiser, config, batch_size, seeds)
        self._samples = [self.batches.sample() for _ in range(size_search.SAMPLES // batch_size)]
        if batches.max_micro_batch < config.batch_size:  # memory ran out before
            self.batches.max_micro_batch = min(batch_size, batches.max_micro_batch)
        self._failure = "training had not lowered the loss by the last cut"

    def select(self, show: Callable[[int], None], smallest: int, largest: int) -> int:
        """The selected size in parameters, smallest … largest; `largest` if none can be selected, which is reported.

        show: makes the network compute as if it had been pruned to a size.
        """
        size = size_search.smallest_sufficient_size(
            lambda size: self._loss_at(size, show), smallest, largest, self.config.keep_share
        )
        if size is None:
            self.notify(f"settle_keep has no effect, the target size is used: {self._failure}.")
            return largest
        log.info("LoRA²: %.0f %% of the target size is sufficient.", 100 * size / largest)
        return size

    def _loss_at(self, size: int, show: Callable[[int], None]) -> float:
        """Mean loss at a size; NaN if memory runs out even with one sample at a time."""
        self.check_cancelled()
        while not (result := try_allocating(lambda: self._mean_loss(size, show))):
            self.release_memory()
            if self.batches.largest_micro_batch <= 1:
                self._failure = "memory ran out while sizes were compared"
                return math.nan
            self.batches.max_micro_batch = self.batches.largest_micro_batch // 2
        if not math.isfinite(result[0]):
            self._failure = "the loss was not finite while sizes were compared"
        return result[0]

    @torch.no_grad()
    def _mean_loss(self, size: int, show: Callable[[int], None]) -> float:
        show(size)
        return float(sum(m.weight * self.loss(m) for m in self.batches.micro_batches(self._samples)))

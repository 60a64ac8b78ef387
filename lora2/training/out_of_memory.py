"""Recovery from running out of memory during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from ..adapters.network import AdaptiveNetwork
from ..config import TrainingConfig
from ..method.attention_entropy import EntropyProbe
from ..util.memory import OutOfMemory, free_cached_memory, try_allocating
from .batches import Batches
from .denoiser import Denoiser
from .optimizer import Optimizer
from .progress import Progress
from .step import StepRunner

T = TypeVar("T")


class OutOfMemoryRecovery:
    """When memory runs out in a step or while the network changes, this happens, in order:

    1. The exception is dropped, and with it the tensors that it kept alive.
    2. One thing changes so that the next attempt needs less memory. For a step: gradient checkpointing is turned on (if it is
       on auto); else half as many samples run together, down to one; else steps run without CUDA graphs, for good. For a
       change of the network: nothing, since step 3 frees the graphs, so there is one more attempt.
    3. Everything else that the failed attempt left is freed: attention inputs, CUDA graphs, gradients, cached memory.
    4. The same work is repeated, on the same samples and noise, so that the loss stays the same. The user is told of the
       change, and `progress.changes` lists it.
    5. If nothing is left to change, if on_out_of_memory is "stop", or if the optimizer had begun to change parameters (a
       second attempt would apply a part of the step twice), OutOfMemory is raised. The network keeps what was learned.
    """

    def __init__(
        self,
        batches: Batches,
        runner: StepRunner,
        network: AdaptiveNetwork,
        denoiser: Denoiser,
        entropy: EntropyProbe | None,
        config: TrainingConfig,
        notify: Callable[[str], None],
    ) -> None:
        self.batches, self.runner, self.network, self.denoiser = batches, runner, network, denoiser
        self.entropy, self.config, self.notify = entropy, config, notify

    def take_step(self, step: Callable[[], T], optimizer: Optimizer, progress: Progress, issued: int) -> T:
        """Run `step`, the one after `issued` steps; repeat it with less memory as often as something can be changed."""
        return self._attempt(
            step, lambda: None if optimizer.partially_applied else self._save_memory(), progress, issued
        )

    def change_network(self, change: Callable[[], T], progress: Progress, issued: int) -> T:
        """Run `change`; repeat it once, without CUDA graphs in memory."""
        attempts = iter([""])
        return self._attempt(change, lambda: next(attempts, None), progress, issued)

    def _attempt(
        self, work: Callable[[], T], save_memory: Callable[[], str | None], progress: Progress, issued: int
    ) -> T:
        """The result of `work`. save_memory: changes something and describes it ("": not worth telling); None: nothing left."""
        while not (result := try_allocating(work)):
            change = save_memory()
            self.release_memory()
            if change is None:
                raise OutOfMemory(f"Memory ran out at step {issued + 1}. {self._advice(progress)}")
            if change:
                progress.changes.append(change)
                self.notify(f"Memory ran out at step {issued + 1}: {change}, and the step is repeated.")
        return result[0]

    def _save_memory(self) -> str | None:
        """Make steps need less memory, with the same samples, noise and loss; describe the change, None if there is none."""
        if self.config.on_out_of_memory == "stop":
            return None
        if change := self.denoiser.save_memory():
            return change
        if (together := self.batches.largest_micro_batch) > 1:
            self.batches.max_micro_batch = math.ceil(together / 2)
            return f"{self.batches.max_micro_batch} of a batch's pictures at a time, not {together}"
        return self.runner.save_memory()

    def release_memory(self) -> None:
        """Free everything that a failed attempt left on the device and on the CPU."""
        if self.entropy is not None:
            self.entropy.forget()
        self.runner.reset()
        self.network.drop_gradients()
        free_cached_memory()

    def _advice(self, progress: Progress) -> str:
        """How the user can make the run need less memory."""
        if self.config.on_out_of_memory == "stop":
            return (
                "Turn checkpointing on, lower batch_size (and raise accumulation), train on smaller pictures, adapt fewer "
                "layers, or set on_out_of_memory to retry with less."
            )
        done = f" (already changed: {'; '.join(progress.changes)})" if progress.changes else ""
        return (
            "Train on smaller pictures, adapt fewer layers, lower initial_rank, or turn checkpointing on if it is off"
            f"{done}."
        )

"""Training loop: sample a batch, take a step, resize adapters to the learned ranks, prune at the scheduled cuts, report progress."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor

from ..adapters.network import AdaptiveNetwork
from ..adapters.prune import prune
from ..checkpoints.network_state import restore, state_of
from ..checkpoints.state import State, raise_corrupted
from ..config import TrainingConfig
from ..method import schedule
from ..method.allocation import next_cut_size
from ..method.attention_entropy import EntropyProbe
from ..method.factors import Factors
from ..method.losses import denoising_loss
from ..util.errors import LoraError
from .batches import Batch, Batches
from .cuda_graph import step_runner
from .denoiser import Denoiser
from .monitor import Diverged, Monitor
from .optimizer import Optimizer
from .out_of_memory import OutOfMemoryRecovery
from .progress import Progress
from .run_state import RunState
from .size_selection import SizeSelection
from .step import StepResult
from .warm_start import WarmStart, warm_start

log = logging.getLogger("lora2")

T = TypeVar("T")

GPU_STEPS_AHEAD = 1
"""Steps that may be queued on a GPU before the loss of the last one is read. A cancellation waits for them."""


class Trainer:
    """Trains a network on a dataset. Any exception may leave `run`; the network then holds what was learned.

    issued: steps queued so far; `progress.step` counts those whose result was read. size: parameters of the ranks that are
    trained, as of the start or the last cut; the learning rate depends on it. ranks_frozen: whether θ is final (paper's form).
    """

    def __init__(
        self,
        network: AdaptiveNetwork,
        denoiser: Denoiser,
        latents: Sequence[Tensor],
        config: TrainingConfig,
        entropy: EntropyProbe | None = None,
        graphs: bool = True,
        notify: Callable[[str], None] = log.info,
    ) -> None:
        self.config = config = config.resolved_for(len(latents))
        self.network, self.denoiser, self.notify = network, denoiser, notify
        self.entropy = entropy if config.entropy_weight > 0 else None
        self.batches = Batches(latents, denoiser, config, config.batch_size, (config.seed + 1, config.seed + 2))
        self.optimizer = Optimizer(network, config)
        self.runner = step_runner(network, lambda m: self.loss(m.clean, m.noise, m.sigma, m.conditioning), graphs)
        self.recovery = OutOfMemoryRecovery(self.batches, self.runner, network, denoiser, self.entropy, config, notify)
        self.monitor = Monitor(network, config, notify)
        self.progress = Progress(config.steps, ranks=network.ranks())
        self.issued = 0
        self.size = network.size()
        self.ranks_frozen = False
        self.steps_ahead = GPU_STEPS_AHEAD if network.device.type == "cuda" else 0
        self._pending: list[StepResult] = []
        self._batch_states: deque[tuple[int, State]] = deque(maxlen=GPU_STEPS_AHEAD + 2)
        self._network_is_changing = False
        self._on_step: Callable[[Progress], None] | None = None

    def run(
        self,
        on_step: Callable[[Progress], None] | None = None,
        on_state: Callable[[], object] | None = None,
        state_every: int = 0,
    ) -> Progress:
        """Train to the last step.

        on_step: called after every step and while sizes are compared; it may raise to stop. on_state: called after every
        `state_every` steps except the last one, to take `state`; 0 = never. On a GPU the loop runs a step ahead: `progress`
        counts the steps whose result is known.

        Raises Diverged for a loss or gradients that are not finite (with on_bad_step = skip: for too many such steps), and
        OutOfMemory.
        """
        started = time.monotonic() - self.progress.seconds
        self._on_step = on_step
        with self._attached():
            while self.issued < self.config.steps:
                self._prune_if_due()
                self._freeze_ranks_if_due()
                self._take_step(self._sample_batches())
                self._resize_if_due()

                last = self.issued == self.config.steps
                save_state = on_state if state_every > 0 and self.issued % state_every == 0 and not last else None
                self._read_results(ahead=0 if last or save_state else self.steps_ahead)
                seconds = time.monotonic() - started
                self.progress.seconds = max(self.progress.seconds, seconds)  # the clock may jump back
                if save_state is not None:
                    save_state()
                self._report_progress()
        return self.progress

    # -- a step --------------------------------------------------------------------------------------------------------

    def _sample_batches(self) -> list[Batch]:
        """The batches of one step. The random state before them is kept, so that `state` can undo a step that failed."""
        self._batch_states.append((self.issued, self.batches.state()))
        return [self.batches.sample() for _ in range(self.config.accumulation)]

    def _take_step(self, batches: Sequence[Batch]) -> None:
        rate, train_ranks = self._learning_rate_factor(), self.config.ranks_adapt(self.issued) and not self.ranks_frozen
        result = self.recovery.take_step(
            lambda: self.runner.step(self.batches.micro_batches(batches), self.optimizer, rate, train_ranks),
            self.optimizer,
            self.progress,
            self.issued,
        )
        self._pending.append(StepResult(result))
        self.issued += 1

    def loss(self, clean: Tensor, noise: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """Denoising loss plus λ_e times the entropy of cross-attention, () float32."""
        denoiser, config = self.denoiser, self.config
        if self.entropy is not None:
            self.entropy.forget()
        noisy = denoiser.add_noise(sigma, noise, clean)
        predicted = denoiser.denoise(noisy, sigma, conditioning)
        loss = denoising_loss(predicted, clean, sigma, denoiser.prediction, config.min_snr_gamma, denoiser.sigma_data)
        entropy = self.entropy.take() if self.entropy is not None else None
        return loss if entropy is None else loss + config.entropy_weight * entropy

    def _learning_rate_factor(self) -> float:
        """Schedule times size factor. The paper's form has no size factor, since no cut brings its size to the target."""
        config = self.config
        factor = schedule.learning_rate_factor(self.issued, config.steps, config.warmup, config.schedule)
        return factor * schedule.size_factor(self.size, self.network.budget) if config.cut_steps else factor

    def _read_results(self, ahead: int, may_stop: bool = True) -> None:
        """Record the results of all pending steps except the last `ahead`. Raises Diverged unless the step may be skipped."""
        while len(self._pending) > ahead:
            try:
                self.monitor.record(self.progress, *self._pending.pop(0).read(), may_stop)
            except Diverged:
                self._pending.clear()
                raise

    def _report_progress(self) -> None:
        if self._on_step is not None:
            self._on_step(self.progress)

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def _resize_if_due(self) -> None:
        """Resize the adapters to the learned ranks every `sync_every` steps.

        Not after the last step: components added then would never be trained.
        """
        if self.issued == self.config.steps:
            self._update_ranks()
        elif self.issued % self.config.sync_every == 0:
            self._resize()

    def _resize(self) -> None:
        with self._changing_network():
            if self._change(lambda: self.network.sync_capacities(self.optimizer.inner)):
                self.runner.reset()

    def _prune_if_due(self) -> None:
        """Prune before a scheduled step. The last cut meets the budget, or ends below it where a smaller size suffices."""
        progress, network = self.progress, self.network
        due, cuts_left = self._cut_due()
        if not due:
            return
        self._read_results(ahead=0)
        self.runner.reset()
        with self._changing_network():
            self._change(lambda: network.sync_capacities(self.optimizer.inner))
            size, weights = next_cut_size(network.size(), network.budget, cuts_left), self.optimizer.sensitivities()
            choose = None if cuts_left or self.config.keep_share == 1 else self._size_selection().select
            self._change(lambda: prune(network, size, weights, choose))
            self.optimizer = Optimizer(network, self.config)  # the old moments belong to other components
            self.size = network.size()
            progress.cuts.append(self.issued)
            progress.pruned = not cuts_left

    def _cut_due(self) -> tuple[bool, int]:
        """Whether to prune before the next step, and how many cuts follow.

        The last cut is due even if its step has passed: a run may be resumed with fewer steps than it started with.
        """
        steps, previous = self.config.cut_steps, max(self.progress.cuts, default=-1)
        cuts_left = sum(step > self.issued for step in steps)
        scheduled = any(previous < step <= self.issued for step in steps)
        return bool(steps) and not self.progress.pruned and (scheduled or not cuts_left), cuts_left

    def _size_selection(self) -> SizeSelection:
        return SizeSelection(
            self.batches,
            loss=lambda m: self.loss(m.clean, m.noise, m.sigma, m.conditioning),
            release_memory=self.recovery.release_memory,
            check_cancelled=self._report_progress,
            config=self.config,
            notify=self.notify,
        )

    def _freeze_ranks_if_due(self) -> None:
        """Paper's form only: the step from which the ranks stay as they are."""
        config = self.config
        if self.issued < config.rest_step or config.settle_at < 1 or self.ranks_frozen:
            return
        self._read_results(ahead=0)
        with self._changing_network():
            if self._change(lambda: self.network.freeze_ranks(self.optimizer.inner)):
                self.runner.reset()
            self.ranks_frozen = True

    def _update_ranks(self) -> None:
        self.progress.ranks = self.network.ranks()

    def _change(self, change: Callable[[], T]) -> T:
        return self.recovery.change_network(change, self.progress, self.issued)

    @contextmanager
    def _changing_network(self) -> Iterator[None]:
        """Around a change of the network in several steps; an error inside leaves no consistent state to save."""
        self._network_is_changing = True
        yield
        self._network_is_changing = False
        self._update_ranks()

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """While inside, the model computes with the adapters. On exit, gradients and graphs are freed and results read."""
        with ExitStack() as stack:
            stack.enter_context(self.network.attached())
            if self.entropy is not None:
                stack.enter_context(self.entropy.attached())
            stack.callback(self.runner.reset)
            stack.callback(self.network.drop_gradients)
            stack.callback(self._read_results, ahead=0, may_stop=False)
            yield

    # -- starting from a state or from factors --------------------------------------------------------------------------

    def state(self) -> State:
        """Everything that the run needs to continue bit for bit after the last finished step; waits for the device.

        After an error inside a step, this is the state before that step. Raises LoraError if the error left the factors
        inconsistent, and Diverged as `run` does.
        """
        self._read_results(ahead=0)
        if self._network_is_changing or self.optimizer.partially_applied:
            raise LoraError("The error came while the factors were changing, so there is no state to resume from.")
        progress, config = self.progress, self.config
        before_failed_step = next((state for step, state in self._batch_states if step == progress.step), None)
        resize_due = progress.step == config.steps and progress.step % config.sync_every == 0
        run = RunState(progress, self.size, self.batches.max_micro_batch, self.ranks_frozen, resize_due)
        return State.joined(
            run=run.state(),
            network=state_of(self.network),
            optimizer=self.optimizer.state(),
            batches=before_failed_step or self.batches.state(),
            config=State({}, config.to_dict()),
        )

    def restore(self, state: State) -> None:
        """Continue from a state of a run on the same layers and pictures. `config.steps` counts from the start of the run.

        Raises LoraError if the state is damaged, is of another run, or has reached the last step already; the trainer
        cannot be used then.
        """
        run = RunState.from_state(state.part("run"), self.config.steps)
        restore(self.network, state.part("network"))
        self.optimizer = Optimizer(self.network, self.config)
        self.optimizer.restore(state.part("optimizer"))
        self.batches.restore(state.part("batches"))
        if self.network.pruned != bool(run.progress.cuts):
            raise_corrupted("its cuts are out of bounds")
        self.progress, self.issued, self.size = run.progress, run.progress.step, run.size
        self.monitor.replay(self.progress.losses)
        self.ranks_frozen = run.ranks_frozen
        self.batches.max_micro_batch = min(self.batches.max_micro_batch, run.max_micro_batch)
        self._batch_states.clear()
        self.runner.reset()
        if run.resize_due:
            self._resize()
        self._update_ranks()

    def warm_start(self, factors: Mapping[str, Factors]) -> WarmStart:
        """Start from factors by layer (warm_start.py); call it before the first step."""
        started = warm_start(self.network, factors)
        self.size = self.network.size()
        self.optimizer = Optimizer(self.network, self.config)
        self.runner.reset()
        self._update_ranks()
        return started

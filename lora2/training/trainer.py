"""The loop: draw a batch, step, let the ranks follow, cut them until they are settled, and say how it goes."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..adapters.network import AdaptiveNetwork
from ..adapters.prune import prune
from ..checkpoints.network_state import restore, state_of
from ..checkpoints.state import MAX_STEPS, State, raise_corrupted
from ..config import TrainingConfig
from ..method import schedule
from ..method import size_search as enough
from ..method.allocation import next_cut_size
from ..method.attention_entropy import EntropyProbe
from ..method.factors import Factors
from ..method.losses import denoising_loss
from ..util.errors import LoraError
from ..util.memory import OutOfMemory, free_cached_memory, try_allocating
from .batches import Batch, Batches
from .cuda_graph import step_runner
from .denoiser import Denoiser
from .monitor import Diverged, Monitor
from .optimizer import Optimizer
from .out_of_memory import advice
from .progress import Progress
from .step import StepResult
from .warm_start import WarmStart, warm_start

log = logging.getLogger("lora2")

T = TypeVar("T")

STEPS_AHEAD = 1
"""Steps that a GPU may be given before the last one's loss is read: a cancel waits for them."""

MAX_PARAMETERS = 1 << 40
"""More than any adapter has: what a state may claim."""


class Trainer:
    """One run of a network on a dataset. `run` may be left by any exception; the network then holds what was learned."""

    def __init__(
        self,
        network: AdaptiveNetwork,
        denoiser: Denoiser,
        latents: Sequence[Tensor],
        config: TrainingConfig,
        entropy: EntropyProbe | None = None,
        graphs: bool = True,
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.network = network
        self.denoiser = denoiser
        self.config = config = config.resolved_for(len(latents))
        self.entropy = entropy if config.entropy_weight > 0 else None
        self.samples = Batches(latents, denoiser, config, config.batch_size, (config.seed + 1, config.seed + 2))
        self.optimizer = Optimizer(network, config)
        self.engine = step_runner(
            network, lambda part: self.loss(part.clean, part.noise, part.sigma, part.conditioning), graphs
        )
        self.progress = Progress(config.steps, ranks=network.ranks())
        self._size = network.size()
        self._issued = 0
        self._pending: list[StepResult] = []
        self._ahead = STEPS_AHEAD if network.device.type == "cuda" else 0
        self._say = say
        self._judge = Monitor(network, config, say)
        self._on_step: Callable[[Progress], None] | None = None
        self._torn = self._rested = False
        self._marks: deque[tuple[int, State]] = deque(maxlen=STEPS_AHEAD + 2)

    def run(
        self,
        on_step: Callable[[Progress], None] | None = None,
        on_state: Callable[[], object] | None = None,
        state_every: int = 0,
    ) -> Progress:
        """Train to the end. on_step is called after every step, and while sizes are compared, and may raise to stop.

        Raises Diverged where the loss or gradients are not finite (or, where such steps are skipped, are so too often), and
        OutOfMemory.
        on_state is called after every `state_every` steps, but not after the last one, to take `state`; 0 = never.
        On a GPU the loop runs a little ahead: `progress` counts the steps that are known to be done.
        """
        start = time.monotonic() - self.progress.seconds
        self._on_step = on_step
        with ExitStack() as stack:
            stack.enter_context(self.network.attached())
            if self.entropy is not None:
                stack.enter_context(self.entropy.attached())
            stack.callback(self.engine.forget)
            stack.callback(self.network.drop_gradients)
            stack.callback(self._collect, 0, False)
            while self._issued < self.config.steps:
                self._cut_if_due()
                self._rest_if_due()
                self._step()
                last = self._issued == self.config.steps
                due = on_state is not None and state_every > 0 and self._issued % state_every == 0 and not last
                self._collect(0 if last or due else self._ahead)
                self.progress.seconds = max(self.progress.seconds, time.monotonic() - start)  # a clock may jump back
                if due and on_state is not None:
                    on_state()
                if on_step is not None:
                    on_step(self.progress)
        return self.progress

    def _step(self) -> None:
        config, step = self.config, self._issued
        drawn: list[Batch] = []  # once: an attempt that failed is made again with the same samples
        moves = config.ranks_adapt(step) and not self._rested
        self._marks.append((step, self.samples.state()))
        result = self._relieved(
            lambda: self.engine.step(
                self.samples.parts(drawn, config.accumulation), self.optimizer, self._rate(step), moves
            ),
            self._less,
        )
        self._pending.append(StepResult(result))
        self._issued += 1
        if self._issued == config.steps:
            self._note_ranks()  # without a sync: arrays that grew now would never be trained
        elif self._issued % config.sync_every == 0:
            self._sync()

    def _sync(self) -> None:
        with self._changing():
            if self._relieved(lambda: self.network.sync_capacities(self.optimizer.inner), self._graphs_dropped()):
                self.engine.forget()
        self._note_ranks()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around what changes the network in several steps: an error in between leaves no state to go on from."""
        self._torn = True
        yield
        self._torn = False

    def _collect(self, ahead: int, judge: bool = True) -> None:
        """Read the results of all but the last `ahead` steps; raises Diverged at the first step that may not be skipped."""
        while len(self._pending) > ahead:
            try:
                self._judge(self.progress, *self._pending.pop(0).read(), judge)
            except Diverged:
                self._pending.clear()
                raise

    # -- memory ----------------------------------------------------------------------------------------------------

    def _relieved(self, work: Callable[[], T], change: Callable[[], str | None]) -> T:
        """What `work` gives; where memory runs out, once more after every change that makes it need less.

        change: makes one and says what, None where there is none left. Raises OutOfMemory then.
        """
        while not (done := try_allocating(work)):
            words = None if self.optimizer.partially_applied else change()
            self._let_go()
            if words is None:
                raise OutOfMemory(
                    f"Memory ran out at step {self._issued + 1}. {advice(self.config, self.progress.changes)}"
                )
            if words:
                self.progress.changes.append(words)
                self._say(f"Memory ran out at step {self._issued + 1}: {words}, and the step is made again.")
        return done[0]

    def _let_go(self) -> None:
        """Drop everything that a failed attempt left, on the device and here."""
        if self.entropy is not None:
            self.entropy.forget()
        self.engine.forget()
        self.network.drop_gradients()
        free_cached_memory()

    def _less(self) -> str | None:
        """Make a step need less memory, with the same samples, noise and loss; in words what was changed."""
        if self.config.on_out_of_memory == "stop":
            return None
        if words := self.denoiser.save_memory():
            return words
        if (together := self.samples.largest) > 1:
            self.samples.most = math.ceil(together / 2)
            return f"{self.samples.most} of a batch's pictures at a time, not {together}"
        return self.engine.save_memory()

    @staticmethod
    def _graphs_dropped() -> Callable[[], str | None]:
        """A change that can be made once: recorded steps hold memory, and `_let_go` drops them."""
        once = [""]
        return lambda: once.pop() if once else None

    # -- ranks --------------------------------------------------------------------------------------------------------

    def _rate(self, step: int) -> float:
        """The learning rate's share now; in the paper's form it does not depend on the size, which has no end to be told by."""
        config = self.config
        factor = schedule.learning_rate_factor(step, config.steps, config.warmup, config.schedule)
        return factor * schedule.size_factor(self._size, self.network.budget) if config.cut_steps else factor

    def _cut_if_due(self) -> None:
        """Cut the layers where a step for it has come; the last cut meets the budget."""
        progress, network, steps = self.progress, self.network, self.config.cut_steps
        made = progress.cuts[-1] if progress.cuts else -1
        left = sum(step > self._issued for step in steps)
        # The last one also where it has passed unseen: a run may go on with fewer steps than it began with.
        due = any(made < step <= self._issued for step in steps) or (bool(steps) and not left)
        if progress.pruned or not due:
            return
        self._collect(0)
        self.engine.forget()
        with self._changing():
            self._relieved(lambda: network.sync_capacities(self.optimizer.inner), self._graphs_dropped())
            size, weights = next_cut_size(network.size(), network.budget, left), self.optimizer.sensitivities()
            choose = None if left or self.config.keep_share == 1 else self._enough
            self._relieved(lambda: prune(network, size, weights, choose), self._graphs_dropped())
            self.optimizer = Optimizer(network, self.config)
            self._size = network.size()
            progress.cuts.append(self._issued)
            progress.pruned = not left
        self._note_ranks()

    def _enough(self, show: Callable[[int], None], least: int, most: int) -> int:
        """The smallest size that keeps the share of what was learned that settings call enough, on samples of its own.

        `most` where that cannot be found out; the run says why.
        """
        config, own = self.config, self.samples
        seeds = config.seed + 3, config.seed + 4
        samples = Batches(own.data.latents, self.denoiser, config, enough.BATCH_SIZE, seeds)
        batches = [samples.draw() for _ in range(enough.SAMPLES // enough.BATCH_SIZE)]
        if own.most < config.batch_size:
            samples.most = min(enough.BATCH_SIZE, own.most)
        trouble = "training had not lowered the loss by the last cut"

        @torch.no_grad()
        def measured(size: int) -> float:
            show(size)
            parts = samples.parts(batches, len(batches))
            return float(sum(p.weight * self.loss(p.clean, p.noise, p.sigma, p.conditioning) for p in parts))

        def loss(size: int) -> float:
            nonlocal trouble
            if self._on_step is not None:
                self._on_step(self.progress)  # it takes a while: a person may want to stop it
            while not (done := try_allocating(lambda: measured(size))):
                self._let_go()
                if samples.largest <= 1:
                    trouble = "memory ran out while sizes were compared"
                    return math.nan
                samples.most = samples.largest // 2
            if not math.isfinite(done[0]):
                trouble = "the loss was not a number while sizes were compared"
            return done[0]

        found = enough.smallest_sufficient_size(loss, least, most, config.keep_share)
        if found is None:
            self._say(f"settle_keep cannot be used, and the target is filled: {trouble}.")
            return most
        log.info("LoRA²: %.0f %% of the target's size is enough.", 100 * found / most)
        return found

    def _rest_if_due(self) -> None:
        """In the paper's form, the moment from which ranks stand still."""
        if self._issued >= self.config.rest_step and self.config.settle_at >= 1 and not self._rested:
            self._collect(0)
            with self._changing():
                if self._relieved(lambda: self.network.freeze_ranks(self.optimizer.inner), self._graphs_dropped()):
                    self.engine.forget()
                self._rested = True
            self._note_ranks()

    def state(self) -> State:
        """All that the run needs to go on bit for bit from the last step that is done; waits for the device.

        After an error in the middle of a step it is the state before that step. Raises LoraError where the error left the
        factors half changed, and Diverged as `run` does.
        """
        self._collect(0)
        if self._torn or self.optimizer.partially_applied:
            raise LoraError("The error came while the factors were changing, so there is no state to go on from.")
        progress = self.progress
        drawing = next((mark for step, mark in self._marks if step == progress.step), None)
        facts = {
            "step": progress.step,
            "cuts": list(progress.cuts),
            "settled": progress.pruned,
            "size": self._size,
            "seconds": progress.seconds,
            "changes": list(progress.changes),
            "most": self.samples.most,
            "rested": self._rested,
            "sync_due": progress.step == self.config.steps and progress.step % self.config.sync_every == 0,
        }
        return State.joined(
            run=State({"losses": torch.tensor(progress.losses, dtype=torch.float64)}, facts),
            network=state_of(self.network),
            optimizer=self.optimizer.state(),
            drawing=drawing or self.samples.state(),
            config=State({}, self.config.to_dict()),
        )

    def restore(self, state: State) -> None:
        """Go on from a state of a run on the same layers and pictures; `settings` say how, their steps count from the start.

        Raises LoraError where the state is damaged or of another run, or has all the steps already; the trainer is of no
        use then.
        """
        run = state.part("run")
        step = run.integer("step", 1, MAX_STEPS)
        if step >= self.config.steps:
            raise LoraError(
                f"This training state has {step} steps behind it already. To go on, set steps above {step}: it counts from "
                "the start of the run."
            )
        losses = run.tensor("losses", (step,), torch.float64, finite=False)
        restore(self.network, state.part("network"))
        self.optimizer = Optimizer(self.network, self.config)
        self.optimizer.restore(state.part("optimizer"))
        self.samples.restore(state.part("drawing"))
        cuts = run.list_of("cuts", int) if self.network.pruned else []
        if sorted(set(cuts)) != cuts or not all(0 <= cut <= step for cut in cuts) or self.network.pruned != bool(cuts):
            raise_corrupted("its cuts are out of bounds")
        self._size, settled = run.integer("size", 1, MAX_PARAMETERS), run.flag("settled")
        seconds, changes = run.number("seconds", 0, 1e12), list(run.list_of("changes", str))
        self.progress = Progress(self.config.steps, step, losses.tolist(), {}, list(cuts), settled, seconds, changes)
        self._judge.remember(self.progress.losses)
        self._rested = run.flag("rested")
        self.samples.most = min(self.samples.most, run.integer("most", 1, MAX_STEPS))
        self._issued = step
        self._marks.clear()
        self.engine.forget()
        if run.flag("sync_due"):
            self._sync()
        self._note_ranks()

    def warm_start(self, factors: Mapping[str, Factors]) -> WarmStart:
        """Begin with factors by layer instead of from nothing (start.py), before the first step."""
        started = warm_start(self.network, factors)
        self._size = self.network.size()
        self.optimizer = Optimizer(self.network, self.config)
        self.engine.forget()
        self._note_ranks()
        return started

    def _note_ranks(self) -> None:
        self.progress.ranks = self.network.ranks()

    def loss(self, clean: Tensor, noise: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """The denoising loss plus λ_e times the entropy of cross-attention."""
        denoiser, config = self.denoiser, self.config
        if self.entropy is not None:
            self.entropy.forget()
        noisy = denoiser.add_noise(sigma, noise, clean)
        predicted = denoiser.denoise(noisy, sigma, conditioning)
        loss = denoising_loss(predicted, clean, sigma, denoiser.prediction, config.min_snr_gamma, denoiser.sigma_data)
        entropy = self.entropy.take() if self.entropy is not None else None
        return loss if entropy is None else loss + config.entropy_weight * entropy

"""Configuration of a training run: every option with its default, limits and tooltip, and the schedule they define."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .util.errors import LoraError
from .util.knobs import check_knobs, knob

LAYER_CHOICES = ("attention", "attention + feed-forward", "all linear", "all linear + convolution")
TRISTATE = ("auto", "on", "off")

SEED_LIMIT = 2**64
"""Seeds of torch's generators and of ComfyUI's widget lie below."""

AUTO_WEIGHT_DECAY = -1.0
"""Sentinel: `resolved_for` replaces it by min(24 / pictures, 5, 0.5 / learning_rate)."""
DECAY_OF_ONE_PICTURE, MAX_AUTO_DECAY, MAX_AUTO_SHRINK = 24.0, 5.0, 0.5

MAX_RANK, MAX_STEPS = 4096, 1_000_000


@dataclass(frozen=True)
class TrainingConfig:
    """Options of one training run. Raises LoraError, naming the field, for a value outside its limits.

    A run with the defaults takes 600 steps and ends at a mean rank of 8:

    - Before step 0, every layer gets rank 32 (`initial_rank` 0: four times the target, at least 16). Until pruning is done,
      the learning rate is scaled by √(target size / current size), here 0.5 at first.
    - Steps 0 to 29: the learning rate warms up (`warmup` 0.05). Ranks are fixed (`rank_hold` 0.05), because the importances
      have no gradient while B is zero.
    - Steps 30 to 89: ranks adapt. θ follows the loss and λ_r Σ|ν − ν_target| (`rank_weight`) at `rank_learning_rate`.
    - Before steps 90, 180 and 270 (`settle_cuts` 3, the last at `settle_at` 0.45): cuts. Each layer is rotated into its SVD,
      and the components that the loss would miss least for their size are removed over all layers together. Sizes fall in
      equal ratios: mean rank 32 → 20 → 13 → 8. `min_rank` 0 lets a cut remove a whole layer. From the first cut on ranks
      change by cuts only.
    - Steps 270 to 599: the pruned LoRA is trained as a plain one.

    With `settle_at` = 1 nothing is pruned, as in the paper: θ moves from step 30 to 449 and ranks are fixed for the last
    150 steps (`rank_rest` 0.25). With `settle_at` = 0 the only cut is before step 0: a LoRA of fixed rank.

    The size to end with is `target_rank` in every layer, or `budget_mb` megabytes (10⁶ bytes) if that is above 0. With
    `settle_keep` below 1 the target is an upper limit: the last cut takes the smallest size that preserves this fraction of
    the loss reduction. A budget is always filled.

    The default `weight_decay` of −1 is not a decay: an optimizer needs the config that `resolved_for` returns. `Trainer`
    does that.

    `bytes_per_parameter`, `file_overhead` and `layer_overhead` convert parameters to bytes of a file: its number type, its
    bytes besides the factors, and those of them that a removed layer frees. The host fills them in.
    """

    # fmt: off
    steps: int = knob(600, low=1, high=MAX_STEPS, advanced=False, tooltip=
        "Number of optimizer steps. Typical: 400 to 1500 for a subject with 5 to 20 pictures.")
    learning_rate: float = knob(3e-4, low=1e-8, high=1.0, step=1e-5, advanced=False, tooltip=
        "Step size of the optimizer. Lower it if pictures look burnt, raise it if the subject is missing.")
    batch_size: int = knob(1, low=1, high=1024, advanced=False, tooltip=
        "Pictures per batch. Larger batches give less noisy steps and need more memory.")
    accumulation: int = knob(1, low=1, high=1024, tooltip=
        "Batches per step (gradient accumulation): a larger effective batch without more memory.")
    target_rank: int = knob(8, low=1, high=MAX_RANK, advanced=False, tooltip=
        "Mean rank after pruning; it sets the file size. Set one number; the pack distributes it across layers.")
    budget_mb: float = knob(0.0, low=0.0, high=100_000.0, step=0.1, advanced=False, tooltip=
        "File size in MB (1 MB = 1,000,000 bytes), used instead of target_rank. 0 = use target_rank.")
    initial_rank: int = knob(0, low=0, high=MAX_RANK, tooltip=
        "Rank of every layer at the start. 0 = four times the target, at least 16.")
    min_rank: int = knob(0, low=0, high=MAX_RANK, tooltip=
        "Lowest rank of a layer. 0 = pruning may remove whole layers.")
    max_rank: int = knob(0, low=0, high=MAX_RANK, tooltip=
        "Highest rank of a layer. 0 = limited only by the layer's dimensions.")
    q: float = knob(0.9, low=0.01, high=0.9999, step=0.01, tooltip=
        "Fraction of the importance mass that a layer's rank covers while ranks adapt.")
    rank_weight: float = knob(1e-4, low=0.0, high=100.0, step=1e-5, tooltip=
        "Weight λ_r of the loss term that pulls ranks toward the target while they adapt. 0 = no pull.")
    rank_learning_rate: float = knob(1e-2, low=1e-6, high=1.0, step=1e-3, tooltip=
        "Step size of the ranks while they adapt: 0.01 changes a rank by at most about 1 % per step.")
    rank_hold: float = knob(0.05, low=0.0, high=1.0, step=0.01, tooltip=
        "Fraction of the steps, from the start, during which ranks are fixed: their gradient is not informative yet.")
    rank_rest: float = knob(0.25, low=0.0, high=1.0)
    settle_at: float = knob(0.45, low=0.0, high=1.0, step=0.05, tooltip=
        "When pruning ends, as a fraction of the steps. Training continues at the pruned ranks. "
        "1 = never prune (the paper's method).")
    settle_cuts: int = knob(3, low=1, high=100, tooltip=
        "Number of cuts, evenly spaced up to settle_at, that prune the ranks to the target.")
    settle_keep: float = knob(1.0, low=0.1, high=1.0, step=0.01, tooltip=
        "Automatic size: 0.98 keeps the smallest file that preserves 98 % of the loss reduction, at most target_rank. "
        "1 = off. Has no effect with budget_mb.")
    entropy_weight: float = knob(1e-4, low=0.0, high=100.0, step=1e-5, tooltip=
        "Weight λ_e of the loss term that sharpens cross-attention (SD and SDXL families). 0 = off.")
    init: str = knob("fan-in", choices=("fan-in", "paper"), tooltip=
        "Scale of the initial factors. fan-in: by the layer's input dimension. paper: the paper's formula.")
    optimizer: str = knob("adamw", choices=("adamw", "adam", "sgd"), tooltip=
        "Optimizer of the LoRA's factors.")
    weight_decay: float = knob(AUTO_WEIGHT_DECAY, low=-1.0, high=10.0, step=0.001, tooltip=
        "Decoupled weight decay of adamw; more of it preserves more of the base model. "
        "-1 = automatic: 24 / number of pictures, at most 5. 0 = off.")
    schedule: str = knob("cosine", choices=("cosine", "constant"), tooltip=
        "Learning rate after warm-up. cosine: decay to a tenth. constant: no decay.")
    warmup: float = knob(0.05, low=0.0, high=1.0, step=0.01, tooltip=
        "Fraction of the steps, from the start, over which the learning rate rises linearly.")
    clip_norm: float = knob(1.0, low=0.0, high=1000.0, step=0.1, tooltip=
        "Gradient clipping: the largest gradient norm of a step. 0 = off.")
    min_snr_gamma: float = knob(0.0, low=0.0, high=100.0, step=0.5, tooltip=
        "γ of Min-SNR loss weighting; 5 is common. 0 = off.")
    timestep_sampling: str = knob("auto", choices=("auto", "uniform", "logit-normal", "shifted"), tooltip=
        "Distribution of the training timesteps. auto: uniform; for flow models, with the model's own shift.")
    caption_dropout: float = knob(0.0, low=0.0, high=1.0, step=0.05, tooltip=
        "Fraction of captions replaced by the empty caption.")
    seed: int = knob(0, low=0, high=SEED_LIMIT - 1, advanced=False, tooltip=
        "Seed of initialization, picture order and noise.")
    on_out_of_memory: str = knob("retry with less", choices=("retry with less", "stop"), tooltip=
        "When memory runs out. retry with less: repeat the step with gradient checkpointing (if it is on auto), then with "
        "fewer pictures at a time; the batch stays the same. stop: end the run.")
    on_bad_step: str = knob("stop", choices=("stop", "skip"), tooltip=
        "When a loss or gradient is not finite. stop: end the run and save the LoRA. skip: discard the step; too many such "
        "steps end the run too.")
    sync_every: int = knob(20, low=1, high=MAX_STEPS)
    bytes_per_parameter: int = knob(2, low=1, high=8)
    file_overhead: int = knob(0, low=0, high=10**9)
    layer_overhead: int = knob(0, low=0, high=10**9)
    # fmt: on

    def __post_init__(self) -> None:
        check_knobs(self)
        decay = self.weight_decay
        if AUTO_WEIGHT_DECAY < decay < 0:
            raise LoraError(f"weight_decay = {decay} must be -1 (automatic), 0 (off) or positive.")
        if decay * self.learning_rate > 1:
            raise LoraError(
                f"weight_decay = {decay} times learning_rate = {self.learning_rate} must be at most 1, or a step would flip "
                "the sign of the weights. Lower one of them."
            )
        for name, limit in (
            ("min_rank", "max_rank"),
            ("initial_rank", "max_rank"),
            ("target_rank", "max_rank"),
            ("min_rank", "target_rank"),
        ):
            highest = getattr(self, limit)
            unused = highest == 0 or (self.budget_mb and "target_rank" in (name, limit))
            if not unused and getattr(self, name) > highest:
                raise LoraError(f"{name} = {getattr(self, name)} must not be above {limit} = {highest}.")

    @property
    def cut_steps(self) -> tuple[int, ...]:
        """Steps before which layers are cut, ascending and distinct; empty with settle_at = 1."""
        if self.settle_at >= 1:
            return ()
        last, count = min(self.steps - 1, round(self.steps * self.settle_at)), min(self.settle_cuts, self.steps)
        return tuple(dict.fromkeys(round(last * (k + 1) / count) for k in range(count)))

    @property
    def adapting_steps(self) -> int:
        """Number of steps before the first cut; all steps if there is none."""
        return self.cut_steps[0] if self.cut_steps else self.steps

    @property
    def keep_share(self) -> float:
        """Fraction of the loss reduction that the last cut preserves; 1 with a budget, which is always filled."""
        return 1.0 if self.budget_mb else self.settle_keep

    @property
    def min_adapting_rank(self) -> int:
        """Lowest rank of θ: only a cut goes below 1."""
        return max(1, self.min_rank)

    def ranks_adapt(self, step: int) -> bool:
        """Whether θ is updated at this step (from 0): after `rank_hold` and before `rest_step`."""
        return round(self.steps * self.rank_hold) <= step < self.rest_step

    @property
    def rest_step(self) -> int:
        """First step of the final phase with fixed ranks (`rank_rest`); `steps` if layers are cut instead."""
        return self.steps - round(self.steps * self.rank_rest) if self.settle_at >= 1 else self.steps

    @property
    def removed_layer_parameters(self) -> int:
        """Parameters that a budget gains for every layer that is not in the file."""
        return self.layer_overhead // self.bytes_per_parameter if self.budget_mb else 0

    def resolved_for(self, pictures: int) -> TrainingConfig:
        """Return this config with an automatic weight decay replaced by its value for so many training pictures.

        Decay is the gradient of a normal prior on the factors; against the mean loss over n pictures the prior weighs 1 / n.
        Only adamw has decay: other optimizers get 0, so that the file's metadata state the truth.
        """
        if self.weight_decay != AUTO_WEIGHT_DECAY:
            return self
        decay = min(DECAY_OF_ONE_PICTURE / max(pictures, 1), MAX_AUTO_DECAY, MAX_AUTO_SHRINK / self.learning_rate)
        return replace(self, weight_decay=decay if self.optimizer == "adamw" else 0.0)

    def budget(self, costs: Sequence[int], limits: Sequence[int]) -> int:
        """Number of parameters to prune to. costs: parameters per unit of rank of each layer. limits: their highest ranks.

        Raises LoraError for a target or budget outside of what the layers can have.
        """
        highest = max(limits)
        if not self.budget_mb:
            if self.target_rank > highest:
                raise LoraError(
                    f"target_rank = {self.target_rank} is above the highest rank of any adapted layer. Choose a target of at "
                    f"most {highest}."
                )
            return _size(costs, limits, self.target_rank)
        budget = int((self.budget_mb * 1e6 - self.file_overhead) / self.bytes_per_parameter)
        floor = self.min_adapting_rank if self.settle_at >= 1 else self.min_rank
        smallest, largest = max(_size(costs, limits, floor), min(costs)), _size(costs, limits, highest)
        if budget < smallest:
            ranks = f"rank {floor} on all {len(costs)} layers" if floor else "rank 1 on a single layer"
            raise LoraError(
                f"budget_mb = {self.budget_mb:g} is smaller than {ranks}, which needs {self._megabytes(smallest)} MB. Raise "
                "budget_mb, or adapt fewer layers."
            )
        if budget > largest:
            raise LoraError(
                f"budget_mb = {self.budget_mb:g} is more than the {len(costs)} layers can hold: at their highest rank they take "
                f"{self._megabytes(largest)} MB. Lower budget_mb, raise max_rank, or adapt more layers."
            )
        return budget

    def _megabytes(self, parameters: int) -> str:
        return f"{(parameters * self.bytes_per_parameter + self.file_overhead) / 1e6:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for metadata and training states."""
        return asdict(self)


def _size(costs: Sequence[int], limits: Sequence[int], rank: int) -> int:
    """Parameters of all layers at this rank, or at their limit where that is lower."""
    return sum(cost * min(rank, limit) for cost, limit in zip(costs, limits, strict=True))

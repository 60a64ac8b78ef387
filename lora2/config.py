"""Everything a run can be told, checked before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from .util.errors import LoraError
from .util.text import escaped

LAYER_CHOICES = ("attention", "attention + feed-forward", "all linear", "all linear + convolution")
SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "adam", "sgd")
TIMESTEP_SAMPLINGS = ("auto", "uniform", "logit-normal", "shifted")
INITS = ("fan-in", "paper")
TRISTATE = ("auto", "on", "off")
PRECISIONS = ("auto", "bf16", "fp32")
OUT_OF_MEMORY = ("retry with less", "stop")
BAD_STEPS = ("stop", "skip")
MAX_NUMBER = 10**300
"""No number that is larger than this can be told: floats end soon after."""

SEED_LIMIT = 2**64
"""torch's generators take seeds below this, as ComfyUI's widget does."""

AUTO_WEIGHT_DECAY = -1.0
"""The weight decay that is chosen by the number of pictures."""
DECAY_OF_A_PICTURE, MOST_DECAY, MOST_SHRINK = 24.0, 5.0, 0.5
"""That of a single picture, which more of them share; the most that is chosen; and the most that a step may take off then."""

_KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "must be a whole number"),
    "float": (Real, "must be a number"),
    "str": (str, "must be a word"),
}


@dataclass(frozen=True)
class TrainingConfig:
    """The story of a run, with its defaults.

    A run of `steps` optimizer steps starts every layer at `initial_rank`. At first the ranks adapt: θ moves with
    `rank_learning_rate` (held still for the first `rank_hold` share), pulled toward `target_rank` by
    `rank_weight` · Σ|ν − ν_target|. Then they settle, in `settle_cuts` cuts that are evenly spaced over the first `settle_at`
    share of the steps: every layer is brought into the order of its singular values and all layers are cut together, in equal
    ratios down to the size of `target_rank` everywhere, or of `budget_mb` megabytes; training goes on at those ranks.
    While more positions are trained than that, `learning_rate` is lowered (schedule.py, `size_factor`).
    `settle_at` = 1 never settles: the paper's own form, in which ranks stand still for the last `rank_rest` share of the steps,
    so that what the last dropped positions held is learned again.

    target_rank: parameter-weighted mean rank to end with. budget_mb: size of the file in MB (10⁶ bytes) instead; 0 = none.
    settle_keep: the share of what training has taken off the loss by the last cut which is enough: below 1, that cut may end
    below the target (enough.py); a budget is filled all the same.
    initial_rank: 0 chooses four times the target, at least 16. max_rank: 0 = each layer's full rank. min_rank: 0 lets a cut drop
    whole layers; no rank adapts below 1.
    q: the share of the importance mass that a rank holds. rank_weight, entropy_weight: λ_r and λ_e of the paper.
    bytes_per_parameter, file_overhead, layer_overhead: how a number of parameters becomes a file's size, and how much smaller
    it is without one of the layers; a host fills them in.
    weight_decay: of AdamW alone, decoupled: a step takes learning rate times this off the factors; −1 = 24 by the number of
    pictures, at most 5, and at most 0.5 by the learning rate (`resolved_for`).
    min_snr_gamma: 0 = off. clip_norm: 0 = off. caption_dropout: share of captions replaced by the empty one.
    on_out_of_memory: make the step again in smaller parts, or stop. on_bad_step: what to do where gradients are not finite.
    """

    steps: int = 600
    learning_rate: float = 3e-4
    batch_size: int = 1
    accumulation: int = 1
    target_rank: int = 8
    budget_mb: float = 0.0
    initial_rank: int = 0
    min_rank: int = 0
    max_rank: int = 0
    q: float = 0.9
    rank_weight: float = 1e-4
    rank_learning_rate: float = 1e-2
    rank_hold: float = 0.05
    rank_rest: float = 0.25
    settle_at: float = 0.45
    settle_cuts: int = 3
    settle_keep: float = 1.0
    entropy_weight: float = 1e-4
    init: str = "fan-in"
    optimizer: str = "adamw"
    weight_decay: float = AUTO_WEIGHT_DECAY
    schedule: str = "cosine"
    warmup: float = 0.05
    clip_norm: float = 1.0
    min_snr_gamma: float = 0.0
    timestep_sampling: str = "auto"
    caption_dropout: float = 0.0
    seed: int = 0
    on_out_of_memory: str = "retry with less"
    on_bad_step: str = "stop"
    sync_every: int = 20
    bytes_per_parameter: int = 2
    file_overhead: int = 0
    layer_overhead: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, words = _KINDS[str(field.type)]
            value = getattr(self, field.name)
            self._require(isinstance(value, kind) and not isinstance(value, bool), field.name, words)
            self._require(not isinstance(value, int) or abs(value) < MAX_NUMBER, field.name, "is far too large")
        self._require(0 <= self.seed < SEED_LIMIT, "seed", "must lie between 0 and 2⁶⁴ − 1")
        self._require(self.bytes_per_parameter >= 1, "bytes_per_parameter", "must be at least 1")
        for name in ("file_overhead", "layer_overhead"):
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("steps", "batch_size", "accumulation", "target_rank", "settle_cuts", "sync_every"):
            self._require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("learning_rate", "rank_learning_rate"):
            value = getattr(self, name)
            self._require(math.isfinite(value) and value > 0, name, "must be a positive number")
        for name in ("rank_weight", "entropy_weight", "clip_norm", "min_snr_gamma", "budget_mb"):
            value = getattr(self, name)
            self._require(math.isfinite(value) and value >= 0, name, "must be zero or a positive number")
        decay = self.weight_decay
        told = math.isfinite(decay) and (decay >= 0 or decay == AUTO_WEIGHT_DECAY)
        self._require(
            told, "weight_decay", "must be zero or a positive number, or -1 to choose it by the number of pictures"
        )
        words = f"times learning_rate = {escaped(self.learning_rate)} must be at most 1: a step would take more than there is"
        self._require(decay * self.learning_rate <= 1, "weight_decay", words)
        for name in ("rank_hold", "rank_rest", "settle_at", "caption_dropout", "warmup"):
            self._require(0 <= getattr(self, name) <= 1, name, "is a share and must lie between 0 and 1")
        self._require(0.1 <= self.settle_keep <= 1, "settle_keep", "is a share and must lie between 0.1 and 1")
        self._require(0.01 <= self.q <= 0.9999, "q", "must lie between 0.01 and 0.9999")
        for name in ("initial_rank", "min_rank", "max_rank"):
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        if self.max_rank:
            self._require(self.min_rank <= self.max_rank, "min_rank", f"must not be above max_rank = {self.max_rank}")
            self._require(
                self.initial_rank <= self.max_rank, "initial_rank", f"must not be above max_rank = {self.max_rank}"
            )
            self._require(
                bool(self.budget_mb) or self.target_rank <= self.max_rank,
                "target_rank",
                f"must not be above max_rank = {self.max_rank}",
            )
        if not self.budget_mb:
            self._require(
                self.min_rank <= self.target_rank, "min_rank", f"must not be above target_rank = {self.target_rank}"
            )
        for name, choices in (
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("timestep_sampling", TIMESTEP_SAMPLINGS),
            ("init", INITS),
            ("on_out_of_memory", OUT_OF_MEMORY),
            ("on_bad_step", BAD_STEPS),
        ):
            self._require(getattr(self, name) in choices, name, f"must be one of {', '.join(choices)}")

    def _require(self, condition: bool, name: str, words: str) -> None:
        if not condition:
            raise LoraError(f"{name} = {escaped(getattr(self, name))} {words}.")

    @property
    def cut_steps(self) -> tuple[int, ...]:
        """The steps before which layers are cut, in their order, each once; none in the paper's form."""
        if self.settle_at >= 1:
            return ()
        last, count = min(self.steps - 1, round(self.steps * self.settle_at)), min(self.settle_cuts, self.steps)
        return tuple(dict.fromkeys(round(last * (k + 1) / count) for k in range(count)))

    @property
    def adapting_steps(self) -> int:
        """For how many steps ranks adapt at most."""
        return self.cut_steps[0] if self.cut_steps else self.steps

    @property
    def keep_share(self) -> float:
        """The share of what was learned that the last cut keeps; a budget is to be filled."""
        return 1.0 if self.budget_mb else self.settle_keep

    @property
    def min_adapting_rank(self) -> int:
        """The smallest rank that θ may ask for."""
        return max(1, self.min_rank)

    def ranks_adapt(self, step: int) -> bool:
        """Whether θ takes this step, counted from 0: not during the hold at the start, nor the rest at the end."""
        return round(self.steps * self.rank_hold) <= step < self.rest_step

    @property
    def rest_step(self) -> int:
        """The step before which ranks come to rest for good; equal to `steps` where they settle instead."""
        return self.steps - round(self.steps * self.rank_rest) if self.settle_at >= 1 else self.steps

    @property
    def removed_layer_parameters(self) -> int:
        """How many parameters more a budget allows for every layer that is not in the file."""
        return self.layer_overhead // self.bytes_per_parameter if self.budget_mb else 0

    def resolved_for(self, count: int) -> TrainingConfig:
        """The same settings, with the weight decay for so many pictures where it is to be chosen by them.

        Decay holds factors to zero as a normal prior does, whose weight against the mean loss over n pictures is as 1 / n.
        """
        if self.weight_decay != AUTO_WEIGHT_DECAY:
            return self
        if self.optimizer != "adamw":
            return replace(self, weight_decay=0.0)  # the others have none: it would be said in the file, and not be so
        return replace(
            self, weight_decay=min(DECAY_OF_A_PICTURE / max(count, 1), MOST_DECAY, MOST_SHRINK / self.learning_rate)
        )

    def with_file_format(self, overhead: int, bytes_per_parameter: int, of_a_layer: int = 0) -> TrainingConfig:
        """The same settings for a file with this many bytes beside the factors, and this many per parameter.

        of_a_layer: of the bytes beside the factors, those that are not there without one of the layers.
        """
        return replace(self, file_overhead=overhead, bytes_per_parameter=bytes_per_parameter, layer_overhead=of_a_layer)

    def budget(self, costs: Sequence[int], limits: Sequence[int]) -> int:
        """How many parameters layers of these costs and largest ranks may have together once settled.

        Raises LoraError for a target or a budget that they cannot have.
        """
        most = sum(c * limit for c, limit in zip(costs, limits, strict=True))
        if not self.budget_mb:
            if self.target_rank > max(limits):
                raise LoraError(
                    f"target_rank = {self.target_rank} is above what any adapted layer can hold: the largest has rank "
                    f"{max(limits)}. Choose a target of at most {max(limits)}."
                )
            return sum(c * min(self.target_rank, limit) for c, limit in zip(costs, limits, strict=True))
        budget = int((self.budget_mb * 1e6 - self.file_overhead) / self.bytes_per_parameter)
        floor = self.min_adapting_rank if self.settle_at >= 1 else self.min_rank
        least = max(sum(c * min(floor, limit) for c, limit in zip(costs, limits, strict=True)), min(costs))
        if budget < least:
            what = (
                f"rank {floor} on all {len(costs)} layers, which needs"
                if floor
                else "rank 1 on a single layer, which needs"
            )
            raise LoraError(
                f"budget_mb = {self.budget_mb:g} is smaller than {what} {self._megabytes(least)} MB. Raise budget_mb, or adapt "
                "fewer layers."
            )
        if budget > most:
            raise LoraError(
                f"budget_mb = {self.budget_mb:g} is more than the {len(costs)} layers can hold: at their largest rank they take "
                f"{self._megabytes(most)} MB. Lower budget_mb, raise max_rank, or adapt more layers."
            )
        return budget

    def _megabytes(self, parameters: int) -> str:
        return f"{(parameters * self.bytes_per_parameter + self.file_overhead) / 1e6:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for the file's metadata."""
        return asdict(self)

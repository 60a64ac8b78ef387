"""Which settings a run may go on with: those that it was made with, less what can change on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from ..config import TrainingConfig
from ..util.errors import LoraError
from ..util.text import escaped

SPENT = ("seed", "init", "initial_rank")
"""What decided the start, and nothing after it."""

SIZE = ("target_rank", "budget_mb", "min_rank", "max_rank", "settle_keep", "bytes_per_parameter")
"""What decides ranks: spent once layers have been cut."""

CUTS = ("settle_at", "settle_cuts")
"""When layers are cut."""

MOVES = ("rank_weight", "rank_learning_rate", "rank_hold", "rank_rest")
"""What moves ranks, or says when they move: spent once layers have been cut, or ranks come to rest."""

ADAMS = ("adam", "adamw")

_NODE_NAMES = {"bytes_per_parameter": "save_dtype"}


def config_from(facts: Mapping[str, Any]) -> TrainingConfig:
    """The settings in a state's facts; raises LoraError where they are none."""
    table = facts.get("config")
    known = {field.name for field in fields(TrainingConfig)}
    if not isinstance(table, dict) or not set(table) <= known:
        raise LoraError(
            "The training state holds settings that this version of LoRA² does not know: continue it with the version that "
            "made it, or continue from the LoRA file."
        )
    return TrainingConfig(**table)


def merge_configs(new: TrainingConfig, old: TrainingConfig) -> TrainingConfig:
    """The new settings with what belongs to the run: the room for the file's header, which sets the exact budget."""
    return replace(new, file_overhead=old.file_overhead, layer_overhead=old.layer_overhead)


def compare_configs(
    new: TrainingConfig, old: TrainingConfig, settled: bool, rested: bool = False
) -> tuple[list[str], list[str]]:
    """How settings differ from a state's: what stands in the way of going on, and what is different from here on.

    settled: whether the state's layers have been cut. rested: whether they have come to rest, in the paper's form: a rest is
    for good, but they may still settle, which cuts them to the size that is asked for now.
    Every other step is that of the same run with the new values.
    """
    wrong: list[str] = []
    changed: list[str] = []
    values, before = asdict(new), asdict(old)
    for name in values:
        if values[name] == before[name] or name in ("steps", "file_overhead", "layer_overhead"):
            continue
        if name == "bytes_per_parameter" and not (new.budget_mb and old.budget_mb):
            continue
        words = f"{_NODE_NAMES.get(name, name)} is {escaped(values[name])}, it was {escaped(before[name])}"
        if name == "bytes_per_parameter":
            words = "save_dtype has another size of number, and budget_mb counts on it"
        if name in SPENT:
            changed.append(f"{words}: it only decides the start and does nothing now")
        elif name in CUTS and settled and new.settle_at < 1:
            changed.append(f"{words}: what was cut stays cut")
        elif name in MOVES and (settled or rested):
            changed.append(f"{words}: the ranks do not move any more, so it does nothing now")
        elif _stands_in_the_way(name, new, old, settled, rested):
            wrong.append(words)
        else:
            changed.append(words)
    return wrong, changed


def _stands_in_the_way(name: str, new: TrainingConfig, old: TrainingConfig, settled: bool, rested: bool) -> bool:
    """Whether a state cannot go on with another value: its moments, its importances or its ranks would mean nothing."""
    if name == "optimizer":
        return not (new.optimizer in ADAMS and old.optimizer in ADAMS)
    if name == "q":
        return not settled
    return (settled or (rested and new.settle_at >= 1)) and name in (*SIZE, *CUTS)

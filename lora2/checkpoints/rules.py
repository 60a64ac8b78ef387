"""Which settings of a resumed run may differ from those of its training state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from ..config import TrainingConfig
from ..util.errors import LoraError
from ..util.text import escaped

START_SETTINGS = ("seed", "init", "initial_rank")
"""Used at the start only."""

SIZE_SETTINGS = ("target_rank", "budget_mb", "min_rank", "max_rank", "settle_keep", "bytes_per_parameter")
"""Decide the ranks; fixed once layers have been pruned."""

CUT_SETTINGS = ("settle_at", "settle_cuts")
"""Schedule the cuts."""

RANK_SETTINGS = ("rank_weight", "rank_learning_rate", "rank_hold", "rank_rest")
"""Move the ranks; without effect once layers have been pruned or the ranks are frozen."""

IGNORED = ("steps", "file_overhead", "layer_overhead")
"""May always differ."""

ADAM_OPTIMIZERS = ("adam", "adamw")
"""Share their moments."""

_NODE_NAMES = {"bytes_per_parameter": "save_dtype"}


def config_from(facts: Mapping[str, Any]) -> TrainingConfig:
    """The configuration in a state's facts. Raises LoraError where it has settings that this version does not know."""
    table = facts.get("config")
    known = {field.name for field in fields(TrainingConfig)}
    if not isinstance(table, dict) or not set(table) <= known:
        raise LoraError(
            "The training state holds settings that this version of LoRA² does not know: continue it with the version that "
            "made it, or continue from the LoRA file."
        )
    return TrainingConfig(**table)


def merge_configs(new: TrainingConfig, old: TrainingConfig) -> TrainingConfig:
    """The new configuration with the old bytes for the file's header, from which a budget is computed."""
    return replace(new, file_overhead=old.file_overhead, layer_overhead=old.layer_overhead)


def compare_configs(
    new: TrainingConfig, old: TrainingConfig, pruned: bool, frozen: bool = False
) -> tuple[list[str], list[str]]:
    """Differences that prevent resuming, and those that take effect from the next step on; as clauses of a sentence.

    pruned: the state's layers have been cut. frozen: its ranks rest for good, in the paper's form; they may still be pruned, to
    the size that is asked for now.
    """
    preventing: list[str] = []
    changed: list[str] = []
    values, before = asdict(new), asdict(old)
    for name in values:
        if values[name] == before[name] or name in IGNORED:
            continue
        if name == "bytes_per_parameter" and not (new.budget_mb and old.budget_mb):
            continue
        change = f"{_NODE_NAMES.get(name, name)} is {escaped(values[name])}, it was {escaped(before[name])}"
        if name == "bytes_per_parameter":
            change = "save_dtype has another size of number, and budget_mb depends on it"
        if name in START_SETTINGS:
            changed.append(f"{change}: it only acts at the start and has no effect now")
        elif name in CUT_SETTINGS and pruned and new.settle_at < 1:
            changed.append(f"{change}: layers that were cut stay cut")
        elif name in RANK_SETTINGS and (pruned or frozen):
            changed.append(f"{change}: the ranks do not change any more, so it has no effect now")
        elif _prevents_resuming(name, new, old, pruned, frozen):
            preventing.append(change)
        else:
            changed.append(change)
    return preventing, changed


def _prevents_resuming(name: str, new: TrainingConfig, old: TrainingConfig, pruned: bool, frozen: bool) -> bool:
    """Whether the state's moments, importances or ranks would be meaningless under the new value."""
    if name == "optimizer":
        return not (new.optimizer in ADAM_OPTIMIZERS and old.optimizer in ADAM_OPTIMIZERS)
    if name == "q":
        return not pruned
    return (pruned or (frozen and new.settle_at >= 1)) and name in (*SIZE_SETTINGS, *CUT_SETTINGS)

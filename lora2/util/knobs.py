"""Knobs: dataclass fields that declare their default, limits, choices and tooltip.

Validation, the inputs of the nodes, the help pages and docs/nodes.md are derived from these declarations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from .errors import LoraError
from .text import escaped

_KINDS: dict[type, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
}


@dataclass(frozen=True)
class Knob:
    """Declaration of one option.

    low, high: inclusive limits of a number. step: increment of the widget. choices: allowed texts, none = any text.
    advanced: collapsed in the node, and optional over the API. An internal option has no tooltip and is no input.
    """

    default: int | float | str
    tooltip: str = ""
    low: float = 0
    high: float = 0
    step: float | None = None
    choices: tuple[str, ...] = ()
    advanced: bool = True

    def check(self, name: str, value: object) -> None:
        """Raise LoraError unless `value` has the type of the default and lies within the limits or choices."""
        kind, description = _KINDS[type(self.default)]
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                raise LoraError(f"{name} = {_quoted(value)} must be one of {', '.join(self.choices)}.")
        elif not isinstance(value, kind) or isinstance(value, bool):
            raise LoraError(f"{name} = {_quoted(value)} must be {description}.")
        elif isinstance(value, Real):
            check_range(name, value, self.low, self.high)


def knob(default: int | float | str, tooltip: str = "", **options: Any) -> Any:
    """A dataclass field with this default and a `Knob` of these options as its metadata."""
    return field(default=default, metadata={"knob": Knob(default, tooltip, **options)})


def knobs_of(config: Any) -> dict[str, Knob]:
    """Knobs of a dataclass or an instance of one, by field name."""
    return {f.name: f.metadata["knob"] for f in fields(config)}


def check_knobs(config: Any) -> None:
    """Raise LoraError, naming the field, unless every field of the instance fits its knob."""
    for name, declared in knobs_of(config).items():
        declared.check(name, getattr(config, name))


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise LoraError unless low ≤ value ≤ high; NaN is refused."""
    if not low <= value <= high:
        raise LoraError(f"{name} = {escaped(value)} must lie between {low} and {high}.")


def _quoted(value: object) -> str:
    return f"'{escaped(value)}'" if isinstance(value, str) else escaped(value)

"""JSON out of a file that may be a stranger's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from .errors import LoraError
from .text import escaped


def load_json(text: str, most: int, deepest: int, refuse: Callable[[str], NoReturn], has: str = "it has") -> Any:
    """The value of a JSON text of at most `most` characters, `deepest` levels of nesting and finite numbers.

    refuse: raises the LoraError for what is wrong, which it is told in words. has: how they begin where the text is too long.
    """
    if len(text) > most:
        refuse(f"{has} {len(text)} characters, the most that is read is {most}")
    try:
        value = json.loads(text, parse_constant=lambda name: refuse(f"it holds {name}"))
    except LoraError:
        raise
    except (RecursionError, ValueError) as error:
        refuse(escaped(error))
    _check_values(value, deepest, refuse)
    return value


def _check_values(value: Any, deepest: int, refuse: Callable[[str], NoReturn]) -> None:
    """No number beyond finite ones, no nesting beyond the limit; without recursion, whatever the depth."""
    level = [value]
    for _ in range(deepest):
        below: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                below.extend(item.values() if isinstance(item, dict) else item)
            elif isinstance(item, float) and not math.isfinite(item):
                refuse("it holds a number that is not finite")
        if not below:
            return
        level = below
    refuse(f"it is nested more than {deepest} deep")

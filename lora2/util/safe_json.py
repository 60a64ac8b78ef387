"""Parsing of untrusted JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from .errors import LoraError
from .text import escaped


def load_json(
    text: str, max_length: int, max_depth: int, refuse: Callable[[str], NoReturn], subject: str = "it has"
) -> Any:
    """Parse JSON of at most `max_length` characters and `max_depth` levels of nesting, without NaN and infinity.

    refuse: raises a LoraError for a reason. subject: how the reason begins where the text is too long.
    """
    if len(text) > max_length:
        refuse(f"{subject} {len(text)} characters, the limit is {max_length}")
    try:
        value = json.loads(text, parse_constant=lambda name: refuse(f"it contains {name}"))
    except LoraError:
        raise
    except (RecursionError, ValueError) as error:
        refuse(escaped(error))
    _check_values(value, max_depth, refuse)
    return value


def _check_values(value: Any, max_depth: int, refuse: Callable[[str], NoReturn]) -> None:
    """Refuse numbers that are not finite and nesting beyond the limit; iterative, so that no depth exhausts the stack."""
    level = [value]
    for _ in range(max_depth):
        below: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                below.extend(item.values() if isinstance(item, dict) else item)
            elif isinstance(item, float) and not math.isfinite(item):
                refuse("it contains a number that is not finite")
        if not below:
            return
        level = below
    refuse(f"it is nested more than {max_depth} levels deep")

"""What every node does before and after its work: its inputs are checked, and a ComfyUI that does not fit is named."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io

from ...lora2.util.errors import LoraError
from ...lora2.util.text import escaped
from .apply_lora import is_clip, is_model
from .versions import incompatibility

TEXT_LIMIT = 10_000
"""Characters of a text input: more than any name or any list of patterns needs."""


def checked_inputs(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """A node's `execute` behind a check of everything it is given.

    The widgets check what a person types; over the API, and through links from nodes that give anything, every input can
    hold everything. Raises LoraError, naming the input, for what its schema does not allow.
    """

    @functools.wraps(execute)
    def checked(cls: Any, **given: Any) -> io.NodeOutput:
        try:
            schema = cls.define_schema()
            return execute(cls, **check_inputs(schema.inputs, given, schema.is_input_list))
        except LoraError:
            raise
        except Exception as error:
            words = incompatibility(error)
            if words is None:
                raise
            raise LoraError(words) from error

    return checked


def check_inputs(inputs: Sequence[io.Input], given: Mapping[str, Any], lists: bool) -> dict[str, Any]:
    """The values given, each checked against its input; those left open are left out, for the defaults of `execute`.

    lists: every value is a list of values, as nodes get them that take whole lists. Raises LoraError.
    """
    values = {}
    for known in inputs:
        name = known.id
        if name not in given:
            continue
        value = given[name]
        if lists:
            if not value and known.get_io_type() not in _OWN_CHECKS:
                raise LoraError(f"{name} received an empty list. {_ADVICE}")
            if known.optional and all(item is None for item in value):
                continue
            for item in value:
                _check(known, item)
        elif value is None and known.optional:
            continue
        else:
            _check(known, value)
        values[name] = value
    return values


def _check(known: Any, value: Any) -> None:
    """Raise LoraError unless the value is of the kind that its input takes, and within its limits."""
    kind = known.get_io_type()
    wanted, fits = _KINDS.get(kind, ("", _anything))
    if not fits(value):
        raise LoraError(f"{known.id} must be {wanted}, not {_described(value)}. {_ADVICE}")
    if kind == "STRING" and len(value) > TEXT_LIMIT:
        raise LoraError(f"{known.id} has {len(value)} characters; at most {TEXT_LIMIT} are read.")
    if kind in ("INT", "FLOAT"):
        low, high = getattr(known, "min", None), getattr(known, "max", None)
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if not low <= value <= high:  # nor does NaN
            raise LoraError(f"{known.id} = {escaped(value)} must lie between {low} and {high}.")


def _anything(_: Any) -> bool:
    return True


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


_ADVICE = "Look at what is connected to this input, or set it again."

_OWN_CHECKS = ("LATENT", "CONDITIONING")
"""Kinds whose own checks say more: they name the picture or the caption (host/dataset.py)."""

_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "INT": ("a whole number", _whole),
    "FLOAT": ("a number", _number),
    "STRING": ("a text", _text),
    "COMBO": ("one of the choices", _text),
    "BOOLEAN": ("true or false", lambda value: isinstance(value, bool)),
    "MODEL": ("a diffusion model, as Load Checkpoint gives it", is_model),
    "CLIP": ("a text encoder, as Load Checkpoint gives it", is_clip),
    "LORA_MODEL": ("a LoRA, as a training node gives it", lambda value: isinstance(value, Mapping)),
}


def _described(value: Any) -> str:
    """A value in words, as far as a message may repeat it."""
    if value is None:
        return "nothing"
    if isinstance(value, (bool, int, float)):
        return f"the {'value' if isinstance(value, bool) else 'number'} {escaped(value)}"
    if isinstance(value, str):
        return f"the text '{escaped(value)}'"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a table" if isinstance(value, dict) else f"a {escaped(type(value).__name__)}"

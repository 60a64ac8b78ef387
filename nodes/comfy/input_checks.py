"""Checks around a node's `execute`: inputs against its schema, errors against the ComfyUI version."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io

from ...lora2.util.errors import LoraError
from ...lora2.util.knobs import check_range
from ...lora2.util.text import escaped
from .apply_lora import is_clip, is_model
from .versions import incompatibility

MAX_TEXT_LENGTH = 10_000
"""Characters of a text input."""


def checked_inputs(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """Decorator of a node's `execute` that checks every input against the schema.

    Widgets check only what is typed into them: over the API, and through links of type *, an input can be of any type.
    Raises LoraError, naming the input, for a value that the schema does not allow, and for any error of `execute` that an
    incompatible ComfyUI explains.
    """

    @functools.wraps(execute)
    def checked(cls: Any, **given: Any) -> io.NodeOutput:
        try:
            schema = cls.define_schema()
            return execute(cls, **check_inputs(schema.inputs, given, schema.is_input_list))
        except LoraError:
            raise
        except Exception as error:
            message = incompatibility(error)
            if message is None:
                raise
            raise LoraError(message) from error

    return checked


def check_inputs(inputs: Sequence[io.Input], given: Mapping[str, Any], lists: bool) -> dict[str, Any]:
    """Values by input, checked. Optional inputs without a value are omitted, so that the defaults of `execute` apply.

    lists: each value is a list, as nodes with `is_input_list` receive it. Raises LoraError.
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
    """Raise LoraError unless the value has the type of its input and lies within its limits."""
    kind = known.get_io_type()
    if kind in _KINDS:
        expected, fits = _KINDS[kind]
        if not fits(value):
            raise LoraError(f"{known.id} must be {expected}, not {_described(value)}. {_ADVICE}")
    if kind == "STRING" and len(value) > MAX_TEXT_LENGTH:
        raise LoraError(f"{known.id} has {len(value)} characters, but may have at most {MAX_TEXT_LENGTH}. Shorten it.")
    if kind in ("INT", "FLOAT"):
        check_range(known.id, value, known.min, known.max)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


_ADVICE = "Check the connection to this input, or set it again."

_OWN_CHECKS = ("LATENT", "CONDITIONING")
"""Types that dataset.py checks itself, naming the image or the caption."""

_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "INT": ("a whole number", _whole),
    "FLOAT": ("a number", _number),
    "STRING": ("a text", _text),
    "COMBO": ("one of the choices", _text),
    "BOOLEAN": ("true or false", lambda value: isinstance(value, bool)),
    "MODEL": ("a diffusion model, such as that of Load Checkpoint", is_model),
    "CLIP": ("a text encoder, such as that of Load Checkpoint", is_clip),
    "LORA_MODEL": ("a LoRA from a training node", lambda value: isinstance(value, Mapping)),
}


def _described(value: Any) -> str:
    """Description of a value for a message: short and printable."""
    if value is None:
        return "nothing"
    if isinstance(value, (bool, int, float)):
        return f"the {'value' if isinstance(value, bool) else 'number'} {escaped(value)}"
    if isinstance(value, str):
        return f"the text '{escaped(value)}'"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a table" if isinstance(value, dict) else f"a {escaped(type(value).__name__)}"

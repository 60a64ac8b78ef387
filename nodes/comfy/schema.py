"""Schemas of nodes: socket types of this pack, and widgets made from knobs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...lora2.util.knobs import Knob

Ranks = io.Custom("LORA2_RANKS")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")

FINE_STEP = 0.01
"""Below this increment the widget does not round, so that a typed 0.00015 stays what it is."""


def widget(name: str, knob: Knob, **options: Any) -> io.Input:
    """The input for a knob. options: more arguments of the input, such as choices that depend on the machine."""
    options |= {"default": knob.default, "tooltip": knob.tooltip}
    if knob.advanced:
        options |= {"optional": True, "advanced": True}
    if knob.choices or "options" in options:
        return io.Combo.Input(name, **{"options": list(knob.choices), **options})
    if isinstance(knob.default, str):
        return io.String.Input(name, **options)
    limits = {"min": knob.low, "max": knob.high}
    if isinstance(knob.default, int):
        return io.Int.Input(name, **limits, **options)
    fine = knob.step is not None and knob.step < FINE_STEP
    return io.Float.Input(name, **limits, step=knob.step, round=False if fine else None, **options)

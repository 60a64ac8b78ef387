"""The method with one of its parts as it would be without: what ablations need that no setting can say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from benchmarks.evidence import moments
from benchmarks.models import pack

Patch = tuple[str, str, Callable[[Any], Any]]
"""A module of the pack, a name in it, and what makes the replacement from what is there."""


def _no_gain(own: Callable[..., tuple[float, float]]) -> Callable[..., tuple[float, float]]:
    """Λ as it is, and A so much larger that ΛA starts at a plain LoRA's scale: σ² = D / (3 d_in Σ f²)."""

    def starting(shape: tuple[int, ...], rank: int, settings: Any) -> tuple[float, float]:
        if settings.init == "paper":
            return own(shape, rank, settings)
        imp = pack("lora2.method.importance")
        energy = imp.kept_energy(rank, imp.mass_constant(settings.q) / rank)
        return math.sqrt(rank / (3 * math.prod(shape[1:]) * energy)), 1.0

    return starting


def _from_one(own: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The first position is 1, not 0."""
    return lambda position, nu: own(position + 1, nu)


def _nothing(own: Callable[..., Any]) -> Callable[..., None]:
    """Nothing is known of the layers' sensitivities."""
    return lambda *args, **more: None


def _as_they_are(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The positions themselves."""
    return lambda rows, device: rows


def _one(own: Callable[..., float]) -> Callable[..., float]:
    """The learning rate as it was given, however many parameters are trained."""
    return lambda *args, **more: 1.0


AND = ", "
"""Between the names of twists that are made together."""

TWISTS: dict[str, tuple[Patch, ...]] = {
    "": (),
    "no gain": (("lora2.adapters.network", "init_scale", _no_gain),),
    "positions from 1": (
        ("lora2.method.importance", "importance", _from_one),
        ("lora2.method.importance", "log_importance_slope", _from_one),
    ),
    "energy only": (("lora2.method.sensitivity", "sensitivities", _nothing),),
    "rate as given": (("lora2.method.schedule", "size_factor", _one),),
    "not mixed": (("lora2.adapters.layer", "rotate", _as_they_are),),
    "moments carried": (("lora2.training.trainer", "Trainer", moments.carrying),),
    "moments anew": (("lora2.training.trainer", "Trainer", moments.anew),),
}


@contextmanager
def twisted(name: str) -> Iterator[None]:
    """While inside, the pack's method has these twists, with commas between them; "" for none.

    Raises KeyError for one that there is not, and AttributeError where the pack no longer has what a twist replaces.
    """
    names = name.split(AND)
    if gone := [one for one in names if one not in TWISTS]:
        raise KeyError(f"There is no twist {gone[0]!r}; there are {', '.join(sorted(filter(None, TWISTS)))}.")
    kept: list[tuple[Any, str, Any]] = []
    try:
        for module_name, attribute, replacement in (patch for one in names for patch in TWISTS[one]):
            module = pack(module_name)
            own = getattr(module, attribute)
            kept.append((module, attribute, own))
            setattr(module, attribute, replacement(own))
        yield
    finally:
        for module, attribute, own in reversed(kept):
            setattr(module, attribute, own)

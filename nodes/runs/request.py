"""What the node was asked for, beside the training configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...lora2.config import LAYER_CHOICES, PRECISIONS, TRISTATE
from ...lora2.util.errors import LoraError
from .lora_file import DTYPES
from .resume import ON_DIFFERENCE, REFUSE
from .states import NOTHING


@dataclass(frozen=True)
class RunRequest:
    """What the node was asked for, beside the settings."""

    save_name: str
    target: str
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    checkpointing: str = "auto"
    precision: str = "auto"
    save_dtype: str = "fp16"
    continue_from: str = NOTHING
    on_difference: str = REFUSE
    state_every: int = 200
    states_kept: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.save_name, str):
            raise LoraError("save_name must be a text: the file's name, such as subjects/mug.")
        for name, choices in (
            ("target", LAYER_CHOICES),
            ("checkpointing", TRISTATE),
            ("precision", PRECISIONS),
            ("save_dtype", tuple(DTYPES)),
            ("on_difference", ON_DIFFERENCE),
        ):
            if getattr(self, name) not in choices:
                label = "layers" if name == "target" else name
                raise LoraError(f"{label} = {getattr(self, name)!r} must be one of {', '.join(choices)}.")
        for name, least in (("state_every", 0), ("states_kept", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise LoraError(f"{name} = {value!r} must be a whole number, at least {least}.")

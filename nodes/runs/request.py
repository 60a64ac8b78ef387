"""Options of a run that concern the host: what to adapt, how to compute, what to save and where to start."""

from __future__ import annotations

from dataclasses import dataclass

from ...lora2.config import LAYER_CHOICES, MAX_STEPS, TRISTATE
from ...lora2.util.knobs import check_knobs, knob
from .lora_file import DTYPES
from .resume import ON_DIFFERENCE
from .states import NOTHING


@dataclass(frozen=True)
class RunRequest:
    """Options of a run besides its TrainingConfig. Raises LoraError, naming the field, for a value outside its limits.

    include, exclude: patterns separated by whitespace. continue_from: checked where it is resolved (states.py).
    """

    # fmt: off
    save_name: str = knob("lora2/adaptive", advanced=False, tooltip=
        "File name in ComfyUI's LoRA folder, optionally with a subfolder. A number is appended; nothing is overwritten.")
    layers: str = knob(LAYER_CHOICES[0], choices=LAYER_CHOICES, advanced=False, tooltip=
        "Layers to adapt. attention, the paper's choice, is enough for a subject; more layers also learn a style.")
    include: str = knob("", tooltip=
        "Additional layers: patterns such as *ff.net*, separated by spaces, for module paths in the diffusion model.")
    exclude: str = knob("", tooltip=
        "Layers to leave out: patterns such as *attn1*, separated by spaces. Takes precedence over layers and include.")
    checkpointing: str = knob("auto", choices=TRISTATE, tooltip=
        "Gradient checkpointing: much less memory for about a third more time. auto: on when memory is short.")
    precision: str = knob("auto", choices=("auto", "bf16", "fp32"), tooltip=
        "Compute type of the model. auto: the model's own, except that bf16 or fp32 replaces fp16, whose gradients underflow.")
    save_dtype: str = knob("fp16", choices=tuple(DTYPES), tooltip=
        "Number type of the saved file.")
    continue_from: str = knob(NOTHING, tooltip=
        "Resume a training state (steps counts from its start), or start from a LoRA file. "
        "newest state: the latest one of this save_name.")
    on_difference: str = knob(ON_DIFFERENCE[0], choices=ON_DIFFERENCE, tooltip=
        "When a state has another model, dataset, layers or fixed options. refuse: stop and name the differences. "
        "start from its factors: a new run that starts with the state's factors.")
    state_every: int = knob(200, low=0, high=MAX_STEPS, tooltip=
        "Steps between training states: the most that a crash costs. 0 = only when the run ends or is stopped.")
    states_kept: int = knob(2, low=1, high=1000, tooltip=
        "Training states that a run keeps in output/lora2_states. A finished run keeps its last one only.")
    # fmt: on

    def __post_init__(self) -> None:
        check_knobs(self)

"""Train Adaptive LoRA: every layer learns its own rank while the model learns the subject."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..lora2.config import TrainingConfig
from ..lora2.files.document import parse
from ..lora2.report.ranks import build_report
from ..lora2.report.summary import rank_picture
from .comfy import lora_paths as files
from .comfy.apply_lora import apply_lora
from .comfy.images import rank_image
from .comfy.input_checks import checked_inputs
from .comfy.progress import send_preview, status_sender
from .runs import states
from .runs.run import RunRequest, train
from .train_inputs import inputs

Ranks = io.Custom("LORA2_RANKS")
LossMap = io.Custom("LOSS_MAP")
LoraModel = io.Custom("LORA_MODEL")
REQUESTED = (
    "checkpointing",
    "precision",
    "save_dtype",
    "continue_from",
    "on_difference",
    "state_every",
    "states_kept",
)


class TrainAdaptiveLora(io.ComfyNode):
    """The node; nodes/runs/run.py trains."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the host shows it."""
        return io.Schema(
            node_id="LoRA2_TrainAdaptiveLora",
            display_name="Train Adaptive LoRA",
            category="LoRA²",
            description=(
                "Trains a LoRA on your pictures. Every layer finds out for itself how much rank it needs; you choose only "
                "how large the file may be. The LoRA is saved in ComfyUI's LoRA folder under a new name each time."
            ),
            search_aliases=["train lora", "adalora", "dynamic rank", "adaptive rank", "dreambooth", "fine-tune"],
            is_input_list=True,
            is_output_node=True,
            inputs=inputs(),
            outputs=[
                LoraModel.Output(
                    display_name="lora", tooltip="The LoRA, for ComfyUI's own Load LoRA Model and Save nodes too."
                ),
                io.Model.Output(display_name="model", tooltip="The model with the LoRA applied at strength 1."),
                Ranks.Output(display_name="ranks", tooltip="What every layer learned."),
                LossMap.Output(display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
                io.String.Output(display_name="file", tooltip="The saved file's name in ComfyUI's LoRA folder."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, continue_from: Any = None) -> bool | str:
        """In the place of the host's own check, which only says that a state is not in the list; the rest it checks itself."""
        values = continue_from if isinstance(continue_from, list) else [continue_from or states.NOTHING]
        return next((words for value in values if (words := states.why_unavailable(value))), True)

    @classmethod
    def fingerprint_inputs(cls, continue_from: Any = None, **_: Any) -> str:
        """A LoRA file that changed is read again. A state never changes, and what is newest now must not train anew by itself."""
        values = continue_from if isinstance(continue_from, list) else [continue_from]
        names = [v.removeprefix(states.LORA) for v in values if isinstance(v, str) and v.startswith(states.LORA)]
        return " ".join(str(files.lora_fingerprint(name)) for name in names)

    @classmethod
    @checked_inputs
    def execute(
        cls, latents: list[Any], conditioning: list[Any], empty_caption: list[Any] | None = None, **lists: Any
    ) -> io.NodeOutput:
        """Train, save, apply, and show the ranks; every input arrives as a list."""
        values = {name: value[0] for name, value in lists.items()}
        model = values.pop("model")
        request = RunRequest(
            save_name=values.pop("save_name"),
            target=values.pop("layers"),
            include=values.pop("include", "").split(),
            exclude=values.pop("exclude", "").split(),
            **{name: values.pop(name) for name in REQUESTED if name in values},
        )
        trained = train(
            model,
            latents,
            conditioning,
            TrainingConfig(**values),
            request,
            empty_caption,
            status_sender(cls.hidden.unique_id),
        )
        report = build_report(parse(trained.lora, trained.lora.metadata), trained.path.stem)
        send_preview(rank_picture(report))
        return io.NodeOutput(
            trained.lora,
            apply_lora(model, None, dict(trained.lora), 1.0, 0.0)[0],
            report,
            {"loss": trained.losses},
            trained.name,
            ui=ui.PreviewImage(rank_image(report), cls=cls),
        )


NODES = [TrainAdaptiveLora]

"""Train Adaptive LoRA: training with a rank of its own for every layer."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..lora2.config import TrainingConfig
from ..lora2.files.document import parse
from ..lora2.report.ranks import build_report
from ..lora2.report.summary import rank_picture
from ..lora2.util.knobs import knobs_of
from .comfy import lora_paths as files
from .comfy.apply_lora import apply_lora
from .comfy.images import rank_image
from .comfy.input_checks import checked_inputs
from .comfy.progress import send_preview, status_sender
from .comfy.schema import LoraModel, LossMap, Ranks, widget
from .runs import states
from .runs.request import RunRequest
from .runs.run import train

# fmt: off
INPUTS = (
    "model", "latents", "conditioning", "steps", "learning_rate", "batch_size", "target_rank", "budget_mb", "layers", "seed",
    "save_name", "initial_rank", "min_rank", "max_rank", "settle_at", "q", "rank_weight", "rank_learning_rate", "rank_hold",
    "entropy_weight", "init", "optimizer", "weight_decay", "schedule", "warmup", "accumulation", "clip_norm", "min_snr_gamma",
    "timestep_sampling", "caption_dropout", "checkpointing", "precision", "save_dtype", "include", "exclude", "empty_caption",
    "continue_from", "on_difference", "state_every", "states_kept", "on_out_of_memory", "on_bad_step", "settle_cuts",
    "settle_keep",
)
# fmt: on
"""Order of the inputs. Saved workflows store values by position: append, never reorder."""


def _inputs() -> list[io.Input]:
    sockets = [
        io.Model.Input("model", tooltip="Diffusion model to adapt. It is not changed."),
        io.Latent.Input(
            "latents", tooltip="Encoded pictures from Make Training Dataset, Resolution Bucket or a cached dataset."
        ),
        io.Conditioning.Input(
            "conditioning", tooltip="Encoded captions from the same dataset node: one per picture, or one for all."
        ),
        io.Conditioning.Input(
            "empty_caption",
            optional=True,
            advanced=True,
            tooltip="Replacement for captions dropped by caption_dropout. Zeros if not connected.",
        ),
    ]
    host_options: dict[str, dict[str, Any]] = {
        "seed": {"control_after_generate": io.ControlAfterGenerate.fixed},
        "continue_from": {"options": states.choices()},
    }
    by_name = {socket.id: socket for socket in sockets}
    knobs = knobs_of(TrainingConfig) | knobs_of(RunRequest)
    return [by_name.get(name) or widget(name, knobs[name], **host_options.get(name, {})) for name in INPUTS]


class TrainAdaptiveLora(io.ComfyNode):
    """Trains a LoRA, saves it, and returns it with the patched model and its ranks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema of the node. Called again whenever ComfyUI lists its nodes: states and LoRA files may have changed."""
        return io.Schema(
            node_id="LoRA2_TrainAdaptiveLora",
            display_name="Train Adaptive LoRA",
            category="LoRA²",
            description=(
                "Trains a LoRA on your pictures, with a rank of its own for every layer. Training starts at a higher rank and "
                "prunes the components that the loss would miss least, down to the file size that you set. The LoRA is saved "
                "in ComfyUI's LoRA folder under a new name each time."
            ),
            search_aliases=["train lora", "adalora", "dynamic rank", "adaptive rank", "dreambooth", "fine-tune"],
            is_input_list=True,
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                LoraModel.Output(
                    display_name="lora", tooltip="The LoRA; also fits ComfyUI's Load LoRA Model and Save nodes."
                ),
                io.Model.Output(display_name="model", tooltip="The model with the LoRA applied at strength 1."),
                Ranks.Output(display_name="ranks", tooltip="Rank of every layer, for other nodes of this pack."),
                LossMap.Output(display_name="loss", tooltip="Loss of every step, for Plot Loss Graph."),
                io.String.Output(display_name="file", tooltip="Name of the saved file in ComfyUI's LoRA folder."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, continue_from: Any = None) -> bool | str:
        """Check `continue_from` in place of ComfyUI, whose message would only say that the value is not in the list."""
        values = continue_from if isinstance(continue_from, list) else [continue_from or states.NOTHING]
        return next((message for value in values if (message := states.why_unavailable(value))), True)

    @classmethod
    def fingerprint_inputs(cls, continue_from: Any = None, **_: Any) -> str:
        """Fingerprint of the LoRA file in `continue_from`, so that a changed file is read again.

        A training state has none: it never changes, and a newer state must not start training by itself.
        """
        values = continue_from if isinstance(continue_from, list) else [continue_from]
        names = [v.removeprefix(states.LORA) for v in values if isinstance(v, str) and v.startswith(states.LORA)]
        return " ".join(str(files.lora_fingerprint(name)) for name in names)

    @classmethod
    @checked_inputs
    def execute(
        cls, latents: list[Any], conditioning: list[Any], empty_caption: list[Any] | None = None, **lists: Any
    ) -> io.NodeOutput:
        """Train, save, apply and draw the ranks. Every input is a list; widgets have one value."""
        values = {name: value[0] for name, value in lists.items()}
        model = values.pop("model")
        request = RunRequest(**{name: values.pop(name) for name in knobs_of(RunRequest) if name in values})
        config = TrainingConfig(**values)
        say = status_sender(cls.hidden.unique_id)
        trained = train(model, latents, conditioning, config, request, empty_caption, say)
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

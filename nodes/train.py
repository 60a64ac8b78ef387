"""Train Adaptive LoRA: every layer learns its own rank while the model learns the subject."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..lora2.format import parse
from ..lora2.report import build
from ..lora2.settings import INITS, OPTIMIZERS, SAMPLINGS, SCHEDULES, TARGETS, TRISTATE, Settings
from .host.progress import teller
from .host.session import Request, apply, train
from .pictures import rank_image

DEFAULTS = Settings()
PRECISIONS = ["auto", "bf16", "fp32"]
SAVE_DTYPES = ["fp16", "bf16", "fp32"]

Ranks = io.Custom("LORA2_RANKS")
LossMap = io.Custom("LOSS_MAP")
LoraModel = io.Custom("LORA_MODEL")


class TrainAdaptiveLora(io.ComfyNode):
    """The node; everything it does is in host.session."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to adapt. It is not changed."),
                io.Latent.Input(
                    "latents", tooltip="The pictures, encoded: from Make Training Dataset, Resolution Bucket or a cached dataset."
                ),
                io.Conditioning.Input(
                    "conditioning", tooltip="The captions, encoded by the same dataset node: one per picture, or one for all."
                ),
                io.Int.Input(
                    "steps", default=DEFAULTS.steps, min=1, max=1_000_000,
                    tooltip="How many times the LoRA is updated. 400 to 1500 for a subject of 5 to 20 pictures.",
                ),
                io.Float.Input(
                    "learning_rate", default=DEFAULTS.learning_rate, min=1e-8, max=1.0, step=1e-5, round=False,
                    tooltip="How far one step goes. Lower it when the result looks burnt, raise it when the subject is missing.",
                ),
                io.Int.Input(
                    "batch_size", default=DEFAULTS.batch_size, min=1, max=1024,
                    tooltip="Pictures per step. More is steadier and needs more memory.",
                ),
                io.Int.Input(
                    "target_rank", default=DEFAULTS.target_rank, min=1, max=4096,
                    tooltip="The mean rank to end with; it sets the file's size. Layers share it out among themselves.",
                ),
                io.Float.Input(
                    "budget_mb", default=DEFAULTS.budget_mb, min=0.0, max=100_000.0, step=0.1,
                    tooltip="The file's size in MB (1 MB = 1,000,000 bytes), instead of target_rank. 0 = use target_rank.",
                ),
                io.Combo.Input(
                    "layers", options=list(TARGETS), default=TARGETS[0],
                    tooltip="Which layers learn. Attention is what the paper adapts and suits subjects; more layers learn styles and detail.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Decides everything random: the start, the order of pictures, the noise.",
                ),
                io.String.Input(
                    "save_name", default="lora2/adaptive",
                    tooltip="Name in ComfyUI's LoRA folder, with a subfolder if you like. A number is added; nothing is overwritten.",
                ),
                io.Int.Input(
                    "initial_rank", default=DEFAULTS.initial_rank, min=0, max=4096, advanced=True,
                    tooltip="The rank every layer starts from. 0 = four times the target, at least 16.",
                ),
                io.Int.Input(
                    "min_rank", default=DEFAULTS.min_rank, min=1, max=4096, advanced=True, tooltip="No layer goes below this rank.",
                ),
                io.Int.Input(
                    "max_rank", default=DEFAULTS.max_rank, min=0, max=4096, advanced=True,
                    tooltip="No layer goes above this rank. 0 = as far as the layer's own size allows.",
                ),
                io.Float.Input(
                    "settle_at", default=DEFAULTS.settle_at, min=0.0, max=1.0, step=0.05, advanced=True,
                    tooltip="The share of the steps after which ranks stop adapting, are cut to the target by what they carry, and "
                    "training goes on as a plain LoRA. 1 = never: the paper's own form.",
                ),
                io.Float.Input(
                    "q", default=DEFAULTS.q, min=0.01, max=0.9999, step=0.01, advanced=True,
                    tooltip="The share of importance that a layer's rank holds while it adapts.",
                ),
                io.Float.Input(
                    "rank_weight", default=DEFAULTS.rank_weight, min=0.0, max=100.0, step=1e-5, round=False, advanced=True,
                    tooltip="How strongly ranks are pulled toward the target while they adapt. 0 lets them run.",
                ),
                io.Float.Input(
                    "rank_learning_rate", default=DEFAULTS.rank_learning_rate, min=1e-6, max=1.0, step=1e-3, round=False, advanced=True,
                    tooltip="How fast ranks move: 0.01 is at most about 1 % per step.",
                ),
                io.Float.Input(
                    "rank_hold", default=DEFAULTS.rank_hold, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="The share of the steps for which ranks stand still at the start, until there is something to measure.",
                ),
                io.Float.Input(
                    "entropy_weight", default=DEFAULTS.entropy_weight, min=0.0, max=100.0, step=1e-5, round=False, advanced=True,
                    tooltip="How strongly cross-attention is sharpened (SD and SDXL families). 0 = off.",
                ),
                io.Combo.Input(
                    "init", options=list(INITS), default=DEFAULTS.init, advanced=True,
                    tooltip="How factors start: scaled by the layer's inputs, or the paper's literal formula.",
                ),
                io.Combo.Input("optimizer", options=list(OPTIMIZERS), default=DEFAULTS.optimizer, advanced=True, tooltip="The optimizer."),
                io.Float.Input(
                    "weight_decay", default=DEFAULTS.weight_decay, min=0.0, max=10.0, step=0.001, round=False, advanced=True,
                    tooltip="Pulls the LoRA's weights toward zero.",
                ),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), default=DEFAULTS.schedule, advanced=True,
                    tooltip="The learning rate after its warm-up: falling along a cosine to a tenth, or constant.",
                ),
                io.Float.Input(
                    "warmup", default=DEFAULTS.warmup, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="The share of the steps over which the learning rate rises at the start.",
                ),
                io.Int.Input(
                    "accumulation", default=DEFAULTS.accumulation, min=1, max=1024, advanced=True,
                    tooltip="Batches per step: a larger effective batch without more memory.",
                ),
                io.Float.Input(
                    "clip_norm", default=DEFAULTS.clip_norm, min=0.0, max=1000.0, step=0.1, advanced=True,
                    tooltip="Gradients longer than this are shortened to it. 0 = off.",
                ),
                io.Float.Input(
                    "min_snr_gamma", default=DEFAULTS.min_snr_gamma, min=0.0, max=100.0, step=0.5, advanced=True,
                    tooltip="Min-SNR weighting of the timesteps; 5 is usual. 0 = off.",
                ),
                io.Combo.Input(
                    "timestep_sampling", options=list(SAMPLINGS), default=DEFAULTS.timestep_sampling, advanced=True,
                    tooltip="Which noise levels are trained. auto: all alike, for flow models with the model's own shift.",
                ),
                io.Float.Input(
                    "caption_dropout", default=DEFAULTS.caption_dropout, min=0.0, max=1.0, step=0.05, advanced=True,
                    tooltip="The share of captions replaced by the empty one.",
                ),
                io.Combo.Input(
                    "checkpointing", options=list(TRISTATE), default="auto", advanced=True,
                    tooltip="Gradient checkpointing: much less memory for about a third more time. auto: when memory is short.",
                ),
                io.Combo.Input(
                    "precision", options=PRECISIONS, default="auto", advanced=True,
                    tooltip="What the model computes in. auto keeps the model's own, and replaces fp16, which training does not stand.",
                ),
                io.Combo.Input(
                    "save_dtype", options=SAVE_DTYPES, default="fp16", advanced=True, tooltip="The number type in the file.",
                ),
                io.String.Input(
                    "include", default="", multiline=True, advanced=True,
                    tooltip="Layers to add, one pattern per line, such as *ff.net*. Paths are those of the diffusion model.",
                ),
                io.String.Input(
                    "exclude", default="", multiline=True, advanced=True,
                    tooltip="Layers to leave out, one pattern per line, such as *attn1*. Wins over everything else.",
                ),
                io.Conditioning.Input(
                    "empty_caption", optional=True, advanced=True,
                    tooltip="What a dropped caption becomes; a caption of zeros if not connected.",
                ),
            ],
            outputs=[
                LoraModel.Output(display_name="lora", tooltip="The LoRA, for ComfyUI's own Load LoRA Model and Save nodes too."),
                io.Model.Output(display_name="model", tooltip="The model with the LoRA applied at strength 1."),
                Ranks.Output(display_name="ranks", tooltip="What every layer learned."),
                LossMap.Output(display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
                io.String.Output(display_name="file", tooltip="The saved file's name in ComfyUI's LoRA folder."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latents: list[Any], conditioning: list[Any], empty_caption: list[Any] | None = None, **lists: Any) -> io.NodeOutput:
        values = {name: value[0] for name, value in lists.items()}
        model = values.pop("model")
        request = Request(
            save_name=values.pop("save_name"),
            target=values.pop("layers"),
            include=values.pop("include").split(),
            exclude=values.pop("exclude").split(),
            checkpointing=values.pop("checkpointing"),
            precision=values.pop("precision"),
            save_dtype=values.pop("save_dtype"),
        )
        trained = train(model, latents, conditioning, Settings(**values), request, empty_caption, teller(cls.hidden.unique_id))
        report = build(parse(trained.lora, trained.lora.metadata), trained.path.stem)
        return io.NodeOutput(
            trained.lora,
            apply(model, trained.lora),
            report,
            {"loss": trained.losses},
            trained.name,
            ui=ui.PreviewImage(rank_image(report), cls=cls),
        )


NODES = [TrainAdaptiveLora]

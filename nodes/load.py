"""Load Adaptive LoRA: applies a LoRA, whole or truncated to a fraction, a rank or a size."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora2.files.document import LoraDocument, read
from ..lora2.files.resize import ResizeResult, resize
from ..lora2.report.ranks import build_report
from ..lora2.util.text import format_size
from .comfy import apply_lora as loading
from .comfy import lora_paths as files
from .comfy.input_checks import checked_inputs
from .comfy.progress import status_sender, stop_if_cancelled
from .comfy.schema import Ranks


class LoadAdaptiveLora(io.ComfyNode):
    """Reads any LoRA file, truncates its plain layers on request, and applies it as ComfyUI's own loader does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema of the node. Called again whenever ComfyUI lists its nodes: LoRA files may have changed."""
        return io.Schema(
            node_id="LoRA2_LoadAdaptiveLora",
            display_name="Load Adaptive LoRA",
            category="LoRA²",
            description=(
                "Applies a LoRA to a model, whole or truncated to a fraction, a rank or a size, without training. Untruncated "
                "and at strength 1, it does exactly what ComfyUI's Load LoRA does. Reads any LoRA file."
            ),
            search_aliases=[
                "load lora",
                "lora loader",
                "resize lora",
                "reduce lora rank",
                "shrink lora",
                "adalora",
                "dynamic rank",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Diffusion model to apply the LoRA to."),
                io.Combo.Input("lora_name", options=files.lora_names(), tooltip="LoRA file in ComfyUI's LoRA folders."),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Strength of the LoRA on the diffusion model. 1 = as trained.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Strength of the LoRA on the text encoder, if the file has layers for it.",
                ),
                io.Float.Input(
                    "share",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of each layer's energy to keep (sum of its squared singular values). 1 = all.",
                ),
                io.Int.Input(
                    "max_rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Highest rank to keep in a layer. 0 = no limit.",
                ),
                io.Float.Input(
                    "megabytes",
                    default=0.0,
                    min=0.0,
                    max=100_000.0,
                    step=0.1,
                    tooltip="Size in MB (1 MB = 1,000,000 bytes) to fit: keeps the components with the most energy for their size "
                    "over all layers. 0 = no limit.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Text encoder to apply the LoRA to. May stay unconnected."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Model with the LoRA applied."),
                io.Clip.Output(
                    display_name="clip", tooltip="Text encoder with the LoRA applied; empty if none is connected."
                ),
                Ranks.Output(display_name="ranks", tooltip="Ranks of the loaded layers, after truncation."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any, **_: Any) -> str | float:
        """Fingerprint of the file, so that a changed file of the same name is read again."""
        return files.lora_fingerprint(lora_name)

    @classmethod
    @checked_inputs
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        share: float = 1.0,
        max_rank: int = 0,
        megabytes: float = 0.0,
        clip: Any = None,
    ) -> io.NodeOutput:
        """Read, match, truncate, apply; report the result as the node's status."""
        document = read(files.lora_path(lora_name))
        matched = loading.match(document, model, clip)
        result = resize(document, share, max_rank, megabytes, stop_if_cancelled)
        tensors = result.document.state_dict()
        changed = loading.apply_lora(
            model, clip, dict(tensors), strength_model, strength_clip, tensors.metadata, matched.keys
        )
        status_sender(cls.hidden.unique_id)(" ".join([matched.words(), *_cut_words(result), *document.notes]))
        return io.NodeOutput(*changed, _ranks(result.document, files.lora_title(lora_name)))


def _ranks(document: LoraDocument, title: str) -> Any:
    """Rank report; an absent output for a file without plain LoRA layers, which loads all the same."""
    if not document.layers:
        return loading.absent(f"{title} holds no plain LoRA layer, so it has no ranks to show.")
    return build_report(document, title)


def _cut_words(result: ResizeResult) -> list[str]:
    """Sentences on the layers that were truncated and those that cannot be."""
    words = []
    if result.bytes_after < result.bytes_before:
        words.append(f"Cut from {format_size(result.bytes_before)} to {format_size(result.bytes_after)}.")
    if result.uncut:
        kinds = ", ".join(sorted(set(result.uncut.values())))
        count = len(result.uncut)
        parts = "1 part cannot be cut and stays" if count == 1 else f"{count} parts cannot be cut and stay"
        words.append(f"{parts} whole: {kinds}.")
    return words


NODES = [LoadAdaptiveLora]

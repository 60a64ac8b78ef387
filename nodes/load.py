"""Load Adaptive LoRA: apply a LoRA whole, or cut to a share, a rank or a size without training."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..lora2.files.document import LoraDocument, read
from ..lora2.files.resize import ResizeResult, resize
from ..lora2.report.ranks import build_report
from ..lora2.util.text import format_size
from .comfy import lora_paths as files
from .comfy.apply_lora import apply_lora, blocked_output, match_layers
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
        """Read the file, check it against the model, resize it, apply it, report."""
        document = read(files.lora_path(lora_name))
        match = match_layers(document, model, clip)
        result = resize(document, share, max_rank, megabytes, stop_if_cancelled)
        lora = result.document.state_dict()
        patched = apply_lora(model, clip, dict(lora), strength_model, strength_clip, lora.metadata, match.host_names)
        status_sender(cls.hidden.unique_id)(" ".join([match.describe(), *_describe_cut(result), *document.notes]))
        return io.NodeOutput(*patched, _ranks(result.document, files.lora_title(lora_name)))


def _ranks(document: LoraDocument, title: str) -> Any:
    """The report, or a blocked output for a file without plain LoRA layers, which is applied all the same."""
    if not document.layers:
        return blocked_output(f"{title} holds no plain LoRA layer, so it has no ranks to show.")
    return build_report(document, title)


def _describe_cut(result: ResizeResult) -> list[str]:
    """Sentences about the reduction in size, and about the parts that cannot be cut."""
    sentences = []
    if result.bytes_after < result.bytes_before:
        sentences.append(f"Cut from {format_size(result.bytes_before)} to {format_size(result.bytes_after)}.")
    if result.uncut:
        kinds = ", ".join(sorted(set(result.uncut.values())))
        count = len(result.uncut)
        parts = "1 part cannot be cut and stays" if count == 1 else f"{count} parts cannot be cut and stay"
        sentences.append(f"{parts} whole: {kinds}.")
    return sentences


NODES = [LoadAdaptiveLora]

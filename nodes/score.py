"""Score Pictures: how alike generated pictures are to a subject's, and to their prompt."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..lora2.report.similarity import (
    CLIP_I,
    CLIP_T,
    DINO,
    METRICS,
    Scores,
    against_all,
    against_own,
    mean_scores,
    prompts_of,
)
from ..lora2.util.errors import LoraError
from .comfy.apply_lora import blocked_output
from .comfy.encoders import metric_of, name_of, picture_vectors, prompt_vectors

log = logging.getLogger("lora2")


class ScorePictures(io.ComfyNode):
    """CLIP-I, DINO and CLIP-T with the user's own encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the host shows it."""
        return io.Schema(
            node_id="LoRA2_ScorePictures",
            display_name="Score Pictures",
            category="LoRA²",
            description=(
                "Measures how well generated pictures keep a subject (CLIP-I, DINO) and follow their prompt (CLIP-T), with "
                "encoders that you load. To compare LoRAs, score the same prompts and seeds for each."
            ),
            search_aliases=[
                "clip score",
                "clip-i",
                "clip-t",
                "dino score",
                "dreambooth metrics",
                "evaluate lora",
                "similarity",
            ],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The generated pictures: a batch, or a list of any sizes."),
                io.Image.Input(
                    "references", tooltip="Real pictures of the subject. Best those that were not trained on."
                ),
                io.ClipVision.Input(
                    "encoder",
                    tooltip="From Load CLIP Vision. A CLIP vision model gives CLIP-I, and CLIP-T with a text encoder; a DINOv2 "
                    "model gives DINO.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="For CLIP-T: one line for all pictures, or one line for each, with the plain name of the subject's "
                    "kind in the place of a made-up word.",
                ),
                io.ClipVision.Input(
                    "second_encoder",
                    optional=True,
                    tooltip="An encoder of the other kind, to have CLIP-I and DINO together.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For CLIP-T: the text encoder that belongs to the CLIP vision model, with its projection.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The table that the node shows, in Markdown."),
                io.Float.Output(
                    display_name="clip_i", tooltip="CLIP-I: mean cosine of all pairs of picture and reference, by CLIP."
                ),
                io.Float.Output(
                    display_name="dino", tooltip="DINO: mean cosine of all pairs of picture and reference, by DINO."
                ),
                io.Float.Output(display_name="clip_t", tooltip="CLIP-T: mean cosine of every picture and its prompt."),
                io.String.Output(
                    display_name="data", tooltip="Everything as JSON: the means, and every picture's own figures."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: list[Tensor],
        references: list[Tensor],
        encoder: list[Any],
        prompt: list[str],
        second_encoder: list[Any] | None = None,
        clip: list[Any] | None = None,
    ) -> io.NodeOutput:
        """Encode, compare, show; every input arrives as a list."""
        encoders = _by_metric([encoder[0], *(second_encoder or [None])[:1]])
        scores = _scores(images, references, encoders, (clip or [None])[0], prompt[0])
        table = scores.to_markdown()
        for metric in METRICS:
            if metric in scores.each:
                log.info("LoRA²: %s %.4f", metric, scores.mean(metric))
        means = {m: _or_absent(scores, m) for m in METRICS}
        return io.NodeOutput(
            table, means[CLIP_I], means[DINO], means[CLIP_T], scores.to_json(), ui=ui.PreviewText(table)
        )


def _by_metric(encoders: list[Any]) -> dict[str, Any]:
    """Encoders by what they measure; raises LoraError for two of a kind."""
    found: dict[str, Any] = {}
    for encoder in encoders:
        if encoder is None:
            continue
        metric = metric_of(encoder)
        if metric in found:
            raise LoraError(
                f"Both encoders measure {metric}. Connect a CLIP vision model to one input and a DINO model to the other, or "
                "leave second_encoder open."
            )
        found[metric] = encoder
    return found


def _scores(images: list[Tensor], references: list[Tensor], encoders: dict[str, Any], clip: Any, prompt: str) -> Scores:
    """Every metric that the encoders allow."""
    pictures = _count(images, "images")
    others = _count(references, "references")
    prompts = prompts_of(prompt, pictures)
    if clip is not None and not prompts:
        raise LoraError(
            "A text encoder is connected to clip, but prompt is empty. Write the prompt, or disconnect clip."
        )
    if clip is not None and CLIP_I not in encoders:
        raise LoraError(
            "CLIP-T needs a CLIP vision model, and there is only a DINO model. Connect one, or disconnect clip."
        )
    measured: list[tuple[str, Tensor]] = []
    for metric, encoder in encoders.items():
        vectors = picture_vectors(encoder, images)
        measured.append((metric, against_all(vectors, picture_vectors(encoder, references))))
        if metric == CLIP_I and clip is not None:
            measured.append((CLIP_T, against_own(vectors, prompt_vectors(clip, prompts, vectors.shape[1]))))
    return mean_scores(measured, others, {metric: name_of(encoder) for metric, encoder in encoders.items()})


def _count(pictures: list[Tensor], name: str) -> int:
    """How many pictures there are; raises LoraError for none, and for what are no pictures."""
    for batch in pictures:
        if not isinstance(batch, Tensor) or batch.ndim != 4 or batch.shape[-1] < 3 or 0 in batch.shape[1:]:
            raise LoraError(f"{name} must be pictures (IMAGE) in colour. Connect a node that gives pictures.")
    count = sum(len(batch) for batch in pictures)
    if not count:
        raise LoraError(f"{name} is empty. Connect at least one picture.")
    return count


def _or_absent(scores: Scores, metric: str) -> Any:
    """The mean, or an output that says why it is not there."""
    why = {
        CLIP_I: "CLIP-I was not measured: connect a CLIP vision model.",
        DINO: "DINO was not measured: connect a DINOv2 model.",
        CLIP_T: "CLIP-T was not measured: connect clip beside a CLIP vision model, and write the prompt.",
    }
    value = scores.mean(metric)
    return blocked_output(why[metric]) if value is None else value


NODES = [ScorePictures]

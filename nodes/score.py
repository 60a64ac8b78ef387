"""Score Pictures: similarity of generated pictures to a subject's pictures and to their prompt."""

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
    mean_cosines,
    mean_scores,
    paired_cosines,
    prompts_of,
)
from ..lora2.util.errors import LoraError
from .comfy.apply_lora import blocked_output
from .comfy.encoders import metric_of, name_of, picture_vectors, prompt_vectors

log = logging.getLogger("lora2")


class ScorePictures(io.ComfyNode):
    """Measures CLIP-I, DINO and CLIP-T with the user's encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema of the node."""
        return io.Schema(
            node_id="LoRA2_ScorePictures",
            display_name="Score Pictures",
            category="LoRA²",
            description=(
                "Measures the similarity of generated pictures to a subject (CLIP-I, DINO) and to their prompt (CLIP-T), with "
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
                io.Image.Input("images", tooltip="Generated images: a batch, or a list of any sizes."),
                io.Image.Input("references", tooltip="Real images of the subject, preferably not used in training."),
                io.ClipVision.Input(
                    "encoder",
                    tooltip="Encoder from Load CLIP Vision. A CLIP vision model measures CLIP-I (and CLIP-T if clip is connected), "
                    "a DINOv2 model DINO.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="For CLIP-T: one line for all pictures, or one line per picture. Write the subject's class (a mug) instead "
                    "of a trigger word.",
                ),
                io.ClipVision.Input(
                    "second_encoder",
                    optional=True,
                    tooltip="Encoder of the other kind, to measure both CLIP-I and DINO.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For CLIP-T: the text encoder of the same CLIP model, with its projection.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The table that the node displays, in Markdown."),
                io.Float.Output(
                    display_name="clip_i",
                    tooltip="CLIP-I: mean cosine similarity of all pairs of picture and reference in CLIP's space.",
                ),
                io.Float.Output(
                    display_name="dino",
                    tooltip="DINO: mean cosine similarity of all pairs of picture and reference in DINO's space.",
                ),
                io.Float.Output(
                    display_name="clip_t", tooltip="CLIP-T: mean cosine similarity of each picture and its prompt."
                ),
                io.String.Output(display_name="data", tooltip="JSON: the means and the scores of every picture."),
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
        """Encode, compare, tabulate. Every input is a list; widgets have one value."""
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
    """Encoders by metric. Raises LoraError for two of one metric."""
    found: dict[str, Any] = {}
    for encoder in encoders:
        if encoder is None:
            continue
        metric = metric_of(encoder)
        if metric in found:
            raise LoraError(
                f"Both encoders measure {metric}. Connect a CLIP vision model to one input and a DINO model to the other, or "
                "disconnect second_encoder."
            )
        found[metric] = encoder
    return found


def _scores(images: list[Tensor], references: list[Tensor], encoders: dict[str, Any], clip: Any, prompt: str) -> Scores:
    """Scores of every metric that the encoders and the prompt allow."""
    pictures = _count(images, "images")
    others = _count(references, "references")
    prompts = prompts_of(prompt, pictures)
    if clip is not None and not prompts:
        raise LoraError("A text encoder is connected to clip, but prompt is empty. Write a prompt, or disconnect clip.")
    if clip is not None and CLIP_I not in encoders:
        raise LoraError(
            "CLIP-T needs a CLIP vision model, but only a DINO model is connected. Connect one, or disconnect clip."
        )
    measured: list[tuple[str, Tensor]] = []
    for metric, encoder in encoders.items():
        vectors = picture_vectors(encoder, images)
        measured.append((metric, mean_cosines(vectors, picture_vectors(encoder, references))))
        if metric == CLIP_I and clip is not None:
            measured.append((CLIP_T, paired_cosines(vectors, prompt_vectors(clip, prompts, vectors.shape[1]))))
    return mean_scores(measured, others, {metric: name_of(encoder) for metric, encoder in encoders.items()})


def _count(pictures: list[Tensor], name: str) -> int:
    """Number of pictures. Raises LoraError for none, and for a batch that is not one of RGB pictures."""
    for batch in pictures:
        if not isinstance(batch, Tensor) or batch.ndim != 4 or batch.shape[-1] < 3 or 0 in batch.shape[1:]:
            raise LoraError(f"{name} must be color pictures (IMAGE). Connect a node that outputs pictures.")
    count = sum(len(batch) for batch in pictures)
    if not count:
        raise LoraError(f"{name} is empty. Connect at least one picture.")
    return count


def _or_absent(scores: Scores, metric: str) -> Any:
    """Mean score, or an absent output that says what is missing."""
    why = {
        CLIP_I: "CLIP-I was not measured: connect a CLIP vision model.",
        DINO: "DINO was not measured: connect a DINOv2 model.",
        CLIP_T: "CLIP-T was not measured: connect clip and a CLIP vision model, and write a prompt.",
    }
    value = scores.mean(metric)
    return blocked_output(why[metric]) if value is None else value


NODES = [ScorePictures]

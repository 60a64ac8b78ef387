"""Similarity of pictures to a subject's pictures and to prompts, by the vectors of an encoder.

The metrics of Ruiz et al., "DreamBooth" (arXiv:2208.12242, §4.1): CLIP-I and DINO are the mean cosine between all pairs of
a generated and a real picture of the subject, CLIP-T that between each generated picture and its prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..util.errors import LoraError

CLIP_I, DINO, CLIP_T = "CLIP-I", "DINO", "CLIP-T"
METRICS = (CLIP_I, DINO, CLIP_T)
MEANINGS = {
    CLIP_I: "pictures against references, CLIP",
    DINO: "pictures against references, DINO",
    CLIP_T: "pictures against prompt",
}


def unit(vectors: Tensor) -> Tensor:
    """Rows divided by their length, (count, width) float64. Raises LoraError for NaN, infinity or a zero vector."""
    rows = vectors.detach().double()
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 0)).all()):
        raise LoraError(
            "The encoder returned NaN, infinity or zero vectors, so there is nothing to compare. Check the encoder's file, "
            "and that the pictures are not damaged."
        )
    return rows / length


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosines of all pairs: (n, width) and (m, width) to (n, m) float64."""
    if one.shape[1] != other.shape[1]:
        raise LoraError(
            f"Vectors of width {one.shape[1]} and {other.shape[1]} cannot be compared: use one encoder for both."
        )
    return unit(one) @ unit(other).T


def mean_cosines(pictures: Tensor, references: Tensor) -> Tensor:
    """Every picture's mean cosine with all references, (pictures,) float64; their mean is CLIP-I or DINO."""
    return cosines(pictures, references).mean(dim=1)


def paired_cosines(pictures: Tensor, texts: Tensor) -> Tensor:
    """Every picture's cosine with its own text, (pictures,) float64; one text counts for all. Their mean is CLIP-T."""
    if len(texts) not in (1, len(pictures)):
        raise LoraError(f"{len(texts)} prompts do not match {len(pictures)} pictures.")
    table = cosines(pictures, texts)
    return table[:, 0] if len(texts) == 1 else table.diagonal()


@dataclass(frozen=True)
class Scores:
    """Measured metrics: one value per picture, the number of references, and the encoders."""

    each: dict[str, list[float]]
    references: int
    encoders: dict[str, str]

    def mean(self, metric: str) -> float | None:
        """The metric, None where it was not measured."""
        values = self.each.get(metric)
        return sum(values) / len(values) if values else None

    @property
    def pictures(self) -> int:
        """How many pictures were scored."""
        return max((len(values) for values in self.each.values()), default=0)

    def to_markdown(self) -> str:
        """A table: a line for each metric with its mean, lowest and highest."""
        lines = [
            f"{_count(self.pictures, 'picture')} against {_count(self.references, 'reference')}",
            "",
            "| metric | mean | lowest | highest | compares |",
            "| --- | --- | --- | --- | --- |",
        ]
        for metric in METRICS:
            if metric in self.each:
                values = self.each[metric]
                figures = " | ".join(f"{v:.4f}" for v in (sum(values) / len(values), min(values), max(values)))
                lines.append(f"| {metric} | {figures} | {MEANINGS[metric]} |")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Means, every picture's own figures, and what measured them."""
        means = {metric: self.mean(metric) for metric in METRICS}
        return json.dumps(
            {"means": means, "each": self.each, "pictures": self.pictures, "references": self.references,
             "encoders": self.encoders}, indent=1, ensure_ascii=False,
        )  # fmt: skip


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def prompts_of(text: str, pictures: int) -> list[str]:
    """One prompt for all pictures, or a line for each; empty lines do not count. Raises LoraError for another number."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) in (0, 1, pictures):
        return lines
    raise LoraError(
        f"prompt has {len(lines)} lines for {_count(pictures, 'picture')}. Give one line for all pictures, or one for each, in "
        "their order."
    )


def mean_scores(measured: Sequence[tuple[str, Tensor]], references: int, encoders: dict[str, str]) -> Scores:
    """Scores from each metric's figures per picture."""
    return Scores({metric: values.tolist() for metric, values in measured}, references, encoders)

"""The arithmetic of the picture scores, against numpy in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lora2.report.similarity import (
    CLIP_I,
    CLIP_T,
    DINO,
    cosines,
    mean_cosines,
    mean_scores,
    paired_cosines,
    prompts_of,
    unit,
)
from lora2.util.errors import LoraError

GENERATOR = np.random.default_rng(0)
PICTURES, REFERENCES = (GENERATOR.normal(size=(n, 16)) * 10.0 ** GENERATOR.integers(-6, 6, (n, 1)) for n in (5, 3))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_mean_pairwise_cosine(dtype: torch.dtype) -> None:
    """Every picture with every reference, whatever their lengths; computed in float64 from what the encoder gave."""
    one, other = (
        torch.from_numpy(side / np.abs(side).max(1, keepdims=True)).to(dtype) for side in (PICTURES, REFERENCES)
    )
    expected = [[cosine(a, b) for b in other.double().numpy()] for a in one.double().numpy()]
    # Sums of 16 products in float64.
    assert cosines(one, other).numpy() == pytest.approx(np.array(expected), abs=1e-14)
    assert mean_cosines(one, other).numpy() == pytest.approx(np.array(expected).mean(1), abs=1e-14)
    assert cosines(one, other).dtype == torch.float64


def test_lengths_do_not_matter_and_a_picture_is_like_itself() -> None:
    one, other = torch.from_numpy(PICTURES), torch.from_numpy(REFERENCES)
    assert torch.allclose(mean_cosines(one, other), mean_cosines(7 * one, other / 9), rtol=0, atol=1e-14)
    assert cosines(one, one).diagonal().numpy() == pytest.approx(np.ones(5), abs=1e-14)
    assert cosines(one, -one).diagonal().numpy() == pytest.approx(-np.ones(5), abs=1e-14)


def test_every_picture_with_its_own_prompt_or_all_with_one() -> None:
    one = torch.from_numpy(PICTURES)
    texts = torch.from_numpy(GENERATOR.normal(size=(5, 16)))
    own = [cosine(a, b) for a, b in zip(PICTURES, texts.numpy(), strict=True)]
    assert paired_cosines(one, texts).numpy() == pytest.approx(np.array(own), abs=1e-14)
    first = [cosine(a, texts[0].numpy()) for a in PICTURES]
    assert paired_cosines(one, texts[:1]).numpy() == pytest.approx(np.array(first), abs=1e-14)
    with pytest.raises(LoraError, match="2 prompts do not match 5 pictures"):
        paired_cosines(one, texts[:2])


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_vector_that_says_nothing_is_refused(bad: float) -> None:
    vectors = torch.ones(2, 4)
    vectors[1] = bad
    with pytest.raises(LoraError, match="NaN, infinity or zero vectors"):
        unit(vectors)


def test_vectors_of_two_encoders_are_not_compared() -> None:
    with pytest.raises(LoraError, match="width 4 and 5"):
        cosines(torch.ones(1, 4), torch.ones(1, 5))


@pytest.mark.parametrize(
    ("text", "pictures", "expected"),
    [
        ("", 3, []), (" \n\n", 3, []), ("a mug", 3, ["a mug"]), ("a mug\n", 1, ["a mug"]),
        (" a \n\n b\nc ", 3, ["a", "b", "c"]), ("a\r\nb", 2, ["a", "b"]),
    ],
)  # fmt: skip
def test_prompts(text: str, pictures: int, expected: list[str]) -> None:
    assert prompts_of(text, pictures) == expected


def test_another_number_of_prompts_is_refused() -> None:
    with pytest.raises(LoraError, match=r"prompt has 2 lines for 3 pictures\. Give one line"):
        prompts_of("a\nb", 3)
    with pytest.raises(LoraError, match="3 lines for 1 picture"):
        prompts_of("a\nb\nc", 1)


def test_the_table_and_the_data() -> None:
    measured = [(DINO, torch.tensor([0.5, 0.7])), (CLIP_I, torch.tensor([0.25, 0.75], dtype=torch.float64))]
    scores = mean_scores(measured, 4, {DINO: "dinov2", CLIP_I: "vit"})
    assert scores.mean(CLIP_I) == 0.5
    assert scores.mean(CLIP_T) is None
    lines = scores.to_markdown().splitlines()
    assert lines[0] == "2 pictures against 4 references"
    assert lines[4] == "| CLIP-I | 0.5000 | 0.2500 | 0.7500 | pictures against references, CLIP |"
    assert lines[5].startswith("| DINO | 0.6000 | 0.5000 | 0.7000 |")
    assert len(lines) == 6
    data = json.loads(scores.to_json())
    assert data["means"] == {"CLIP-I": 0.5, "DINO": pytest.approx(0.6), "CLIP-T": None}
    assert data["each"]["CLIP-I"] == [0.25, 0.75]
    assert (data["pictures"], data["references"]) == (2, 4)
    assert data["encoders"] == {"DINO": "dinov2", "CLIP-I": "vit"}

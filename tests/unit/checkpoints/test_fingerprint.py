"""Fingerprints: another model, layer, picture or caption is recognized, and so is one that was encoded again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora2.checkpoints.fingerprint import SAMPLE_SIZE, Fingerprint, digest, samples
from lora2.checkpoints.state import State
from lora2.util.errors import LoraError


def tensors(count: int, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def samples_of(items: list[Tensor]) -> Tensor:
    return samples(([item], "") for item in items)


PICTURES, CAPTIONS = tensors(4, (4, 8, 8), 2), tensors(4, (1, 7, 64), 3)


def fingerprint(pictures: list[Tensor] = PICTURES, captions: list[Tensor] = CAPTIONS) -> Fingerprint:
    empty = samples_of(tensors(1, (1, 7, 64), 4))
    return Fingerprint("sd1", "layers", samples_of(pictures), samples_of(captions), empty, "weights", "patches")


def changed(items: list[Tensor], index: int, by: float) -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [t + by * torch.randn(t.shape, generator=g) if i == index else t for i, t in enumerate(items)]


CASES = {
    "family": (replace(fingerprint(), family="sdxl"), "the model is sdxl, it was sd1"),
    "layers": (replace(fingerprint(), layers="others"), "the adapted layers differ"),
    "a picture more": (fingerprint([*PICTURES, PICTURES[0]], [*CAPTIONS, CAPTIONS[0]]), "there are 5 pictures, there were 4"),
    "another picture": (fingerprint(changed(PICTURES, 2, 0.5)), "pictures 3 differ"),
    "other pictures": (fingerprint(tensors(4, (4, 8, 8), 8)), "pictures 1, 2, 3, … differ"),
    "another size of picture": (fingerprint([*PICTURES[:3], PICTURES[3].reshape(4, 4, 16)]), "pictures 4 differ"),
    "another caption": (fingerprint(captions=changed(CAPTIONS, 0, 0.5)), "captions 1 differ"),
    "empty caption": (replace(fingerprint(), empty_caption=samples_of(tensors(1, (1, 7, 64), 8))), "the empty caption differs"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_difference_in_the_data_is_named(case: str) -> None:
    other, message = CASES[case]
    assert other.compare_data(fingerprint()) == ([message], [])


def test_a_difference_in_the_model_is_named() -> None:
    other = replace(fingerprint(), weights="others", patches="")
    assert other.compare_model(fingerprint()) == ["the model's weights differ", "other LoRAs are applied to the model"]
    assert fingerprint().compare_model(fingerprint()) == []


def test_a_fingerprint_comes_back_from_a_state() -> None:
    stored = fingerprint().state()
    restored = Fingerprint.restored(State(stored.tensors, stored.facts))
    assert fingerprint().compare_data(restored) == ([], [])
    assert fingerprint().compare_model(restored) == []
    assert fingerprint().order_of(restored) == [0, 1, 2, 3]


def test_the_same_pictures_are_found_in_any_order() -> None:
    """Also pictures and captions that come twice. A picture with the caption of another one is not the same."""
    picture_of, caption_of = [0, 1, 1, 2, 3], [0, 1, 1, 1, 2]
    pictures, captions = [PICTURES[i] for i in picture_of], [CAPTIONS[i] for i in caption_of]
    saved, reversed_ = fingerprint(pictures, captions), fingerprint(pictures[::-1], captions[::-1])
    assert saved.order_of(saved) == [0, 1, 2, 3, 4]
    order = reversed_.order_of(saved)
    assert order == [4, 2, 3, 1, 0]
    assert reversed_.reordered(order).compare_data(saved) == ([], [])
    assert fingerprint(pictures[::-1], captions).order_of(saved) is None
    fewer = fingerprint(PICTURES[:3], CAPTIONS[:3])
    assert fewer.order_of(fingerprint()) is None
    assert fingerprint().order_of(fewer) is None


def test_encoding_again_is_not_a_difference() -> None:
    """A GPU may round otherwise in another session."""
    again = fingerprint(changed(PICTURES, 1, 1e-4), changed(CAPTIONS, 3, 1e-4))
    assert again.compare_data(fingerprint()) == (
        [],
        ["the pictures differ by rounding", "the captions differ by rounding"],
    )


def test_the_empty_caption_counts_only_where_captions_are_dropped() -> None:
    without = replace(fingerprint(), empty_caption=samples([]))
    assert without.compare_data(fingerprint()) == ([], [])
    assert fingerprint().compare_data(without) == ([], [])


def test_texts_shapes_and_types_count() -> None:
    one = torch.ones(2, 3)
    assert digest([one], "a") != digest([one], "b")
    assert digest([one]) != digest([one.double()])
    assert digest([one]) != digest([one.t()])
    assert not torch.equal(samples([([one], "a")]), samples([([one], "b")]))
    assert not torch.equal(samples([([one], "")]), samples([([one, one], "")]))
    assert samples([([torch.zeros(0)], "")]).shape == (1, 1 + SAMPLE_SIZE)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.float64])
def test_weights_of_any_type_have_a_digest(dtype: torch.dtype) -> None:
    one, other = torch.ones(9, 9).to(dtype), torch.zeros(9, 9).to(dtype)
    assert digest([one], max_values=20) == digest([one.clone()], max_values=20)
    assert digest([one], max_values=20) != digest([other], max_values=20)
    assert samples([([one], "")])[0, 1:].sum() == SAMPLE_SIZE


def test_corrupted_fingerprints_are_refused() -> None:
    stored = fingerprint().state()
    for name in stored.tensors:
        corrupted = State(stored.tensors, stored.facts)
        corrupted.tensors[name] = torch.zeros(1, 3) if name == "empty_caption" else corrupted.tensors[name][:-1]
        with pytest.raises(LoraError, match="training state is corrupted"):
            Fingerprint.restored(corrupted)
    for name in stored.facts:
        with pytest.raises(LoraError, match=f"{name} = 7 must be a text"):
            Fingerprint.restored(State(stored.tensors, stored.facts | {name: 7}))

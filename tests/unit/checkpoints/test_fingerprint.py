"""Fingerprints: another model, layer, picture or caption is told from the same one that was rounded otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora2.checkpoints.fingerprint import SAMPLES, Digests, Fingerprint, digest_of, plain
from lora2.checkpoints.state import State
from lora2.util.errors import LoraError


def numbers(count: int, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def prints(tensors: list[Tensor], samples: int = 0) -> Digests:
    return Digests.of((([t], "") for t in tensors), samples)


WEIGHTS, PICTURES, CAPTIONS = numbers(3, (40, 30), 1), numbers(4, (4, 8, 8), 2), numbers(4, (1, 7, 64), 3)


def origin(
    weights: list[Tensor] = WEIGHTS, pictures: list[Tensor] = PICTURES, captions: list[Tensor] = CAPTIONS
) -> Fingerprint:
    layers = [f"layer{i}" for i in range(len(weights))]
    types = [str(w.dtype) for w in weights]
    empty = prints(numbers(1, (1, 7, 64), 4))
    return Fingerprint("sd1", layers, types, prints(weights, SAMPLES), "", prints(pictures), prints(captions), empty)


def changed(tensors: list[Tensor], index: int, by: float) -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [t + by * torch.randn(t.shape, generator=g) if i == index else t for i, t in enumerate(tensors)]


def test_the_same_is_the_same_and_comes_back_from_a_state() -> None:
    found = origin().state()
    assert origin().against(Fingerprint.restored(State(found.tensors, found.facts))) == ([], [])


CASES = {
    "family": (replace(origin(), family="sdxl"), "the model is sdxl, the state's run had sd1"),
    "fewer layers": (origin(WEIGHTS[:2]), "1 layer (layer2) of the state not adapted now"),
    "more layers": (origin([*WEIGHTS, WEIGHTS[0]]), "1 layer (layer3) adapted now that the state has not"),
    "weights": (origin(changed(WEIGHTS, 1, 1e-6)), "the model's weights differ in 1 layer (layer1)"),
    "another size": (origin([*WEIGHTS[:2], torch.randn(40, 31)]), "the model's weights differ in 1 layer (layer2)"),
    "another model": (origin(numbers(3, (40, 30), 7)), "the model's weights differ in 3 layers (layer0, layer1, layer2)"),
    "a LoRA": (replace(origin(), patches="00"), "other LoRAs are applied to the model than in the state's run"),
    "a picture more": (origin(pictures=[*PICTURES, PICTURES[0]], captions=[*CAPTIONS, CAPTIONS[0]]),
                       "there are 5 pictures, the state's run had 4"),
    "another picture": (origin(pictures=changed(PICTURES, 2, 0.5)), "1 picture (3) differ"),
    "another size of picture": (origin(pictures=[*PICTURES[:3], PICTURES[3].reshape(4, 4, 16)]), "1 picture (4) differ"),
    "another order": (origin(pictures=PICTURES[::-1]), "the pictures come in another order"),
    "another caption": (origin(captions=changed(CAPTIONS, 0, 0.5)), "1 caption (1) differ"),
    "empty caption": (replace(origin(), empty=prints(numbers(1, (1, 7, 64), 8))), "the empty caption differs"),
}  # fmt: skip


def test_the_same_pairs_are_found_in_any_order() -> None:
    """Pictures and captions that come twice too; a caption that belongs to another picture is none of them."""
    twice = [[0, 1, 1, 2, 3], [0, 1, 1, 1, 2]]
    then = origin(pictures=[PICTURES[i] for i in twice[0]], captions=[CAPTIONS[i] for i in twice[1]])
    assert then.order(then.pictures, then.captions) == [0, 1, 2, 3, 4]
    turned = origin(pictures=[PICTURES[i] for i in twice[0][::-1]], captions=[CAPTIONS[i] for i in twice[1][::-1]])
    assert then.order(turned.pictures, turned.captions) == [4, 2, 3, 1, 0]
    assert then.order(turned.pictures, then.captions) is None
    fewer = origin(pictures=PICTURES[:3], captions=CAPTIONS[:3])
    assert origin().order(fewer.pictures, fewer.captions) is None
    assert fewer.order(origin().pictures, origin().captions) is None


@pytest.mark.parametrize("case", CASES)
def test_a_difference_is_named(case: str) -> None:
    other, words = CASES[case]
    assert other.against(origin())[0] == [words]


def test_rounding_is_told_from_another_thing() -> None:
    """A model stored in a half type, pictures that a GPU encoded again: another sum in the last digits."""
    halves = origin([w.bfloat16() for w in WEIGHTS])
    assert halves.against(origin()) == ([], ["the model is stored in another number type"])
    again = origin(pictures=changed(PICTURES, 1, 1e-4), captions=changed(CAPTIONS, 3, 1e-4))
    wrong, rounded = again.against(origin())
    assert wrong == []
    assert rounded == [f"the {what}s were encoded again and differ by rounding" for what in ("picture", "caption")]


def test_a_dropped_caption_counts_only_where_any_is_dropped() -> None:
    without = replace(origin(), empty=Digests.of([]))
    assert without.against(origin()) == ([], [])
    assert origin().against(without) == ([], [])


def test_words_and_nested_options_count() -> None:
    tensors, words = plain({"pooled": torch.ones(2), "guidance": 3.5, "control": object(), "name": "x"})
    assert [t.tolist() for t in tensors] == [[1.0, 1.0]]
    assert words == "control:object;guidance=3.5;name='x';pooled:Tensor"
    assert digest_of(tensors, words) != digest_of(tensors, words + "x")
    assert digest_of(tensors) != digest_of([tensors[0].double()])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.float64])
def test_weights_of_any_type_have_a_print(dtype: torch.dtype) -> None:
    one, other = torch.ones(9, 9).to(dtype), torch.zeros(9, 9).to(dtype)
    assert prints([one]).same(prints([one])) == [True]
    assert prints([one]).same(prints([other])) == [False]


def test_damaged_fingerprints_are_refused() -> None:
    sound = origin().state()
    for name in sound.tensors:
        broken = State(sound.tensors, sound.facts)
        broken.tensors[name] = broken.tensors[name][:-1]
        if name.startswith("empty"):
            broken.tensors[name] = torch.zeros(1, 3)
        with pytest.raises(LoraError, match="training state is damaged"):
            Fingerprint.restored(broken)

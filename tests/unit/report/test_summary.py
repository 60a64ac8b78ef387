"""The pictures: texts inside and apart from each other, colours in order, from the first step to the last."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from layer_names import Layers, document, experts, flux, text_encoder, unet, waves
from PIL import Image

from lora2.report import canvas
from lora2.report.canvas import Canvas, printable
from lora2.report.colors import RankScale, ink_on, luminance, ramp
from lora2.report.preview import preview_picture, smoothed
from lora2.report.ranks import build_report
from lora2.report.summary import rank_picture
from lora2.util.text import format_size

NAN, INF = math.nan, math.inf

EVERY: dict[str, Layers] = {
    "sd15": unet("sd15"),
    "sdxl": unet("sdxl"),
    "koala": unet("koala"),
    "sdxl with text encoders": unet("sdxl") + text_encoder(1, 12, 768) + text_encoder(2, 32, 1280),
    "flux": flux(),
    "flux, every layer": flux(everything=True),
    "one layer": unet("sd15")[:1],
    "4000 layers": experts(4000),
    "2000 names nobody knows": [(f"n{i % 97}x{i}_{i}_w{i * 7 % 911}", 64, 64) for i in range(2000)],
    "20 text encoders": [(f"text_encoders.t{i}.layers.{j}.q_proj", 8, 8) for i in range(20) for j in range(40)],
    "one block of 500 layers": [(f"blocks.0.p{i}", 8, 8) for i in range(500)],
    "long names": [("x" * 290 + f".{i}." + "y" * 90, 8, 8) for i in range(5)],
}

Box = tuple[float, float, float, float]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Box, Canvas]]:
    """Every text drawn, with the box of its ink."""
    drawn: list[tuple[str, Box, Canvas]] = []
    draw = Canvas.text

    def record(self: Canvas, x: float, y: float, text: str, high: float, *args: Any, **kwargs: Any) -> None:
        draw(self, x, y, text, high, *args, **kwargs)
        anchor = kwargs.get("anchor") or (args[1] if len(args) > 1 else "ls")
        font = canvas._font(self._pixels(high))
        left, top, right, bottom = (v / self.scale for v in font.getbbox(printable(text), anchor=anchor))
        if text:
            drawn.append((text, (x + left, y + top, x + right, y + bottom), self))

    monkeypatch.setattr(Canvas, "text", record)
    return drawn


def assert_apart(texts: list[tuple[str, Box, Canvas]]) -> None:
    """No text over another, none outside the picture."""
    boxes = np.array([box for _, box, _ in texts])
    surface = texts[0][2]
    assert boxes[:, :2].min() >= 0
    assert boxes[:, 2].max() <= surface.width
    assert boxes[:, 3].max() <= surface.height
    # Ink may come as close as a unit: a thousandth of the width.
    low, high = boxes[:, None, :2] + 1, boxes[:, None, 2:] - 1
    over = ((low < boxes[None, :, 2:]) & (boxes[None, :, :2] < high)).all(-1)
    np.fill_diagonal(over, False)
    clashes = [(texts[a][0], texts[b][0]) for a, b in zip(*np.nonzero(over), strict=True)]
    assert clashes == []


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_no_text_lies_over_another(name: str, in_use: bool, texts: list[tuple[str, Box, Canvas]]) -> None:
    picture = rank_picture(build_report(document(EVERY[name], waves), name), in_use=in_use)
    assert (picture.mode, picture.width) == ("RGB", 1024)
    assert picture.height < 3200
    assert_apart(texts)


@pytest.mark.parametrize("name", EVERY)
def test_no_text_of_the_live_picture_lies_over_another(name: str, texts: list[tuple[str, Box, Canvas]]) -> None:
    losses = np.random.default_rng(0).uniform(0.05, 0.4, 150)
    ranks = {prefix: waves(i) for i, (prefix, _, _) in enumerate(EVERY[name])}
    costs = {prefix: a + b for prefix, a, b in EVERY[name]}
    picture = preview_picture(losses.tolist(), 200, ranks, "pruned", costs=costs, cuts=[45, 90, 140])
    assert (picture.mode, picture.width) == ("RGB", 768)
    assert picture.height < 860
    assert_apart(texts)


@pytest.mark.parametrize("rank", [1, 3, 32, 512])
def test_one_rank_for_all_is_drawn_too(rank: int, texts: list[tuple[str, Box, Canvas]]) -> None:
    """As in most files of others; the number stands in every cell."""
    rank_picture(build_report(document(unet("sd15"), rank), "uniform"))
    assert_apart(texts)
    assert [text for text, _, _ in texts].count(str(rank)) >= 128


def test_the_picture_tells_name_size_and_ranks(texts: list[tuple[str, Box, Canvas]]) -> None:
    report = build_report(document(unet("koala"), lambda i: 4 if i % 2 else 12), "my_dog")
    rank_picture(report)
    words = {text for text, _, _ in texts}
    assert words >= {"my_dog", "8", "4 - 12", "168", format_size(report.bytes), "float16", "attn1", "down"}
    assert words >= {"this LoRA", "rank 8", "rank 512", "418 MB"}


@pytest.mark.parametrize("width", [400, 768, 1024, 2048])
def test_any_width_keeps_the_proportions(width: int) -> None:
    report = build_report(document(unet("sd15"), waves), "x")
    picture, usual = rank_picture(report, width), rank_picture(report)
    assert picture.width == width
    assert picture.height == pytest.approx(usual.height * width / 1024, abs=1)


def test_the_same_report_gives_the_same_picture() -> None:
    report = build_report(document(unet("koala"), waves), "x")
    assert rank_picture(report).tobytes() == rank_picture(report).tobytes()


def test_a_cell_has_the_colour_of_its_rank() -> None:
    """One layer of rank 5: its colour fills the cell, the one of 6 is nowhere."""
    found = colours(rank_picture(build_report(document(unet("sd15")[:1], 5), "x")))
    scale = RankScale.around(5, 5)
    assert found[scale.color(5)] > 3000  # pixels; the cell has some 7000
    assert found.get(scale.color(6), 0) < 100  # only on the scale itself


def test_a_layer_without_rank_has_no_colour_of_the_scale() -> None:
    scale = RankScale.around(1, 16)
    assert scale.color(0) not in ramp()
    assert scale.color(1) == ramp()[0]
    assert scale.color(16) == ramp()[-1]


def colours(picture: Image.Image) -> dict[tuple[int, int, int], int]:
    counts = picture.getcolors(1 << 24)
    assert counts is not None
    return {colour: count for count, colour in counts}  # type: ignore[misc]


def test_the_scale_is_ordered_by_lightness_alone() -> None:
    """So it is read in grey, and by people who see fewer colours; every step is a step up."""
    light = [luminance(colour) for colour in ramp()]
    assert all(b > a for a, b in pairwise(light))
    assert light[0] < 0.06
    assert light[-1] > 0.7


def test_numbers_can_be_read_on_every_colour() -> None:
    """WCAG 2 asks for a contrast of 4.5 for text."""
    for colour in ramp():
        pair = sorted([luminance(colour), luminance(ink_on(colour))])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 512), (7, 9), (32, 32), (3, 100), (0.5, 1), (4096, 4096)])
def test_the_scale_holds_the_ranks_in_whole_octaves(low: float, high: float) -> None:
    scale = RankScale.around(low, high)
    assert scale.low >= 0
    assert scale.high - scale.low >= 4
    assert 2**scale.low <= max(low, 1) <= max(high, 1) <= 2**scale.high


def test_text_is_drawn_in_glyphs_that_exist() -> None:
    assert printable("é – × 5 µm") == "e - x 5 um"
    assert printable("日本 ž…·") == "?? z…·"
    assert all(canvas._drawable(c) for c in "…·%-,'()")


# -- the live picture ----------------------------------------------------------------------------------

RANKS = {name: waves(i) for i, (name, _, _) in enumerate(unet("sdxl"))}


ODD_LOSSES: list[list[float]] = [
    [],
    [0.5],
    [0.0, 0.0],
    [NAN],
    [NAN, INF, -INF],
    [0.3, NAN, 0.2, INF, NAN, 0.25, 0.2],
    [1e-30, 1e30],
    [-1.0, -2.0],
    [0.1] * 3000,
    list(np.random.default_rng(0).lognormal(-2, 0.4, 3000)),
]
ODD_RANKS: list[dict[str, int]] = [{}, {"a": 0, "b": 0}, {"lora_unet_conv_in": 3}]


@pytest.mark.parametrize(
    ("losses", "ranks"), [*((losses, RANKS) for losses in ODD_LOSSES), *((ODD_LOSSES[5], ranks) for ranks in ODD_RANKS)]
)
def test_anything_that_training_gives_can_be_drawn(losses: list[float], ranks: dict[str, int]) -> None:
    """No loss yet, losses that are no numbers, no ranks, more steps than were planned."""
    picture = preview_picture(losses, 1000, ranks, "adapting", cuts=[2])
    assert picture.size[0] == 768
    assert len(colours(picture)) > 10


def test_the_size_of_the_live_picture_stays() -> None:
    """The node must not jump while it trains."""
    sizes = {
        preview_picture([0.1] * n, 300, {k: 1 + v * n // 300 for k, v in RANKS.items()}, phase).size
        for n, phase in ((0, "adapting"), (1, "adapting"), (150, "pruned"), (300, "pruned"))
    }
    assert len(sizes) == 1


def test_the_live_picture_tells_step_loss_and_size(texts: list[tuple[str, Box, Canvas]]) -> None:
    preview_picture(
        [0.5, 0.25],
        400,
        {"a.0.q": 4, "a.1.q": 8},
        "adapting",
        costs={"a.0.q": 100, "a.1.q": 300},
        number_bytes=4,
    )
    words = [text for text, _, _ in texts]
    for expected in (
        "adapting",
        "step 2 of 400",
        "7",
        "mean rank, 4 - 8",
        "2 layers, 11.2 KB",
        "loss 0.2500",
    ):
        assert expected in words


def test_the_step_that_settled_is_marked(texts: list[tuple[str, Box, Canvas]]) -> None:
    preview_picture([0.5] * 20, 400, RANKS, "pruned", cuts=[10])
    assert [text for text, _, _ in texts].count("pruned") == 2
    texts.clear()
    preview_picture([0.5] * 20, 400, RANKS, "adapting")
    assert "pruned" not in [text for text, _, _ in texts]


def test_the_live_picture_is_drawn_in_time() -> None:
    """60 ms of processor time for 560 layers at the end of a run; the best of some tries."""
    losses = np.random.default_rng(0).lognormal(-2, 0.4, 2000).tolist()
    costs = {name: a + b for name, a, b in unet("sdxl")}
    best = INF
    for _ in range(8):
        start = time.process_time()
        preview_picture(losses, 2000, RANKS, "pruned", costs=costs, cuts=[300, 650, 1000])
        best = min(best, time.process_time() - start)
    assert best < 0.060


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert smoothed(np.array([3.0] * 5), 10.0) == pytest.approx([3.0] * 5)
    assert smoothed(np.array([4.0, 0.0]), 10.0)[0] == pytest.approx(4.0)
    out = smoothed(np.array([NAN, 2.0, NAN, INF, 2.0]), 4.0)
    assert math.isnan(out[0])
    assert out[1:] == pytest.approx([2.0] * 4)
    assert smoothed(np.array([1.0, 5.0, 2.0]), 1.0) == pytest.approx([1.0, 5.0, 2.0])

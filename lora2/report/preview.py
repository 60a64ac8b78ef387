"""Live picture of a training run: the loss and the ranks so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from ..util.text import format_size, three_digits
from .canvas import Canvas
from .colors import ACCENT, CALM, CARD, INK, QUIET, RULE, Color, RankScale
from .layer_names import parse_layer_name
from .rank_map import Cell, RankMap, Style, lay_out, mean
from .rank_map_drawing import draw

_WIDTH, _EDGE = 768.0, 28.0
_INNER = _WIDTH - 2 * _EDGE
_LOSS_TOP, _LOSS_HEIGHT = 96.0, 190.0
_STRIP = Style(15, 2, 5, 60, 16, 0, max_rows=12, max_lines=12, max_height=420)
_RAW: Color = (110, 86, 66)


def preview_picture(
    losses: Sequence[float],
    steps: int,
    ranks: Mapping[str, int],
    phase: str,
    width: int = 768,
    *,
    costs: Mapping[str, int] | None = None,
    number_bytes: int = 2,
    cuts: Sequence[int] = (),
) -> Image.Image:
    """Loss and ranks so far as an RGB picture of `width` pixels.

    losses: one per step done, NaN and infinity allowed (they leave a gap); steps: planned in all; ranks: per
    layer, by the prefix of its key; phase: "adapting", "pruning", "pruned", or any word. costs: parameters per
    unit of rank, which give the size (numbers of number_bytes bytes) and weigh the mean. cuts: the steps before
    which layers were cut.
    """
    cells = [Cell(parse_layer_name(name), rank, max(1, (costs or {}).get(name, 1))) for name, rank in ranks.items()]
    chart = lay_out(cells, _INNER, Canvas(_WIDTH, 1, int(_WIDTH)), (_STRIP,)) if cells else None
    top = _LOSS_TOP + _LOSS_HEIGHT + 44
    canvas = Canvas(_WIDTH, top + 66 + chart.height + _EDGE if chart else top + 8, width)
    values = np.asarray(losses, dtype=np.float64).reshape(-1)
    steps = max(steps, len(values), 1)
    smooth = smoothed(values, max(1.0, min(len(values) / 12, 200.0)))
    _head(canvas, smooth, steps, phase)
    _losses(canvas, values, smooth, steps, [c for c in cuts if 0 < c <= len(values)], phase)
    if chart:
        _ranks(canvas, chart, cells, top, number_bytes if costs else 0)
    return canvas.picture()


def smoothed(values: np.ndarray, window: float) -> np.ndarray:
    """Exponential mean over about `window` steps, without the bias of its start; NaN is passed over.

    Values (n,) to (n,); NaN until the first finite one.
    """
    keep = 1.0 - 1.0 / max(window, 1.0)
    out = np.full(len(values), np.nan)
    total = weight = 0.0
    for index, value in enumerate(values.tolist()):
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        if weight:
            out[index] = total / weight
    return out


def _head(canvas: Canvas, smooth: np.ndarray, steps: int, phase: str) -> None:
    """Phase, step and the present loss."""
    color = CALM if phase == "pruned" else ACCENT
    words = canvas.fit(phase, 20, 0.4 * _INNER)
    wide = canvas.text_width(words, 20) + 28
    canvas.box(_EDGE, 26, wide, 36, color, 18)
    canvas.text(_EDGE + wide / 2, 44, words, 20, CARD, "mm", strong=True)
    canvas.text(_EDGE + wide + 16, 44, f"step {len(smooth)} of {steps}", 22, INK, "lm")
    last = f"{smooth[-1]:.4f}" if len(smooth) and math.isfinite(smooth[-1]) else "-"
    canvas.text(_WIDTH - _EDGE, 44, f"loss {last}", 22, INK, "rm")


def _losses(
    canvas: Canvas, values: np.ndarray, smooth: np.ndarray, steps: int, cuts: Sequence[int], phase: str
) -> None:
    """The loss of every step, faint, and its smoothed course; the time still to come stays empty."""
    canvas.box(_EDGE, _LOSS_TOP, _INNER, _LOSS_HEIGHT, (28, 29, 36), 6)
    finite = values[np.isfinite(values)]
    if not len(finite):
        words = "waiting for the first step" if not len(values) else "the loss is not a number"
        canvas.text(_WIDTH / 2, _LOSS_TOP + _LOSS_HEIGHT / 2, words, 20, QUIET, "mm")
        return
    low, high = _range(finite, smooth[np.isfinite(smooth)])

    def at(step: float, value: float) -> tuple[float, float]:
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        x = _EDGE + 8 + (_INNER - 96) * step / steps  # the scale's numbers stand to the right
        return x, _LOSS_TOP + _LOSS_HEIGHT - 10 - (_LOSS_HEIGHT - 20) * share

    for mark in (low + 0.1 * (high - low), low + 0.9 * (high - low)):
        y = at(0, mark)[1]
        canvas.box(_EDGE, y, _INNER, 1, RULE)
        canvas.text(_WIDTH - _EDGE - 8, y - 5, f"{mark:.3g}", 16, QUIET, "rs")
    for cut in cuts:
        canvas.box(at(cut, low)[0] - 1, _LOSS_TOP, 2, _LOSS_HEIGHT, CALM)
    if cuts:
        words = "pruned" if phase == "pruned" else "cut"
        x, wide = at(cuts[-1], low)[0], canvas.text_width(words, 16) + 8
        canvas.text(x + 6 if x + wide < _WIDTH - _EDGE - 88 else x - wide, _LOSS_TOP + 20, words, 16, CALM)
    for run in _runs(_thinned(values, 700)):
        canvas.line([at(step, value) for step, value in run], _RAW, 1.2)
    for run in _runs(_thinned(smooth, 350)):
        line = [at(step, value) for step, value in run]
        canvas.line(line, ACCENT, 3)
    canvas.disc(*line[-1], 5, ACCENT)
    canvas.text(_EDGE + 8, _LOSS_TOP + _LOSS_HEIGHT + 22, "0", 16, QUIET, "ms")
    canvas.text(_WIDTH - _EDGE - 88, _LOSS_TOP + _LOSS_HEIGHT + 22, f"{steps} steps", 16, QUIET, "ms")


def _range(finite: np.ndarray, smooth: np.ndarray) -> tuple[float, float]:
    """The values the picture spans: the middle of the raw losses and all of the smoothed ones."""
    low = min(float(np.quantile(finite, 0.02)), float(smooth.min()))
    high = max(float(np.quantile(finite, 0.95)), float(smooth.max()))
    if high - low > 1e-9 * abs(high):
        return low, high
    margin = 0.5 * abs(high) + 1e-9
    return low - margin, high + margin


def _thinned(values: np.ndarray, limit: int) -> list[tuple[float, float]]:
    """(step, value) of at most `limit` points: means over equal stretches; NaN where a stretch has none."""
    if len(values) <= limit:
        return [(index + 1.0, value) for index, value in enumerate(values.tolist())]
    edges = np.linspace(0, len(values), limit + 1).astype(int)
    points = []
    for start, end in pairwise(edges.tolist()):
        part = values[start:end]
        part = part[np.isfinite(part)]
        points.append(((start + end + 1) / 2, float(part.mean()) if len(part) else math.nan))
    return points


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ranks(canvas: Canvas, chart: RankMap, cells: Sequence[Cell], y: float, number_bytes: int) -> None:
    """Mean, range and size in words, and the strip of all layers."""
    values = [cell.value for cell in cells]
    low, high = round(min(values)), round(max(values))
    number = three_digits(mean(cells)) if high else "0"
    canvas.text(_EDGE, y + 28, number, 34, INK)
    words = "rank of every layer" if low == high else f"mean rank, {low} - {high}"
    canvas.text(_EDGE + canvas.text_width(number, 34) + 12, y + 28, words, 20, QUIET)
    words = "1 layer" if len(cells) == 1 else f"{len(cells)} layers"
    if number_bytes:
        words += f", {format_size(sum(cell.value * cell.cost for cell in cells) * number_bytes)}"
    canvas.text(_WIDTH - _EDGE, y + 28, words, 20, QUIET, "rs")
    # A fixed low end: colors of one run can be compared from step to step.
    draw(chart, canvas, _EDGE, y + 52, _INNER, RankScale(0, max(6, math.ceil(math.log2(max(high, 1))))))

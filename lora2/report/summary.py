"""Picture of a LoRA's ranks: their map, their distribution, and the file size against uniform ranks."""

from __future__ import annotations

from PIL import Image

from ..util.text import format_size, three_digits
from .canvas import Canvas
from .colors import ACCENT, INK, QUIET, RULE, RankScale, ramp
from .layer_rank import mean_rank, stored_rank, used_rank
from .rank_map import Cell, RankMap, lay_out
from .rank_map_drawing import draw
from .ranks import RankReport

_WIDTH = 1024.0
_EDGE = 40.0
_INNER = _WIDTH - 2 * _EDGE
_BAR, _BARS_HEAD = 36.0, 52.0


def rank_picture(report: RankReport, width: int = 1024, in_use: bool = False) -> Image.Image:
    """The report as an RGB picture of `width` pixels; its height follows from the number of blocks.

    in_use: color the ranks in use (`LayerRank.energy_rank`, where measured) instead of the ranks stored.
    """
    value = used_rank if in_use else stored_rank
    ranks = [value(layer) for layer in report.layers]
    scale = RankScale.around(min((r for r in ranks if r), default=1), max(ranks))
    measure = Canvas(_WIDTH, 1, int(_WIDTH))
    cells = [Cell(layer.layer_name, value(layer), layer.cost) for layer in report.layers]
    chart = lay_out(cells, _INNER, measure)
    tops = _tops(chart, report)
    canvas = Canvas(_WIDTH, tops["end"], width)
    _title(canvas, report, ranks, mean_rank(report.layers, value), in_use)
    _legend(canvas, ranks, scale, tops["legend"])
    draw(chart, canvas, _EDGE, tops["map"], _INNER, scale)
    _sizes(canvas, report, tops["sizes"])
    return canvas.picture()


def _tops(chart: RankMap, report: RankReport) -> dict[str, float]:
    """Where each section begins."""
    legend = 218.0
    chart_top = legend + 138.0
    sizes = chart_top + chart.height + 44.0
    return {
        "legend": legend,
        "map": chart_top,
        "sizes": sizes,
        "end": sizes + _BARS_HEAD + _BAR * (len(report.uniform_bytes) + 1) + 30.0,
    }


def _title(canvas: Canvas, report: RankReport, ranks: list[int], mean: float, in_use: bool) -> None:
    canvas.text(_EDGE, 52, "LoRA", 22, ACCENT, strong=True)
    canvas.text(_EDGE + canvas.text_width("LoRA", 22) + 2, 44, "2", 15, ACCENT, strong=True)
    kind = "ranks in use, for 99 % of the energy" if in_use else "ranks"
    canvas.text(_EDGE + canvas.text_width("LoRA", 22) + 20, 52, kind, 22, QUIET)
    canvas.text(_EDGE, 102, canvas.fit(report.title, 40, _INNER), 40, INK, strong=True)
    low, high = min(ranks), max(ranks)
    tiles = [
        (str(len(ranks)), "layer" if len(ranks) == 1 else "layers"),
        (format_size(report.bytes), report.dtype),
    ]
    if low == high:
        tiles.insert(0, (str(low), "rank of every layer" if len(ranks) > 1 else "rank"))
    else:
        words = f"of {three_digits(report.mean_rank)} stored" if in_use else "mean rank"
        tiles = [(three_digits(mean), words), (f"{low} - {high}", "lowest - highest"), *tiles]
    for index, (number, words) in enumerate(tiles):
        x = _EDGE + index * _INNER / len(tiles)
        canvas.text(x, 168, number, 46, INK)
        canvas.text(x, 198, words, 22, QUIET)


def _legend(canvas: Canvas, ranks: list[int], scale: RankScale, y: float) -> None:
    """The color scale, with the number of layers of each rank standing on it."""
    bins = 4 * (scale.high - scale.low) + 1
    counts = [0] * bins
    for rank in ranks:
        if rank:
            counts[round(scale.at(rank) * (bins - 1))] += 1
    left, wide = _EDGE, _INNER
    step = wide / bins
    floor = y + 70
    for index, count in enumerate(counts):
        if count:
            tall = max(4.0, 58.0 * count / max(counts))
            fill = ramp()[round(255 * index / (bins - 1))]
            canvas.box(left + index * step + 1, floor - tall, step - 2, tall, fill)
    for pixel in range(int(wide)):
        at = min(max((pixel / wide * bins - 0.5) / (bins - 1), 0.0), 1.0)
        canvas.box(left + pixel, floor + 4, 1, 12, ramp()[round(255 * at)])
    canvas.text(left, floor + 42, f"rank {2**scale.low}", 22, QUIET)
    for octave in range(scale.low + 1, scale.high + 1):
        x = left + (4 * (octave - scale.low) + 0.5) * step
        x = min(x, left + wide - canvas.text_width(str(2**octave), 22) / 2)
        canvas.text(x, floor + 42, str(2**octave), 22, QUIET, "ms")


def _sizes(canvas: Canvas, report: RankReport, y: float) -> None:
    """The file's size between those of one rank for all."""
    canvas.box(_EDGE, y, _INNER, 1.5, RULE)
    canvas.text(_EDGE, y + 38, "Size against one rank for every layer", 24, INK)
    rows = [(number, f"rank {rank}", False) for rank, number in report.uniform_bytes.items()]
    rows.append((report.bytes, "this LoRA", True))
    rows.sort(key=lambda row: (row[0], row[2]))
    longest = max(number for number, _, _ in rows)
    left = _EDGE + 140
    width = _INNER - 140 - 130
    y += _BARS_HEAD
    for number, words, own in rows:
        ink = ACCENT if own else QUIET
        canvas.text(_EDGE, y + _BAR / 2, words, 22, ink, "lm", strong=own)
        wide = max(3.0, width * number / longest)
        canvas.box(left, y + 6, wide, _BAR - 12, ACCENT if own else RULE, 4)
        canvas.text(left + wide + 12, y + _BAR / 2, format_size(number), 22, ink, "lm", strong=own)
        y += _BAR

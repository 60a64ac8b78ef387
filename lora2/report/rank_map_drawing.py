"""Drawing the rank map on a canvas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .canvas import Canvas
from .colors import INK, PLATE, QUIET, RULE, RankScale, ink_on
from .layer_rank import grouped
from .rank_map import Cell, Column, Panel, RankMap, Style, head, mean, tops

_SHORT = {"middle": "mid"}
_MEAN = 0.72  # of a cell's height, where bands follow below


def draw(chart: RankMap, canvas: Canvas, x: float, y: float, width: float, scale: RankScale) -> None:
    """Draw the map with its top left corner at (x, y)."""
    style = chart.style
    for panel in chart.panels:
        if panel.title:
            canvas.text(x, y + style.label, panel.title, style.label, INK, strong=True)
            y += 1.9 * style.label
        # Columns of all lines are as wide as those of the first, so that wrapped lines stand in a grid.
        widths = _widths(panel.lines[0], width - panel.labels[1], style)
        for line in panel.lines:
            y = _draw_line(canvas, panel, style, line, widths[: len(line)], x, y, scale) + 0.5 * style.row
        y += 0.3 * style.row
    if chart.note:
        canvas.text(x, y - 0.8 * style.row + 1.6 * style.label, chart.note, 0.9 * style.label, QUIET)


def _widths(columns: Sequence[Column], width: float, style: Style) -> list[float]:
    """Every column the least width, and the rest of the space by the number of its bands."""
    bands = [column.bands for column in columns]
    breaks = sum(a.stage != b.stage for a, b in pairwise(columns))
    spare = max(0.0, width - len(columns) * style.min_width - (len(columns) - 1 + 2 * breaks) * style.gap)
    return [min(style.min_width + spare * b / sum(bands), max(style.max_width, 14.0 * b)) for b in bands]


def _draw_line(
    canvas: Canvas,
    panel: Panel,
    style: Style,
    columns: Sequence[Column],
    widths: Sequence[float],
    x: float,
    y: float,
    scale: RankScale,
) -> float:
    """One line of columns with its heads; returns where it ends."""
    rows, (groups_width, labels_width) = panel.rows, panel.labels
    left, spans = x + labels_width, []
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        if index and columns[index - 1].stage != column.stage:
            left += 2 * style.gap
        spans.append((left, width))
        left += width + style.gap
    _draw_heads(canvas, columns, spans, y, style)
    starts = [y + head(style) + top for top in tops(rows, style)]
    size = min(style.label, style.row)
    for members in grouped(range(len(rows)), lambda i: rows[i].group).values():
        middle = (starts[members[0]] + starts[members[-1]] + style.row) / 2
        row = rows[members[0]]
        space = groups_width if row.leaf else labels_width - 0.6 * style.label
        canvas.text(x, middle, canvas.fit(row.group, size, space), size, INK, "lm")
    space = labels_width - groups_width - 1.1 * style.label
    for row, top in zip(rows, starts[:-1], strict=True):
        right = x + labels_width - 0.6 * style.label
        canvas.text(right, top + style.row / 2, canvas.fit(row.leaf, size, space), size, QUIET, "rm")
        for column, (at, wide) in zip(columns, spans, strict=True):
            _draw_cell(canvas, column.cells.get(row, []), at, top, wide, style, scale)
    return starts[-1]


def _draw_heads(
    canvas: Canvas, columns: Sequence[Column], spans: Sequence[tuple[float, float]], y: float, style: Style
) -> None:
    """Stages over a rule, block numbers below it."""
    size = style.label
    for members in grouped(range(len(columns)), lambda i: columns[i].stage).values():
        left, right = spans[members[0]][0], sum(spans[members[-1]])
        stage = columns[members[0]].stage
        words = canvas.fit(_SHORT.get(stage, stage), size, right - left)
        canvas.text((left + right) / 2, y + size, words, size, QUIET, "ms")
        canvas.box(left, y + 1.3 * size, right - left, 1.5, RULE)
        numbers = [columns[i].number for i in members]
        if any(canvas.text_width(n, 0.9 * size) > spans[i][1] for n, i in zip(numbers, members, strict=True)):
            numbers = [number.split("-")[0] for number in numbers]
        middles = [spans[i][0] + spans[i][1] / 2 for i in members]
        halves = [canvas.text_width(n, 0.9 * size) / 2 + 0.15 * size for n in numbers]
        # Every number, or every second, fifth, …: as many as stand side by side.
        for stride in (1, 2, 5, 10, 20, 50, len(members)):
            shown = range(0, len(members), stride)
            if all(middles[a] + halves[a] <= middles[b] - halves[b] for a, b in pairwise(shown)):
                for i in shown:
                    canvas.text(middles[i], y + 2.3 * size, numbers[i], 0.9 * size, QUIET, "ms")
                break


def _draw_cell(
    canvas: Canvas, cells: Sequence[Cell], x: float, y: float, width: float, style: Style, scale: RankScale
) -> None:
    """One layer fills its cell; of several, the mean rank stands over a band for each."""
    if not cells:
        canvas.box(x, y + style.row / 2 - 1, width, 2, PLATE)
        return
    value = mean(cells)
    fill = scale.color(value)
    upper = style.row if len(cells) == 1 else _MEAN * style.row if style.numbers else 0.0
    if upper:
        canvas.box(x, y, width, upper if len(cells) == 1 else upper - 2, fill)
    if upper < style.row:
        bands = min(len(cells), max(1, int(width / 1.5)))
        for band in range(bands):
            part = cells[band * len(cells) // bands : (band + 1) * len(cells) // bands]
            start, end = x + width * band / bands, x + width * (band + 1) / bands
            canvas.box(start, y + upper, end - start, style.row - upper, scale.color(mean(part)))
    text = f"{value:.1f}".removesuffix(".0") if value < 9.95 else f"{value:.0f}"
    for size in (style.numbers, 0.8 * style.numbers):
        if size and canvas.text_width(text, size) <= width - 4:
            canvas.text(x + width / 2, y + upper / 2, text, size, ink_on(fill), "mm")
            break

"""The layout of the rank map: projections as rows, blocks from left to right, a band of color per layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .canvas import Canvas
from .layer_names import OUTSIDE, LayerName
from .layer_rank import grouped

_MAX_STAGES, _MAX_PARTS = 12, 6


class Row(NamedTuple):
    """A projection: 'attn1' and 'q', or one name and ''."""

    group: str
    leaf: str


@dataclass(frozen=True)
class Cell:
    """One layer on the map: its name, its rank, its parameters per unit of rank."""

    layer_name: LayerName
    value: float
    cost: int

    @property
    def row(self) -> Row:
        """Its projection."""
        group, leaf = self.layer_name.group, self.layer_name.leaf
        return Row(group, leaf) if group else Row(leaf, "")


@dataclass(frozen=True)
class Style:
    """Sizes in units of the canvas.

    row, gap: height of a cell and the space around it. min_width, max_width: of a column of one band. label,
    numbers: size of the names, and of the ranks printed, 0 for none. max_rows: of one panel; max_lines:
    cells above each other in a panel whose columns are wrapped; max_height: of all panels.
    """

    row: float
    gap: float
    min_width: float
    max_width: float
    label: float
    numbers: float
    max_rows: int
    max_lines: int
    max_height: float


ROOMY = Style(40, 4, 37, 180, 22, 21, max_rows=20, max_lines=26, max_height=1500)
COMPACT = Style(28, 3, 30, 90, 18, 15, max_rows=16, max_lines=16, max_height=2600)


@dataclass
class Column:
    """One block, or some in a row that share a column."""

    stage: str
    number: str
    cells: dict[Row, list[Cell]]

    @property
    def bands(self) -> int:
        """Layers side by side in its fullest cell."""
        return max(map(len, self.cells.values()))


@dataclass
class Panel:
    """A table of its own: lines of columns under one set of rows.

    labels: width of the groups' names, and of everything left of the cells.
    """

    title: str
    rows: list[Row]
    lines: list[list[Column]]
    labels: tuple[float, float]

    def height(self, style: Style) -> float:
        """Height with title and heads, without the space after it."""
        title = 1.9 * style.label if self.title else 0.0
        line = head(style) + tops(self.rows, style)[-1]
        return title + len(self.lines) * line + (len(self.lines) - 1) * 0.5 * style.row


@dataclass
class RankMap:
    """The panels, and the number of layers that did not fit."""

    panels: list[Panel]
    style: Style
    omitted: int = 0

    @property
    def height(self) -> float:
        """Height of all panels and the note below them."""
        spaces = (len(self.panels) - 1) * 0.8 * self.style.row
        note = 1.8 * self.style.label if self.note else 0.0
        return sum(panel.height(self.style) for panel in self.panels) + spaces + note

    @property
    def note(self) -> str:
        """The note below the panels."""
        if self.omitted:
            return f"and {self.omitted} more layers"
        bands = any(column.bands > 1 for panel in self.panels for line in panel.lines for column in line)
        shown = bands and self.style.numbers
        return "A number is the mean of the layers below it, one band each." if shown else ""


def lay_out(cells: Sequence[Cell], width: float, canvas: Canvas, styles: Sequence[Style] = (ROOMY, COMPACT)) -> RankMap:
    """Lay the layers out on a width, in the first style that is not too high; the last one leaves panels out.

    canvas: measures texts, nothing is drawn on it.
    """
    for style in styles:
        chart = _arrange(cells, width, canvas, style)
        if chart.height <= style.max_height:
            return chart
    while len(chart.panels) > 1 and chart.height > style.max_height:
        removed = chart.panels.pop()
        chart.omitted += sum(len(cell) for line in removed.lines for c in line for cell in c.cells.values())
    return chart


def _arrange(cells: Sequence[Cell], width: float, canvas: Canvas, style: Style) -> RankMap:
    tables = [(title, columns, _rows(columns, style.max_rows)) for title, columns in _tables(cells)]
    # Panels of blocks share the width of their labels, so that they stand in one grid.
    shared = [row for _, columns, rows in tables if not _outside(columns) for row in rows]
    panels = []
    for title, columns, rows in tables:
        labels = _labels(rows if _outside(columns) else shared, width, canvas, style)
        panels.append(Panel(title, rows, _lines(columns, len(rows), width - labels[1], style), labels))
    return RankMap(panels, style)


def _outside(columns: Sequence[Column]) -> bool:
    return columns[0].stage in OUTSIDE


def _labels(rows: Sequence[Row], width: float, canvas: Canvas, style: Style) -> tuple[float, float]:
    """Width of the groups' names where a leaf follows them, and of everything left of the cells."""

    def widest(names: Iterable[str], most: float) -> float:
        return min(max((canvas.text_width(name, style.label) for name in names), default=0.0), most)

    groups = widest((row.group for row in rows if row.leaf), 0.2 * width)
    leaves = widest((row.leaf for row in rows), 0.12 * width)
    whole = widest((row.group for row in rows if not row.leaf), 0.3 * width)
    return groups, max(whole, groups + leaves + 0.5 * style.label) + 0.6 * style.label


def _tables(cells: Sequence[Cell]) -> list[tuple[str, list[Column]]]:
    """(title, columns) of every panel: stages of one part that have the same projections share a panel."""
    cells = sorted(cells, key=lambda s: (s.layer_name.order, s.layer_name.unit or 0))
    tables: list[tuple[str, list[Column]]] = []
    parts = grouped(_bounded(cells), lambda s: s.layer_name.part)
    for part, members in parts.items():
        title = part if len(parts) > 1 else ""
        stages = grouped(members, lambda s: s.layer_name.stage)
        outer = [cell for stage in OUTSIDE for cell in stages.pop(stage, [])]
        open_rows: set[Row] = set()
        for stage in stages.values():
            columns = [_column(block) for block in grouped(stage, lambda s: s.layer_name.number).values()]
            rows = {s.row for s in stage}
            if open_rows and 2 * len(rows & open_rows) >= len(rows | open_rows):
                tables[-1][1].extend(columns)
                open_rows |= rows
            else:
                tables.append((title, columns))
                open_rows, title = rows, ""  # the part's title stands over its first panel
        if outer:
            tables.append((title, [_column(block) for block in grouped(outer, lambda s: s.layer_name.stage).values()]))
    return tables


def _bounded(cells: Sequence[Cell]) -> list[Cell]:
    """The same layers with few parts and stages: unknown names must not make a thousand panels."""
    parts = list(dict.fromkeys(s.layer_name.part for s in cells))
    stages = {s.layer_name.stage for s in cells}
    shown = set(parts[:_MAX_PARTS]) if len(parts) > _MAX_PARTS else set(parts)
    out = []
    for cell in cells:
        name = cell.layer_name
        if name.part not in shown:
            name = replace(name, part="other parts")
        if len(stages) > _MAX_STAGES and name.order[2]:
            name = replace(name, stage="other", number="")
        out.append(cell if name is cell.layer_name else replace(cell, layer_name=name))
    return out


def _column(cells: Sequence[Cell]) -> Column:
    name = cells[0].layer_name
    return Column(name.stage, name.number, grouped(cells, lambda s: s.row))


def _rows(columns: Sequence[Column], most: int) -> list[Row]:
    """The rows of a panel in order; of too many, leaves merge into groups, then groups into 'more'."""
    order: dict[Row, tuple[int, tuple[int, str, int, str]]] = {}
    for index, column in enumerate(columns):
        for row, cell in column.cells.items():
            # Outside the blocks, what runs first stands first; inside, every column has the same rows.
            order.setdefault(row, (index if column.stage in OUTSIDE else 0, cell[0].layer_name.row_order))
    rows = sorted(order, key=lambda row: order[row])
    if len(rows) <= most:
        return rows
    merged = list(dict.fromkeys(Row(row.group, "") for row in rows))
    if len(merged) > most:
        merged = [*merged[: most - 1], Row("more", "")]
    known = set(merged)
    for column in columns:
        cells: dict[Row, list[Cell]] = {}
        for row, cell in column.cells.items():
            into = Row(row.group, "")
            cells.setdefault(into if into in known else merged[-1], []).extend(cell)
        column.cells = cells
    return merged


def _lines(columns: list[Column], rows: int, width: float, style: Style) -> list[list[Column]]:
    """Columns in as few lines as they need; beyond the lines allowed, neighbours share a column."""
    per_line = max(1, int((width + style.gap) // (style.min_width + style.gap)))
    lines = min(math.ceil(len(columns) / per_line), max(1, style.max_lines // max(rows, 1)))
    share = 1
    merged = columns
    while len(merged) > lines * per_line and share < len(columns):
        share += 1
        stages = grouped(columns, lambda c: c.stage).values()
        merged = [_merge(s[i : i + share]) for s in stages for i in range(0, len(s), share)]
    each = math.ceil(len(merged) / lines)
    return [merged[i : i + each] for i in range(0, len(merged), each)]


def _merge(columns: Sequence[Column]) -> Column:
    if len(columns) == 1:
        return columns[0]
    cells: dict[Row, list[Cell]] = {}
    for column in columns:
        for row, cell in column.cells.items():
            cells.setdefault(row, []).extend(cell)
    return Column(columns[0].stage, f"{columns[0].number}-{columns[-1].number}", cells)


def mean(cells: Iterable[Cell]) -> float:
    """Mean value weighted by cost."""
    cells = list(cells)
    weight = sum(s.cost for s in cells)
    return sum(s.value * s.cost for s in cells) / weight if weight else 0.0


def head(style: Style) -> float:
    """Height of the stages, the rule and the block numbers."""
    return 2.7 * style.label


def tops(rows: Sequence[Row], style: Style) -> list[float]:
    """Where each row begins below the heads, and where the last one ends; groups of several stand apart."""
    sizes = {name: len(members) for name, members in grouped(rows, lambda row: row.group).items()}
    starts, y = [], 0.0
    for index, row in enumerate(rows):
        before = rows[index - 1].group if index else row.group
        if before != row.group and max(sizes[before], sizes[row.group]) > 1:
            y += 2 * style.gap
        starts.append(y)
        y += style.row + style.gap
    return [*starts, y - style.gap]

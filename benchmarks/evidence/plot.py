"""Plots for the page: lines and points on plain or logarithmic axes, drawn as the pack's own pictures are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lora2.report.canvas import Canvas
from lora2.report.colors import ACCENT, CALM, CARD, INK, PLATE, QUIET, RULE, Color

ROSE: Color = (240, 120, 150)
SKY: Color = (120, 170, 250)
STRAW: Color = (232, 220, 120)
GREY: Color = (120, 124, 138)
PALETTE: tuple[Color, ...] = (ACCENT, CALM, ROSE, SKY, STRAW, QUIET)

WIDTH, HEIGHT = 880.0, 520.0
TEXT = 20.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 96.0, 28.0, 126.0, 76.0
_LINE = 28.0


@dataclass(frozen=True)
class Series:
    """Points in the order of their line.

    x, y: the same number of values. line: joined by a line. low, high: ends of a bar through each point, if any.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    line: bool = True
    points: bool = True
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: Color | None = None


@dataclass
class Plot:
    """One plot. x_log, y_log: powers of this number are ticks (2 or 10); 0 = a plain axis.

    x_ticks: places and words to write instead of the axis's own. limit: a horizontal line, with its words.
    width, height: in units; texts keep their size.
    """

    title: str
    x_name: str
    y_name: str
    series: list[Series] = field(default_factory=list)
    x_log: int = 0
    y_log: int = 0
    x_ticks: Sequence[tuple[float, str]] = ()
    y_range: tuple[float, float] | None = None
    limit: tuple[float, str] | None = None
    width: float = WIDTH
    height: float = HEIGHT

    def save(self, path: Path, pixels: int = 880) -> Path:
        """Draw it; the picture is `pixels` wide, PNG."""
        return _write(self.picture(pixels), path)

    def picture(self, pixels: int = 880) -> Image.Image:
        """The plot, so many pixels wide."""
        canvas = Canvas(self.width, self.height, pixels)
        xs = [v for s in self.series for v in s.x] + [at for at, _ in self.x_ticks]
        ys = [v for s in self.series for v in (*s.y, *s.low, *s.high)] + ([self.limit[0]] if self.limit else [])
        x_axis = _Axis(min(xs), max(xs), self.x_log, _LEFT, self.width - _RIGHT, self.x_ticks)
        low, high = self.y_range or (min(ys), max(ys))
        top = _TOP + _LINE * (self._legend_rows(canvas) - 1)
        y_axis = _Axis(low, high, self.y_log, self.height - _BOTTOM, top)
        canvas.text(24, 40, canvas.fit(self.title, 24, self.width - 48), 24, INK, strong=True)
        self._legend(canvas, draw=True)
        self._frame(canvas, x_axis, y_axis, top)
        for index, series in enumerate(self.series):
            _draw(canvas, series, x_axis.at, y_axis.at, series.colour or PALETTE[index % len(PALETTE)])
        return canvas.picture()

    def _legend_rows(self, canvas: Canvas) -> int:
        return self._legend(canvas, draw=False)

    def _legend(self, canvas: Canvas, draw: bool) -> int:
        """Names with their colours, wrapped; returns the number of rows."""
        x, row = 24.0, 0
        for index, series in enumerate(s for s in self.series if s.name):
            wide = 34 + canvas.text_width(series.name, TEXT) + 24
            if x + wide > self.width - 24 and x > 24:
                x, row = 24.0, row + 1
            if draw:
                y = 74 + row * _LINE
                colour = series.colour or PALETTE[index % len(PALETTE)]
                canvas.disc(x + 12, y - 7, 7, colour)
                canvas.text(x + 28, y, series.name, TEXT, INK)
            x += wide
        return row + 1

    def _frame(self, canvas: Canvas, x_axis: _Axis, y_axis: _Axis, top: float) -> None:
        bottom = self.height - _BOTTOM
        canvas.box(_LEFT, top, self.width - _LEFT - _RIGHT, bottom - top, PLATE)
        for value, words in y_axis.ticks:
            y = y_axis.at(value)
            canvas.box(_LEFT, y - 0.5, self.width - _LEFT - _RIGHT, 1, RULE)
            canvas.text(_LEFT - 10, y, words, TEXT, QUIET, "rm")
        for value, words in x_axis.ticks:
            x = x_axis.at(value)
            canvas.box(x - 0.5, top, 1, bottom - top, RULE)
            half = canvas.text_width(words, TEXT) / 2
            canvas.text(min(x, self.width - 6 - half), bottom + 26, words, TEXT, QUIET, "ms")
        canvas.text((_LEFT + self.width - _RIGHT) / 2, self.height - 16, self.x_name, TEXT, QUIET, "ms")
        canvas.text(24, top - 14, self.y_name, TEXT, QUIET, "ls")
        if self.limit:
            y = y_axis.at(self.limit[0])
            _dashes(canvas, _LEFT, self.width - _RIGHT, y)
            below = y - 28 < top
            canvas.text(self.width - _RIGHT - 8, y + 24 if below else y - 8, self.limit[1], TEXT, QUIET, "rs")


def sheet(plots: Sequence[Plot], columns: int, path: Path, pixels: int = 440) -> Path:
    """Several plots in one picture, row by row, each so many pixels wide."""
    pictures = [plot.picture(pixels) for plot in plots]
    wide, high = pictures[0].size
    whole = Image.new("RGB", (columns * wide, math.ceil(len(pictures) / columns) * high), CARD)
    for index, picture in enumerate(pictures):
        whole.paste(picture, (index % columns * wide, index // columns * high))
    return _write(whole, path)


def _write(picture: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(64).save(path, optimize=True)
    return path


class _Axis:
    """From values to places on the canvas, with ticks. base: of a logarithmic axis, 0 for a plain one."""

    def __init__(
        self, low: float, high: float, base: int, start: float, end: float, ticks: Sequence[tuple[float, str]] = ()
    ) -> None:
        self.base, self.start, self.end = base, start, end
        self._floor = low
        a, b = self._scaled(low), self._scaled(high)
        pad = 0.04 * (b - a) or 0.5
        self.low, self.high = a - pad, b + pad
        self.ticks = list(ticks) or self._own_ticks(a, b)

    def _scaled(self, value: float) -> float:
        return math.log(max(value, 1e-300), self.base) if self.base else value

    def at(self, value: float) -> float:
        """The place of a value; values off the axis lie on its ends."""
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _own_ticks(self, low: float, high: float) -> list[tuple[float, str]]:
        if self.base:
            exponents = range(math.ceil(low - 0.05), math.floor(high + 0.05) + 1)
            step = max(1, math.ceil(len(exponents) / 7))
            values = [float(self.base) ** e for e in exponents if e % step == 0]
            return [(v, number(v)) for v in values]
        rough = (high - low) / 5 or 1.0
        unit = 10.0 ** math.floor(math.log10(rough))
        step_size = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
        first = math.ceil(low / step_size - 1e-9)
        last = math.floor(high / step_size + 1e-9)
        return [(k * step_size, number(k * step_size)) for k in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's words: 0.001, 1e-06, 128."""
    text = f"{value:.10g}"
    return text if len(text) <= 6 else f"{value:.3g}"


def _draw(
    canvas: Canvas, series: Series, x_at: Callable[[float], float], y_at: Callable[[float], float], colour: Color
) -> None:
    places = [(x_at(x), y_at(y)) for x, y in zip(series.x, series.y, strict=True)]
    if series.line and len(places) > 1:
        canvas.line(places, colour, 3)
    for (x, _), low, high in zip(places, series.low, series.high, strict=False):
        canvas.line([(x, y_at(low)), (x, y_at(high))], colour, 2)
    if series.points:
        for x, y in places:
            canvas.disc(x, y, 6, CARD)
            canvas.disc(x, y, 5, colour)


def _dashes(canvas: Canvas, start: float, end: float, y: float) -> None:
    x = start
    while x < end:
        canvas.line([(x, y), (min(x + 10, end), y)], QUIET, 1.5)
        x += 18

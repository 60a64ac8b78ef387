"""Outlines of the world's objects, as masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

Point = tuple[float, float]
Painter = Callable[[ImageDraw.ImageDraw, int], None]


def _polygon(*points: Point) -> Painter:
    """Points in units of the side, (0, 0) top left."""
    return lambda draw, side: draw.polygon([(x * side, y * side) for x, y in points], fill=255)


def _regular(corners: int, turn: float = -90.0, inner: float = 1.0) -> Painter:
    """A regular polygon, or a star whose inner corners lie at `inner` of the radius."""
    count = corners if inner == 1.0 else 2 * corners
    radii = [0.5 if i % 2 == 0 or inner == 1.0 else 0.5 * inner for i in range(count)]
    angles = [math.radians(turn + 360.0 * i / count) for i in range(count)]
    return _polygon(*((0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)))


def _circle(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.ellipse((0, 0, side, side), fill=255)


def _ring(draw: ImageDraw.ImageDraw, side: int) -> None:
    _circle(draw, side)
    draw.ellipse((side * 0.27, side * 0.27, side * 0.73, side * 0.73), fill=0)


def _moon(draw: ImageDraw.ImageDraw, side: int) -> None:
    _circle(draw, side)
    draw.ellipse((side * 0.34, -side * 0.06, side * 1.2, side * 0.8), fill=0)


def _heart(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.ellipse((0, side * 0.05, side * 0.54, side * 0.58), fill=255)
    draw.ellipse((side * 0.46, side * 0.05, side, side * 0.58), fill=255)
    _polygon((0.045, 0.44), (0.955, 0.44), (0.5, 1.0))(draw, side)


def _drop(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.ellipse((side * 0.16, side * 0.32, side * 0.84, side), fill=255)
    _polygon((0.5, 0.0), (0.8, 0.52), (0.2, 0.52))(draw, side)


def _mug(draw: ImageDraw.ImageDraw, side: int) -> None:
    width = int(side * 0.09)
    draw.ellipse((side * 0.52, side * 0.24, side, side * 0.76), outline=255, width=width)
    draw.rounded_rectangle((0, side * 0.04, side * 0.76, side * 0.98), radius=side * 0.1, fill=255)


SHAPES: dict[str, Painter] = {
    "ball": _circle,
    "box": _polygon((0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)),
    "pyramid": _polygon((0.5, 0.02), (1.0, 0.96), (0.0, 0.96)),
    "star": _regular(5, inner=0.46),
    "ring": _ring,
    "cross": _polygon(
        (0.34, 0.0),
        (0.66, 0.0),
        (0.66, 0.34),
        (1.0, 0.34),
        (1.0, 0.66),
        (0.66, 0.66),
        (0.66, 1.0),
        (0.34, 1.0),
        (0.34, 0.66),
        (0.0, 0.66),
        (0.0, 0.34),
        (0.34, 0.34),
    ),
    "heart": _heart,
    "moon": _moon,
    "hexagon": _regular(6, turn=0.0),
    "arrow": _polygon((0.0, 0.32), (0.52, 0.32), (0.52, 0.04), (1.0, 0.5), (0.52, 0.96), (0.52, 0.68), (0.0, 0.68)),
    "drop": _drop,
    "mug": _mug,
}


def mask(shape: str, side: int) -> Image.Image:
    """The outline of a shape: an "L" picture of side x side, 255 inside."""
    image = Image.new("L", (side, side), 0)
    SHAPES[shape](ImageDraw.Draw(image), side)
    return image


def names() -> Sequence[str]:
    """The shapes' names, in order."""
    return tuple(SHAPES)

"""A small drawing surface: units of the design instead of pixels, smooth edges, text that always fits."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

from PIL import Image, ImageDraw, ImageFont

from .colors import CARD, INK, Color

_SMOOTH = 2  # drawn at twice the size and averaged: Pillow's shapes have no smooth edges of their own
_PLAIN = {"\u2013": "-", "\u2014": "-", "\u2212": "-", "\u00d7": "x", "\u00b5": "u", "\u2192": "->"}


@lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font (a subset of Aileron): no font file to ship or to look for."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(pixels))


@lru_cache(maxsize=1024)
def _drawable(char: str) -> bool:
    font = _font(32)
    return bytes(font.getmask(char)) != bytes(font.getmask("\uffff")) or char == " "


@lru_cache(maxsize=4096)
def printable(text: str) -> str:
    """The text in glyphs that the font has: accents dropped, anything else as '?'."""
    out = []
    for char in text:
        for part in _PLAIN.get(char, char):
            if _drawable(part):
                out.append(part)
            else:
                bare = "".join(c for c in unicodedata.normalize("NFKD", part) if " " <= c <= "~")
                out.append(bare or ("" if unicodedata.combining(part) else "?"))
    return "".join(out)


@lru_cache(maxsize=8192)
def _length(text: str, pixels: int) -> float:
    return _font(pixels).getlength(text)


class Canvas:
    """A card of width × height units, scaled to a picture `pixels` wide. Origin top left."""

    def __init__(self, width: float, height: float, pixels: int, card: Color = CARD) -> None:
        self.width, self.height = width, height
        self.scale = _SMOOTH * pixels / width
        self._size = (pixels, max(1, round(height * pixels / width)))
        self._image = Image.new("RGB", (self._size[0] * _SMOOTH, self._size[1] * _SMOOTH), card)
        self._draw = ImageDraw.Draw(self._image)

    def picture(self) -> Image.Image:
        """The finished picture, RGB."""
        return self._image.reduce(_SMOOTH)

    def box(self, x: float, y: float, width: float, height: float, fill: Color, radius: float = 0.0) -> None:
        """A filled rectangle; at least one pixel wide, so that every element is visible."""
        left, top = round(x * self.scale), round(y * self.scale)
        right = max(left + 1, round((x + width) * self.scale)) - 1
        bottom = max(top + 1, round((y + height) * self.scale)) - 1
        if radius:
            limit = min(right - left, bottom - top) / 2
            self._draw.rounded_rectangle((left, top, right, bottom), min(radius * self.scale, limit), fill)
        else:
            self._draw.rectangle((left, top, right, bottom), fill)

    def line(self, points: Sequence[tuple[float, float]], fill: Color, width: float) -> None:
        """A line through the points; a dot where there is one only."""
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        if len(scaled) > 1:
            self._draw.line(scaled, fill, max(1, round(width * self.scale)), joint="curve")
        elif scaled:
            self.disc(*points[0], width, fill)

    def disc(self, x: float, y: float, radius: float, fill: Color) -> None:
        """A filled circle."""
        x, y, r = x * self.scale, y * self.scale, radius * self.scale
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill)

    def text_width(self, text: str, size: float) -> float:
        """Width of a text in units."""
        return _length(printable(text), self._pixels(size)) / self.scale

    def fit(self, text: str, size: float, width: float) -> str:
        """The text, or as much of its beginning as fits, ended by '…'; '' where not even that fits."""
        text = printable(text)
        width += 0.5  # rounding must not cut a text whose own width was asked for
        if self.text_width(text, size) <= width:
            return text
        while text and self.text_width(text + "…", size) > width:
            text = text[:-1].rstrip()
        return text + "…" if text else ""

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        fill: Color = INK,
        anchor: str = "ls",
        strong: bool = False,
    ) -> None:
        """A text at a point; anchor as in Pillow: l, m, r and then s (baseline) or m (middle)."""
        pixels = self._pixels(size)
        stroke = max(1, round(0.012 * pixels)) if strong else 0  # the font has one weight only
        at = (x * self.scale, y * self.scale)
        self._draw.text(at, printable(text), fill, _font(pixels), anchor=anchor, stroke_width=stroke)

    def _pixels(self, size: float) -> int:
        return max(1, round(size * self.scale))

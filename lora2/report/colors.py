"""The pictures' colors: a dark card that suits light and dark interfaces, and a scale for ranks."""

from __future__ import annotations

import math
from functools import lru_cache

Color = tuple[int, int, int]

CARD: Color = (22, 23, 29)
PLATE: Color = (33, 35, 43)  # an empty cell, the track of a bar
RULE: Color = (52, 55, 66)
INK: Color = (238, 239, 243)
QUIET: Color = (160, 165, 178)
ACCENT: Color = (255, 178, 92)
CALM: Color = (108, 196, 190)

# Lightness, chroma and hue (degrees) in OKLCh from low to high rank. Lightness rises evenly, so that the
# order is seen in grey and with any color vision; hue goes from indigo through rose to straw.
_STOPS = (
    (0.36, 0.115, 285.0),
    (0.50, 0.165, 318.0),
    (0.64, 0.185, 10.0),
    (0.78, 0.150, 55.0),
    (0.92, 0.115, 98.0),
)


def oklch(lightness: float, chroma: float, hue: float) -> Color:
    """The sRGB of an OKLCh color (Ottosson 2020), clipped to the gamut."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        _srgb(+4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short),
        _srgb(-1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short),
        _srgb(-0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short),
    )


def _srgb(linear: float) -> int:
    value = min(max(linear, 0.0), 1.0)
    return round(255 * (12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055))


@lru_cache(maxsize=1)
def ramp() -> tuple[Color, ...]:
    """The scale in 256 steps, low to high."""
    colors = []
    for step in range(256):
        at = step / 255 * (len(_STOPS) - 1)
        index = min(int(at), len(_STOPS) - 2)
        low, high, part = _STOPS[index], _STOPS[index + 1], at - index
        hue = low[2] + ((high[2] - low[2] + 180) % 360 - 180) * part
        colors.append(oklch(low[0] + (high[0] - low[0]) * part, low[1] + (high[1] - low[1]) * part, hue))
    return tuple(colors)


def luminance(color: Color) -> float:
    """Relative luminance of WCAG 2, 0 to 1."""
    red, green, blue = (_linear(channel / 255) for channel in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def ink_on(color: Color) -> Color:
    """Black or white, whichever has more contrast on this color: at least 4.5 on any."""
    return (0, 0, 0) if luminance(color) > 0.179 else (255, 255, 255)


class RankScale:
    """Colors for ranks from 2**low to 2**high, even in log2."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    @classmethod
    def around(cls, smallest: float, largest: float) -> RankScale:
        """Whole octaves that hold both ranks, at least four of them, never below rank 1."""
        low = max(0, math.floor(math.log2(max(smallest, 1.0))))
        high = max(low, math.ceil(math.log2(max(largest, 1.0))))
        while high - low < 4:
            # Widen upwards and downwards in turn, so that one rank for all has a color of the middle.
            low, high = (low - 1, high) if low > 0 and (high - low) % 2 == 0 else (low, high + 1)
        return cls(low, high)

    def at(self, rank: float) -> float:
        """0 at the low end, 1 at the high end."""
        return min(max((math.log2(max(rank, 1e-9)) - self.low) / (self.high - self.low), 0.0), 1.0)

    def color(self, rank: float) -> Color:
        """The color of a rank; the plate's for a layer without any."""
        return ramp()[round(255 * self.at(rank))] if rank > 0 else PLATE

"""Subjects to personalise on, which the model has never seen: objects whose surface is a grid of colours of its own.

Complexity is the number of differently coloured parts: k x k cells, from a plain one to a fine pattern. Those named
"tune" choose learning rates and settings; results are told of the others. The graded ones
differ in the number of parts alone: for each, every outline and two sets of colours.
"""

from __future__ import annotations

import colorsys
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from . import world

NAME = "sks"
"""The word that stands for a subject in its captions."""

_OUTLINES = ("ball", "box", "hexagon", "mug", "drop")
_TRAINED_PLACES, _HELD_OUT_PLACES = list(world.PLACES)[:6], list(world.PLACES)[6:]


@dataclass(frozen=True)
class Subject:
    """name: of the subject. cells: along its pattern. shape: its outline. seed: of its colours. rows: of cells, 0 = as many."""

    name: str
    cells: int
    shape: str
    seed: int
    rows: int = 0

    @property
    def parts(self) -> int:
        """Its complexity."""
        return self.cells * (self.rows or self.cells)

    def surface(self, side: int) -> Image.Image:
        """Its pattern: side x side pixels."""
        rng = random.Random(self.seed)  # noqa: S311 (pictures, not secrets)
        colours = [_colour(rng) for _ in range(self.parts)]
        image = Image.new("RGB", (side, side))
        brush, width, height = ImageDraw.Draw(image), side / self.cells, side / (self.rows or self.cells)
        for index, colour in enumerate(colours):
            row, column = divmod(index, self.cells)
            brush.rectangle((column * width, row * height, (column + 1) * width, (row + 1) * height), fill=colour)
        return image

    def pictures(self, count: int, held_out: bool = False) -> list[tuple[Image.Image, str]]:
        """Pictures and captions. Held-out ones show it at places where it was never trained."""
        places = _HELD_OUT_PLACES if held_out else _TRAINED_PLACES
        rng = random.Random(self.seed * 2 + held_out)  # noqa: S311
        positions = list(world.POSITIONS)
        result = []
        for index in range(count):
            place, position = places[index % len(places)], positions[(index + index // len(places)) % len(positions)]
            image = world.draw(self.shape, self.surface, place, position, "big", "photo", rng)
            result.append((image, f"a photo of a big {NAME} {self.shape} {place}, {position}"))
        return result


def _colour(rng: random.Random) -> world.Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.35, 1.0), rng.uniform(0.35, 1.0))
    return int(red * 255), int(green * 255), int(blue * 255)


SUBJECTS = [Subject(f"grid {k}x{k}", k, _OUTLINES[k % 5], 100 + k) for k in range(1, 11)]
TUNING = [Subject(f"tune {k}x{k}", k, _OUTLINES[(k + 2) % 5], 500 + k) for k in (1, 3, 5, 8)]
_BETWEEN = ((1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (4, 5))
"""Rows and cells of a row of graded subjects that are no squares."""

GRADED = [
    Subject(f"graded {k}x{k} {shape} {colours}", k, shape, 9000 + 100 * colours + 10 * k + place)
    for k in range(1, 11)
    for place, shape in enumerate(_OUTLINES)
    for colours in range(2)
] + [
    Subject(f"graded {rows}x{k} {shape} {colours}", k, shape, 9300 + 100 * colours + 10 * number + place, rows)
    for number, (rows, k) in enumerate(_BETWEEN)
    for place, shape in enumerate(_OUTLINES)
    for colours in range(2)
]

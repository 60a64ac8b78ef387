"""The world that the model learned: one object at a place, told in a caption."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from . import shapes

SIDE = 128
"""Pixels of a picture."""

SCALE = 3
"""Pictures are drawn larger, then reduced: smooth edges."""

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 214, 50),
    "green": (40, 150, 70),
    "teal": (30, 160, 165),
    "blue": (45, 85, 200),
    "purple": (125, 60, 170),
    "pink": (245, 130, 180),
    "brown": (120, 75, 40),
    "white": (248, 248, 244),
    "black": (28, 28, 32),
    "grey": (135, 138, 142),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
PLACES: dict[str, tuple[Colour, Colour]] = {
    "on a wooden table": ((222, 206, 180), (150, 98, 52)),
    "on green grass": ((150, 205, 240), (76, 150, 62)),
    "on the beach": ((120, 190, 235), (232, 208, 140)),
    "in the snow": ((170, 190, 215), (244, 247, 252)),
    "on a red carpet": ((90, 62, 74), (186, 40, 48)),
    "at night": ((22, 24, 58), (52, 48, 86)),
    "on a street": ((196, 200, 206), (92, 94, 100)),
    "in the desert": ((250, 200, 150), (214, 150, 84)),
    "in a field of flowers": ((190, 225, 250), (190, 110, 190)),
    "on blue tiles": ((226, 236, 240), (70, 130, 190)),
}
POSITIONS = {"left": 0.3, "centre": 0.5, "right": 0.7}
SIZES = {"small": 0.34, "big": 0.54}
STYLES = ("photo", "cartoon")


@dataclass(frozen=True)
class Scene:
    """What a caption tells."""

    shape: str
    colour: str
    texture: str
    place: str
    position: str
    size: str
    style: str

    @property
    def caption(self) -> str:
        """The scene in words."""
        return (
            f"a {self.style} of a {self.size} {self.texture} {self.colour} {self.shape} {self.place}, {self.position}"
        )

    def told_in_part(self, rng: random.Random) -> str:
        """The caption with every describing word left out now and then, so that shorter ones are understood too."""
        words = (self.size, self.texture, self.colour)
        told = " ".join(word for word in words if rng.random() > 0.15)
        where = f", {self.position}" if rng.random() > 0.15 else ""
        return " ".join(f"a {self.style} of a {told} {self.shape} {self.place}{where}".split())


Surface = Callable[[int], Image.Image]
"""An object's own look: side in pixels → an RGB picture of side x side."""


def random_scene(rng: random.Random) -> Scene:
    """Any scene, all alike likely."""
    return Scene(
        rng.choice(shapes.names()),
        rng.choice(list(COLOURS)),
        rng.choice(TEXTURES),
        rng.choice(list(PLACES)),
        rng.choice(list(POSITIONS)),
        rng.choice(list(SIZES)),
        rng.choice(STYLES),
    )


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """A picture of a scene, SIDE x SIDE. rng moves the object and the horizon a little."""
    surface = _textured(COLOURS[scene.colour], scene.texture)
    return draw(scene.shape, surface, scene.place, scene.position, scene.size, scene.style, rng)


def draw(
    shape: str, surface: Surface, place: str, position: str, size: str, style: str, rng: random.Random
) -> Image.Image:
    """A picture of an object of any surface at a place, SIDE x SIDE."""
    side = SIDE * SCALE
    image = _background(place, side, rng)
    extent = int(side * SIZES[size] * rng.uniform(0.93, 1.07))
    x = int(side * (POSITIONS[position] + rng.uniform(-0.03, 0.03)) - extent / 2)
    y = int(side * (0.56 + rng.uniform(-0.05, 0.05)) - extent / 2)
    brush = ImageDraw.Draw(image)
    ground = PLACES[place][1]
    shadow = tuple(int(v * 0.72) for v in ground)
    brush.ellipse((x, y + extent * 0.9, x + extent, y + extent * 1.1), fill=shadow)
    if style == "cartoon":
        rim = max(int(extent * 0.05), 5)
        image.paste((0, 0, 0), (x - rim, y - rim), shapes.mask(shape, extent + 2 * rim))
    image.paste(surface(extent), (x, y), shapes.mask(shape, extent))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _background(place: str, side: int, rng: random.Random) -> Image.Image:
    sky, ground = PLACES[place]
    image = Image.new("RGB", (side, side), sky)
    horizon = int(side * rng.uniform(0.5, 0.62))
    ImageDraw.Draw(image).rectangle((0, horizon, side, side), fill=ground)
    return image


def _textured(colour: Colour, texture: str) -> Surface:
    other = COLOURS["yellow"] if colour == COLOURS["white"] else COLOURS["white"]

    def paint(side: int) -> Image.Image:
        image = Image.new("RGB", (side, side), colour)
        brush, cell = ImageDraw.Draw(image), side / 6
        for row in range(6):
            top = row * cell
            if texture == "striped" and row % 2:
                brush.rectangle((0, top, side, top + cell), fill=other)
            for column in range(6):
                left = column * cell
                if texture == "checkered" and (row // 2 + column // 2) % 2:
                    brush.rectangle((left, top, left + cell, top + cell), fill=other)
                if texture == "dotted" and (row + column) % 2:
                    brush.ellipse(
                        (left + cell * 0.15, top + cell * 0.15, left + cell * 0.85, top + cell * 0.85), fill=other
                    )
        return image

    return paint

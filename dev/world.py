"""A little world to learn from: one mug in a dozen places, drawn, captioned, the same every time."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw

PLACES = {
    "on a wooden table": ((222, 206, 180), (150, 98, 52)),
    "on green grass": ((150, 205, 240), (76, 150, 62)),
    "on the beach": ((120, 190, 235), (232, 208, 140)),
    "in the snow": ((170, 190, 215), (244, 247, 252)),
    "on a red carpet": ((90, 62, 74), (186, 40, 48)),
    "at night": ((22, 24, 58), (52, 48, 86)),
}
SCALE = 4  # drawn larger, then reduced: smooth edges


def draw_world(folder: Path, count: int = 12, size: int = 64, seed: int = 7) -> list[Path]:
    """Writes `count` pictures of size x size pixels (PNG) and their captions (same stem, .txt)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)  # noqa: S311 (pictures, not secrets)
    paths = []
    for index in range(count):
        place = list(PLACES)[index % len(PLACES)]
        path = folder / f"mug_{index:02d}.png"
        _picture(rng, size, *PLACES[place]).save(path)
        path.with_suffix(".txt").write_text(f"a photo of sks mug {place}\n")
        paths.append(path)
    return paths


def _picture(rng: random.Random, size: int, sky: tuple[int, ...], ground: tuple[int, ...]) -> Image.Image:
    side = size * SCALE
    image = Image.new("RGB", (side, side), sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, int(side * rng.uniform(0.5, 0.65)), side, side), fill=ground)
    width = side * rng.uniform(0.32, 0.46)
    height = width * 1.15
    left, top = rng.uniform(0.12, 0.4) * side, rng.uniform(0.25, 0.4) * side
    right, bottom = left + width, top + height
    handle = width * 0.3
    draw.ellipse(
        (right - handle, top + height * 0.2, right + handle, top + height * 0.75),
        outline=(245, 150, 40), width=int(width * 0.12),
    )
    draw.rounded_rectangle((left, top, right, bottom), radius=width * 0.12, fill=(30, 150, 160))
    draw.rectangle((left, top + height * 0.62, right, top + height * 0.86), fill=(245, 150, 40))
    draw.ellipse((left, top - width * 0.12, right, top + width * 0.12), fill=(18, 96, 108))
    for eye in (0.32, 0.68):
        x, y, r = left + width * eye, top + height * 0.38, width * 0.07
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 250, 245))
    return image.resize((size, size), Image.Resampling.LANCZOS)

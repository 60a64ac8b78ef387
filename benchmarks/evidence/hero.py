"""The README's picture: a subject drawn by the base, with one rank for every layer, and with learned ranks.

`python -m benchmarks.evidence.hero` trains both on a CPU by the node's own bridge (some minutes), loads the files as
ComfyUI's LoraLoader does, and draws all with the same seeds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks import models
from dev.host import ROOT
from dev.painter import subjects
from dev.painter.model import write_checkpoint
from dev.painter.sampling import Painter

PICTURE = ROOT / "docs" / "pictures" / "hero.png"
SUBJECT, PICTURES, SEED = 4, 24, 3
"""Cells along the subject's side; pictures to learn from; of everything random."""

UNIFORM = {"target_rank": 64, "initial_rank": 64, "min_rank": 64, "settle_at": 0.0, "learning_rate": 10**-2.5}
LEARNED = {"target_rank": 32, "settle_keep": 0.98, "learning_rate": 10**-2.5}
"""Both at the learning rate that is best on the subjects of tuning, the same steps and batch."""
STEPS, BATCH = 200, 4

PLACES = ("in a field of flowers, left", "in the desert, centre", "on blue tiles, right")
"""Where it was never seen."""

Column = tuple[str, str, list[Image.Image], list[int]]
"""A title, words below it, pictures, and every layer's rank."""

SIDE, GAP, HEAD, FOOT = 192, 10, 64, 86
INK, QUIET, PAPER, BAR = (30, 32, 38), (110, 114, 124), (255, 255, 255), (70, 120, 210)


def trained(
    painter: Painter, drawn: Sequence[tuple[Image.Image, str]], told: dict[str, Any], name: str
) -> tuple[Any, Path]:
    """The LoRA of a run of the node, and its file."""
    session, settings = models.pack("nodes.runs.run"), models.pack("lora2.config").TrainingConfig
    latents = [{"samples": t} for t in painter.latents([image for image, _ in drawn])]
    captions = [painter.encode(caption) for _, caption in drawn]
    request = session.RunRequest(save_name=name, layers="attention", state_every=0)
    run = session.train(
        painter.patcher,
        latents,
        captions,
        settings(steps=STEPS, batch_size=BATCH, seed=SEED, **told),
        request,
        say=print,
    )
    return run.lora, run.path


def ranks_of(lora: dict[str, Any]) -> list[int]:
    """Every layer's rank."""
    return [len(t) for key, t in lora.items() if key.endswith(("lora_down.weight", "lora_A.weight"))]


def drawn_with(painter: Painter, lora: Any, captions: Sequence[str]) -> list[Image.Image]:
    """What the model draws with a LoRA that ComfyUI's own code has applied, or without one."""
    import comfy.sd

    patcher = painter.patcher
    if lora is not None:
        patcher, _ = comfy.sd.load_lora_for_models(painter.patcher, None, lora, 1.0, 0.0)
    return painter.sample(captions, SEED, patcher=patcher)


def main() -> None:
    """Train, draw, and put the pictures side by side."""
    models.import_comfy()
    import folder_paths

    subject = next(s for s in subjects.SUBJECTS if s.cells == SUBJECT)
    drawn = subject.pictures(PICTURES)
    captions = [f"a photo of a big {subjects.NAME} {subject.shape} {place}" for place in PLACES]
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
        checkpoint = Path(folder) / "painter.safetensors"
        write_checkpoint(checkpoint)
        painter = Painter(checkpoint)
        base = drawn_with(painter, None, captions)
        columns: list[Column] = [("training pictures", "3 of 24", [image for image, _ in drawn[: len(PLACES)]], [])]
        columns.append(("base model", "does not know the subject", base, []))
        for title, told in (("rank 64 everywhere", UNIFORM), ("learned ranks", LEARNED)):
            lora, path = trained(painter, drawn, told, title.replace(" ", "-"))
            ranks = ranks_of(lora)
            spread = f"ranks {min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else "one rank"
            words = f"{path.stat().st_size / 1000:,.0f} KB, {spread}"
            columns.append((title, words, drawn_with(painter, lora, captions), ranks))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    sheet(columns).save(PICTURE, optimize=True)
    print(PICTURE.relative_to(ROOT))


def sheet(columns: Sequence[Column]) -> Image.Image:
    """Columns of pictures under a title, and every layer's rank as a bar below."""
    rows = len(columns[0][2])
    width = len(columns) * (SIDE + GAP) + GAP
    image = Image.new("RGB", (width, HEAD + rows * (SIDE + GAP) + FOOT), PAPER)
    brush = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(17), ImageFont.load_default(13)
    bottom = image.height - 24
    most = max((rank for *_, ranks in columns for rank in ranks), default=1)
    for place, (title, words, pictures, ranks) in enumerate(columns):
        x = GAP + place * (SIDE + GAP)
        brush.text((x, 12), title, INK, large)
        brush.text((x, 38), words, QUIET, small)
        for row, picture in enumerate(pictures):
            image.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, HEAD + row * (SIDE + GAP)))
        step = SIDE / max(len(ranks), 1)
        for index, rank in enumerate(ranks):
            left, tall = x + index * step, max(1, round(rank / most * (FOOT - 30)))
            brush.rectangle((left, bottom - tall, left + step - 2, bottom), fill=BAR)
        if ranks:
            brush.text((x, bottom + 5), "rank of every layer", QUIET, small)
    return image


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

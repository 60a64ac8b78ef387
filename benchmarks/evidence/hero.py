"""README's first picture: a subject drawn by the base model, by a plain LoRA, and by LoRA² at the same bytes.

`python -m benchmarks.evidence.hero` trains both on a CPU with the node's own code (some minutes), loads the files as
ComfyUI's LoraLoader does, and draws all pictures with the same seeds.
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
SUBJECT, PICTURES, SEED = 3, 24, 3
"""Cells along the subject's side (a mug of 3 x 3 colors); training pictures; seed of everything random."""

RANK = 8
PLAIN = {"target_rank": RANK, "initial_rank": RANK, "min_rank": RANK, "settle_at": 0.0}
LEARNED = {"target_rank": RANK}
STEPS, BATCH, RATE = 400, 4, 0.01
"""RATE is the best of both methods at this rank (docs/evidence/pareto.json)."""

PROMPTS = {
    "in the desert": "a photo of a big {} in the desert, centre",
    "as a cartoon, on the beach": "a cartoon of a big {} on the beach, centre",
}
"""Row title: prompt. No training picture shows the subject in the desert or as a cartoon."""

SAMPLER_STEPS, GUIDANCE = 15, 3.0

Column = tuple[str, str, list[Image.Image], list[int]]
"""Title, subtitle, one picture per row, rank of every layer."""

SIDE, GAP, HEAD, ROW_TITLE, FOOT = 208, 12, 66, 24, 88
INK, QUIET, PAPER, BAR = (30, 32, 38), (100, 104, 114), (255, 255, 255), (70, 120, 210)


def trained(
    painter: Painter, drawn: Sequence[tuple[Image.Image, str]], values: dict[str, Any], name: str
) -> tuple[Any, Path]:
    """The LoRA of one run of the node, and its file."""
    run_module, config = models.pack("nodes.runs.run"), models.pack("lora2.config").TrainingConfig
    latents = [{"samples": t} for t in painter.latents([image for image, _ in drawn])]
    captions = [painter.encode(caption) for _, caption in drawn]
    request = run_module.RunRequest(save_name=name, layers="attention", state_every=0)
    values = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "seed": SEED} | values
    run = run_module.train(painter.patcher, latents, captions, config(**values), request, say=print)
    return run.lora, run.path


def ranks_of(lora: dict[str, Any]) -> list[int]:
    """Rank of every layer."""
    return [len(t) for key, t in lora.items() if key.endswith(("lora_down.weight", "lora_A.weight"))]


def drawn_with(painter: Painter, lora: Any, captions: Sequence[str]) -> list[Image.Image]:
    """Pictures of the model with a LoRA applied by ComfyUI's own code, or of the base model."""
    import comfy.sd

    patcher = painter.patcher
    if lora is not None:
        patcher, _ = comfy.sd.load_lora_for_models(painter.patcher, None, lora, 1.0, 0.0)
    return painter.sample(captions, SEED, SAMPLER_STEPS, GUIDANCE, patcher)


def main() -> None:
    """Train, draw, and compose the sheet."""
    models.import_comfy()
    import folder_paths

    subject = next(s for s in subjects.SUBJECTS if s.cells == SUBJECT)
    drawn = subject.pictures(PICTURES)
    captions = [prompt.format(f"{subjects.NAME} {subject.shape}") for prompt in PROMPTS.values()]
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
        checkpoint = Path(folder) / "painter.safetensors"
        write_checkpoint(checkpoint)
        painter = Painter(checkpoint)
        columns = [base_column(painter, captions)]
        for title, values in (("plain LoRA", PLAIN), ("LoRA²", LEARNED)):
            lora, path = trained(painter, drawn, values, title.split()[0])
            columns.append(lora_column(painter, title, lora, path, captions))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    sheet([image for image, _ in drawn[: len(PROMPTS)]], columns).save(PICTURE, optimize=True)
    print(PICTURE.relative_to(ROOT))


def base_column(painter: Painter, captions: Sequence[str]) -> Column:
    """The base model's column."""
    return "base model", "has never seen the mug", drawn_with(painter, None, captions), []


def lora_column(painter: Painter, title: str, lora: Any, path: Path, captions: Sequence[str]) -> Column:
    """The column of a trained LoRA: its size, its pictures and its ranks."""
    ranks = ranks_of(lora)
    spread = f"ranks {min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"rank {ranks[0]} in every layer"
    size = f"{path.stat().st_size / 1000:,.0f} KB"
    return title, f"{size}, {spread}", drawn_with(painter, lora, captions), ranks


def sheet(examples: Sequence[Image.Image], columns: Sequence[Column]) -> Image.Image:
    """Training pictures on the left, then a column per model: title, pictures with a row title, ranks as bars."""
    row_height, rows = ROW_TITLE + SIDE + GAP, len(PROMPTS)
    wide = SIDE + GAP
    image = Image.new("RGB", (GAP + (1 + len(columns)) * wide + GAP, HEAD + rows * row_height + FOOT), PAPER)
    brush = ImageDraw.Draw(image)
    large, small, tiny = (ImageFont.load_default(size) for size in (19, 13, 12))
    left, bottom = GAP + wide + GAP, image.height - 26
    brush.text((GAP, 12), "training pictures", INK, large)
    brush.text((GAP, 40), f"{len(examples)} of {PICTURES}", QUIET, small)
    brush.line((left - GAP, 12, left - GAP, HEAD + rows * row_height - GAP), (215, 218, 224), 1)
    for row, (title, example) in enumerate(zip(PROMPTS, examples, strict=True)):
        y = HEAD + row * row_height
        image.paste(_enlarged(example), (GAP, y + ROW_TITLE))
        brush.text((left, y + 3), f"… {title}", QUIET, small)
    highest = max((rank for *_, ranks in columns for rank in ranks), default=1)
    for number, (title, subtitle, pictures, ranks) in enumerate(columns):
        x = left + number * wide
        plain, square, _ = title.partition("²")  # Pillow's font has no such glyph
        brush.text((x, 12), plain, INK, large)
        brush.text((x + brush.textlength(plain, large) + 1, 9), "2" if square else "", INK, tiny)
        brush.text((x, 40), subtitle, QUIET, small)
        for row, picture in enumerate(pictures):
            image.paste(_enlarged(picture), (x, HEAD + row * row_height + ROW_TITLE))
        for index, rank in enumerate(ranks):
            bar, height = x + index * SIDE / len(ranks), max(1, round(rank / highest * (FOOT - 34)))
            brush.rectangle((bar, bottom - height, bar + SIDE / len(ranks) - 2, bottom), fill=BAR)
        if ranks:
            brush.text((x, bottom + 5), "rank of each layer", QUIET, small)
    return image


def _enlarged(picture: Image.Image) -> Image.Image:
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

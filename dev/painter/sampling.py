"""The checkpoint in use, through ComfyUI's own loaders and samplers, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dev.host import import_comfy

from . import model, world

TOKENS = 77


class Painter:
    """A loaded checkpoint. patcher, clip, vae: as ComfyUI's CheckpointLoaderSimple gives them."""

    def __init__(self, checkpoint: Path) -> None:
        import_comfy()
        import comfy.sd

        with torch.inference_mode():
            self.patcher, self.clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))

    def encode(self, caption: str) -> list[Any]:
        """A caption as ComfyUI's conditioning."""
        with torch.inference_mode():
            return list(self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption)))

    def sample(
        self, captions: Sequence[str], seed: int, steps: int = 20, cfg: float = 4.0, patcher: Any = None
    ) -> list[Image.Image]:
        """One picture for every caption."""
        import comfy.sample

        pictures = []
        empty = self.encode("")
        for number, caption in enumerate(captions):
            with torch.inference_mode():
                latent = torch.zeros(1, model.CHANNELS, world.SIDE // 8, world.SIDE // 8)
                noise = comfy.sample.prepare_noise(latent, seed + number)
                result = comfy.sample.sample(
                    patcher or self.patcher, noise, steps, cfg, "euler", "simple", self.encode(caption), empty, latent,
                    disable_pbar=True, seed=seed + number,
                )  # fmt: skip
                pictures += images(self.vae.decode(result))
        return pictures

    def latents(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Pictures as VAE latents, (1, 16, side / 8, side / 8) each."""
        pixels = [torch.from_numpy(np.array(picture.convert("RGB"))).float()[None] / 255 for picture in pictures]
        with torch.inference_mode():
            return [self.vae.encode(p) for p in pixels]

    def through_autoencoder(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures encoded and decoded."""
        with torch.inference_mode():
            return [image for latent in self.latents(pictures) for image in images(self.vae.decode(latent))]


def images(pixels: Tensor) -> list[Image.Image]:
    """ComfyUI's pictures, (count, height, width, 3) in [0, 1], as Pillow's."""
    return [Image.fromarray((p.clamp(0, 1) * 255).round().byte().cpu().numpy()) for p in pixels]


def texts(captions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """What the checkpoint's text encoder makes of many captions, for pretraining: bfloat16, on the device.

    Returns (count, 77, 768), the last layer's input, and (count, 768), the pooled text: without the zeros that ComfyUI adds.
    """
    import comfy.sd1_clip

    encoder = comfy.sd1_clip.SDClipModel(device=device, dtype=torch.float32)
    encoder.load_sd({k: v.half().float() for k, v in model.text_encoder(0).items()})
    transformer = encoder.transformer.to(device)
    tokens, lengths = token_rows(captions)
    hidden, pooled = [], []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for rows, counts in zip(tokens.split(512), lengths.split(512), strict=True):
            embeds = transformer.get_input_embeddings()(rows.to(device), out_dtype=torch.float32)
            _, inner, _, last = transformer(
                None,
                None,
                embeds=embeds,
                num_tokens=counts.tolist(),
                intermediate_output=-2,
                final_layer_norm_intermediate=False,
            )
            hidden.append(inner.bfloat16())
            pooled.append(last.bfloat16())
    return torch.cat(hidden).clone(), torch.cat(pooled).clone()


def token_rows(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """CLIP's tokens of captions, (count, 77), and how many each has with both ends, (count,).

    CLIP splits at spaces first, so every word is looked up once.
    """
    import comfy.sd1_clip

    tokenizer = comfy.sd1_clip.SDTokenizer()

    def whole(text: str) -> list[int]:
        return [int(token[0]) for token in tokenizer.tokenize_with_weights(text)[0]]

    start, end = whole("")[:2]
    words: dict[str, list[int]] = {}
    rows = []
    for caption in captions:
        row = [start]
        for word in caption.split():
            if word not in words:
                inside = whole(word)[1:]
                words[word] = inside[: inside.index(end)]
            row += words[word]
        rows.append([*row, end])
    tokens = torch.tensor([row + [end] * (TOKENS - len(row)) for row in rows])
    return tokens, torch.tensor([len(row) for row in rows])

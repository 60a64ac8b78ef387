"""Layer names and shapes of real models, as (prefix of the keys, d_in, d_out), and documents made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora2.files.document import LoraDocument
from lora2.method.factors import Factors

Layers = list[tuple[str, int, int]]

# (stage, transformer blocks, width) of every attention module, in the order in which the UNet runs.
UNETS: dict[str, list[tuple[str, int, int]]] = {
    "sd15": [
        *((f"down_blocks_{i}_attentions_{j}", 1, d) for i, d in ((0, 320), (1, 640), (2, 1280)) for j in (0, 1)),
        ("mid_block_attentions_0", 1, 1280),
        *((f"up_blocks_{i}_attentions_{j}", 1, d) for i, d in ((1, 1280), (2, 640), (3, 320)) for j in (0, 1, 2)),
    ],
    "sdxl": [
        *((f"down_blocks_{i}_attentions_{j}", n, d) for i, n, d in ((1, 2, 640), (2, 10, 1280)) for j in (0, 1)),
        ("mid_block_attentions_0", 10, 1280),
        *((f"up_blocks_{i}_attentions_{j}", n, d) for i, n, d in ((0, 10, 1280), (1, 2, 640)) for j in (0, 1, 2)),
    ],
    "koala": [
        *((f"down_blocks_{i}_attentions_0", n, d) for i, n, d in ((1, 2, 640), (2, 5, 1280))),
        *((f"up_blocks_{i}_attentions_{j}", n, d) for i, n, d in ((0, 5, 1280), (1, 2, 640)) for j in (0, 1)),
    ],
}
CONTEXT = {"sd15": 768, "sdxl": 2048, "koala": 2048}


def unet(family: str) -> Layers:
    """Attention q, k, v and o of a UNet under diffusers' names."""
    layers = []
    for module, blocks, width in UNETS[family]:
        for block in range(blocks):
            for attention in ("attn1", "attn2"):
                for projection in ("to_q", "to_k", "to_v", "to_out_0"):
                    crossing = attention == "attn2" and projection in ("to_k", "to_v")
                    name = f"lora_unet_{module}_transformer_blocks_{block}_{attention}_{projection}"
                    layers.append((name, CONTEXT[family] if crossing else width, width))
    return layers


def text_encoder(number: int, blocks: int, width: int) -> Layers:
    """A CLIP text encoder under kohya's names."""
    layers = []
    for block in range(blocks):
        stem = f"lora_te{number}_text_model_encoder_layers_{block}_"
        layers += [(f"{stem}self_attn_{p}_proj", width, width) for p in ("q", "k", "v", "out")]
        layers += [(f"{stem}mlp_fc1", width, 4 * width), (f"{stem}mlp_fc2", 4 * width, width)]
    return layers


def flux(everything: bool = False) -> Layers:
    """Flux under ComfyUI's names: attention only, or every linear layer."""
    d, layers = 3072, []
    for block in range(19):
        for stream in ("img", "txt"):
            stem = f"diffusion_model.double_blocks.{block}.{stream}_"
            layers += [(f"{stem}attn.qkv", d, 3 * d), (f"{stem}attn.proj", d, d)]
            if everything:
                layers += [
                    (f"{stem}mlp.0", d, 4 * d),
                    (f"{stem}mlp.2", 4 * d, d),
                    (f"{stem}mod.lin", d, 6 * d),
                ]
    for block in range(38):
        stem = f"diffusion_model.single_blocks.{block}."
        layers += [(f"{stem}linear1", d, 7 * d), (f"{stem}linear2", 5 * d, d)]
        layers += [(f"{stem}modulation.lin", d, 3 * d)] if everything else []
    if everything:
        layers += [("diffusion_model.img_in", 64, d), ("diffusion_model.final_layer.linear", d, 64)]
    return layers


def experts(count: int) -> Layers:
    """A language model with many experts: names that no rule was made for."""
    return [(f"model.layers.{i // 25}.experts.{i % 25}.w{i % 3}", 1024, 4096) for i in range(count)]


def document(layers: Layers, rank: int | Callable[[int], int], dtype: torch.dtype = torch.float16) -> LoraDocument:
    """A LoRA without data (meta tensors): one rank, or a rank by position."""
    found = {}
    for index, (name, d_in, d_out) in enumerate(layers):
        r = rank if isinstance(rank, int) else rank(index)
        up, down = (
            torch.empty(d_out, r, dtype=dtype, device="meta"),
            torch.empty(r, d_in, dtype=dtype, device="meta"),
        )
        found[name] = Factors(up, down, float(r))
    return LoraDocument(found, dict.fromkeys(found, "kohya"))


def waves(index: int) -> int:
    """Ranks from 1 to 64 that differ from layer to layer."""
    return 2 ** (index * 7 % 7) if index % 3 else 1 + index % 50

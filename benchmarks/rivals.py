"""The same work in other trainers: PEFT on diffusers' UNet, and ComfyUI's own TrainLoraNode."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

from benchmarks import models
from benchmarks.measure import Figures, fresh, peak, timed

STEPS = 8
"""Of TrainLoraNode; the first three do not count."""

DIFFUSERS_SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "attention_head_dim": [5, 10, 20],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def peft_step(sample: models.Sample, rank: int, config: dict[str, Any] = DIFFUSERS_SDXL) -> Figures:
    """A step as diffusers' training scripts take it.

    Base in bf16, q/k/v/o with float32 factors under autocast, fused AdamW, gradients clipped.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fresh()
    with torch.inference_mode(False), torch.enable_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                unet: Any = UNet2DConditionModel(**config)
        finally:
            torch.set_default_dtype(torch.float32)
        unet.requires_grad_(False).train()
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        unet.to(device)
        trained = [p for p in unet.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        latent = sample.latent.to(device, torch.bfloat16)
        text = sample.conditioning["c_crossattn"].to(device, torch.bfloat16)
        pooled = sample.caption[1]["pooled_output"].to(device, torch.bfloat16).repeat(len(latent), 1)
        more = {"text_embeds": pooled, "time_ids": torch.zeros(len(latent), 6, device=device)}
        time_ = torch.full((len(latent),), 500, device=device)

        def work() -> None:
            noise = torch.randn_like(latent)
            with torch.autocast(device, torch.bfloat16):
                out = unet(latent + noise, time_, encoder_hidden_states=text, added_cond_kwargs=more).sample
            torch.nn.functional.mse_loss(out.float(), noise.float()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        figures = timed(work, 8)
        figures.more = {"adapter_parameters": sum(p.numel() for p in trained)}
        return figures


def trainlora_step(patcher: Any, sample: models.Sample, rank: int, steps: int = STEPS) -> Figures:
    """ComfyUI's TrainLoraNode in bypass mode, no checkpointing; it adapts every weighted layer, biases and norms too.

    patcher: needs `cached_patcher_init`, since the node takes a second copy of the model.
    """
    import comfy_extras.nodes_train as host
    import torch

    stamps: list[float] = []

    class Bar:
        def __init__(self, total: int) -> None:
            pass

        def update(self, count: int) -> None:
            stamps.append(time.perf_counter())

    latents, captions = sample.dataset()
    told = {
        "batch_size": len(sample.latent), "steps": steps, "grad_accumulation_steps": 1, "learning_rate": 1e-4, "rank": rank,
        "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "bf16", "lora_dtype": "bf16",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1,
        "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": True,
    }  # fmt: skip
    original, host.ProgressBar = host.ProgressBar, Bar
    fresh()
    try:
        with torch.inference_mode():
            node = host.TrainLoraNode
            out = node.execute(model=[patcher], latents=latents, positive=captions, **{k: [v] for k, v in told.items()})
        trained = [t for t in out.result[0].values() if isinstance(t, torch.Tensor)]
    finally:
        host.ProgressBar = original
    times = [1e3 * (b - a) for a, b in itertools.pairwise(stamps)][2:]
    return Figures(
        statistics.median(times), peak(), statistics.mean(times), {"adapter_parameters": sum(map(_count, trained))}
    )


def _count(tensor: Any) -> int:
    return int(tensor.numel())

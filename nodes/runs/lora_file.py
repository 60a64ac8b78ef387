"""Content of the LoRA file that a run saves: tensors, metadata, and its size before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.cli_args import args

from ...lora2.config import LAYER_CHOICES
from ...lora2.files.document import LoraStateDict, to_state_dict
from ...lora2.files.metadata import build, with_info
from ...lora2.files.rank_info import LayerInfo, Order, layer_info
from ...lora2.files.writer import header
from ...lora2.method.factors import Factors, full_rank
from ...lora2.util.errors import LoraError

log = logging.getLogger("lora2")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

LONG_NUMBER = 12345.678901234567
"""As many digits as JSON ever needs, in place of a rank, a rate or a time that is not known yet."""

ALIGNMENT = 16
"""Bytes of padding that a header may have, in two places."""


@dataclass(frozen=True)
class LoraFile:
    """Properties of a run's file that do not depend on training.

    prefixes: the layers' names in the file. style: of its keys. resolution: (width, height) in pixels. dtype: of the factors.
    """

    prefixes: Mapping[str, str]
    style: str
    family: str
    prediction: str
    resolution: tuple[int, int] | None
    dtype: torch.dtype

    def overhead(self, shapes: Mapping[str, tuple[int, ...]], stem: str, training: Mapping[str, Any]) -> int:
        """Upper bound of the file's bytes that are not factors: header, metadata and alphas.

        A file with a budget is always in singular order (adapters/prune.py), without ν.
        """
        nu = None if training.get("budget_mb") else LONG_NUMBER
        order: Order = "importance" if nu else "singular"
        tensors: dict[str, torch.Tensor] = {}
        info: dict[str, LayerInfo] = {}
        for name, shape in shapes.items():
            rank, prefix = full_rank(shape), self.prefixes[name]
            meta = torch.empty(0, dtype=self.dtype, device="meta")
            factors = Factors(meta.new_empty(shape[0], rank), meta.new_empty(rank, *shape[1:]))
            tensors[prefix + ".lora_down.weight"] = factors.down
            tensors[prefix + ".lora_up.weight"] = factors.up
            tensors[prefix + ".alpha"] = torch.empty((), device="meta")
            info[prefix] = layer_info(factors, nu=nu, target=LONG_NUMBER, order=order)
        fixed = build(
            {}, name=stem, family=self.family, layers={}, training={}, resolution=(99999, 99999), prediction="epsilon"
        )
        counts = dict.fromkeys(
            ("file_overhead", "layer_overhead", "bytes_per_parameter", "pictures", "steps_done"), 10**9
        )
        longest = dict(
            training, **counts, layers=max(LAYER_CHOICES, key=len), last_loss=-LONG_NUMBER / 1e300, seconds=LONG_NUMBER
        )
        metadata = with_info(tensors, fixed, {"format": 1, "layers": info, "training": longest})
        return len(header(tensors, metadata)) + 4 * len(shapes) + 64

    def layer_overhead(self, shapes: Mapping[str, tuple[int, ...]], stem: str, training: Mapping[str, Any]) -> int:
        """Lower bound of the bytes of `overhead` that removing any one layer saves."""
        empty = self.overhead({}, stem, training)
        smallest = min(self.overhead({name: shape}, stem, training) for name, shape in shapes.items())
        return max(0, smallest - empty - ALIGNMENT)

    def state_dict(
        self,
        factors: Mapping[str, Factors],
        stem: str,
        training: Mapping[str, Any],
        rates: Mapping[str, float | None],
        target: float,
    ) -> LoraStateDict:
        """The file's tensors and metadata; in float32 where `dtype` cannot hold the values.

        rates: ν of layers in the order of Λ, None for layers in singular order. UNet files have one alpha for all layers,
        with the scales folded in, so that every reader is exact: diffusers loses the alphas of attention layers where
        they differ (0.39.0 and 0.42.1, measured;
        tests/comfy/test_other_readers.py). In other files alpha is the layer's rank. With ComfyUI's
        option --disable-metadata, the file says nothing of the run.
        """
        named = {self.prefixes[name]: f for name, f in factors.items()}
        alpha = float(max(1, round(target))) if self.style == "kohya" else None
        try:
            tensors = to_state_dict(named, self.style, self.dtype, alpha)
        except LoraError:
            log.warning("LoRA²: values too large for %s; saving as float32 instead.", self.dtype)
            tensors = to_state_dict(named, self.style, torch.float32, alpha)
        layers = {
            self.prefixes[name]: layer_info(
                f, nu=rates[name], target=target, order="singular" if rates[name] is None else "importance"
            )
            for name, f in factors.items()
            if f.rank
        }
        metadata = build(
            tensors,
            name=stem,
            family=self.family,
            layers=layers,
            training=training,
            prediction=self.prediction,
            resolution=self.resolution,
            about_run=not args.disable_metadata,
        )
        return LoraStateDict(tensors, metadata)

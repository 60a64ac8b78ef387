"""A ComfyUI model as a trainable denoiser: loading, conditioning, noise, prediction."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...lora2.method.losses import EPSILON, FLOW, X0, V
from ...lora2.training.denoiser import EMPTY_CAPTION
from ...lora2.util.errors import LoraError
from .checkpointing import checkpointed, norm_inputs_copied, repeated_blocks
from .dataset import Caption, caption_entries, check_caption
from .versions import incompatibility
from .weights import offloaded_weights, offloaded_weights_pinned, trainable_weights

log = logging.getLogger("lora2")

TRAINING_OVER_INFERENCE = 20
"""Activation memory of a training step over the host's estimate for an inference step (SDXL, 1024², measured)."""

OFFLOADED_SHARE = 0.01
"""Fraction of a model's weights off its device above which gradient checkpointing pays."""

_UNTRAINABLE = ("control", "gligen", "hooks", "area", "mask")
"""Conditioning options that act at sampling time only."""

_WHOLE_RANGE = {"start_percent": 0.0, "end_percent": 1.0}

_ENCODE = "Encode the captions with the model's own text encoder."


class HostModel:
    """A diffusion model with encoded captions; implements Denoiser (lora2/training/denoiser.py) inside `training`.

    prediction, sigma_data: parametrization of the network's output (lora2/method/losses.py). device: the load device.
    """

    def __init__(self, patcher: Any, dtype: torch.dtype | None = None) -> None:
        patcher = patcher.get_non_dynamic_delegate() if patcher.is_dynamic() else patcher.clone()
        if dtype is not None:
            patcher.set_model_compute_dtype(dtype)
        self.patcher = patcher
        self.model: Any = patcher.model
        self.device: torch.device = patcher.load_device
        self._captions: list[dict[str, Any]] = []
        self._empty: dict[tuple[int, ...], dict[str, Any]] = {}
        self._empty_source: Caption = []
        self._options: dict[str, Any] = {}
        self._sigmas: Tensor | None = None
        self._may_checkpoint: ExitStack | None = None

    @property
    def latent_format(self) -> Any:
        """The model's latent format: channels, dimensions, scale."""
        return self.patcher.get_model_object("latent_format")

    @property
    def _sampling(self) -> Any:
        # From the patcher: until it is loaded, the model may carry objects that another branch of the graph set.
        return self.patcher.get_model_object("model_sampling")

    # -- before training ---------------------------------------------------------------------------------------------

    def check_latents(self, latents: Sequence[Tensor]) -> None:
        """Raise LoraError for a latent whose dimensions or channels are not the model's."""
        channels = self.latent_format.latent_channels
        dimensions = self.latent_format.latent_dimensions
        for number, latent in enumerate(latents, 1):
            if latent.ndim != dimensions + 1:
                raise LoraError(
                    f"Picture {number} has a latent of shape {list(latent.shape)}, but this model expects {dimensions} "
                    "dimensions after the channels (2 for pictures, 3 for video). Encode the pictures with the model's VAE."
                )
            if latent.shape[0] != channels:
                raise LoraError(
                    f"Picture {number} has a latent of {latent.shape[0]} channels, but this model expects {channels}. "
                    "Encode the pictures with the model's VAE."
                )

    def scale_latents(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """VAE latents in the diffusion model's scale."""
        return [self.latent_format.process_in(latent[None])[0].float().clone() for latent in latents]

    @contextmanager
    def training(
        self,
        latents: Sequence[Tensor],
        captions: Sequence[Caption],
        empty: Caption,
        batch: int,
        checkpointing: str,
    ) -> Iterator[None]:
        """Context: the model is loaded, its weights are frozen plain tensors, and captions are encoded.

        latents: scaled, one per caption; size conditioning comes from each picture's own shape.
        checkpointing: "auto" turns it on when memory is short, now or later (`save_memory`).
        """
        shape = max((tuple(t.shape) for t in latents), key=math.prod)
        memory = self.model.memory_required([batch, *shape])
        with torch.inference_mode():  # as in every other node: moved or patched weights stay inference tensors
            comfy.model_management.load_models_gpu([self.patcher], memory_required=memory * 2)
        checkpoint = self._checkpoint(checkpointing, memory)
        was_training = comfy.model_management.in_training
        with ExitStack() as stack:
            stack.enter_context(offloaded_weights_pinned(self.patcher))
            stack.enter_context(trainable_weights(self.model, self.device))
            if checkpoint:
                stack.enter_context(checkpointed(repeated_blocks(self.model.diffusion_model)))
            elif checkpointing == "auto":
                self._may_checkpoint = stack
            if "num_res_blocks" not in self.model.model_config.unet_config:
                stack.enter_context(norm_inputs_copied(self.model.diffusion_model))
            stack.callback(self._release, was_training)
            comfy.model_management.in_training = True
            self.patcher.pre_run()
            self._options = self._transformer_options()
            self._empty_source = empty
            self._captions = [self._encode(c, t) for c, t in zip(captions, latents, strict=True)]
            yield

    def _release(self, was_training: bool) -> None:
        comfy.model_management.in_training = was_training
        self._captions, self._empty, self._options, self._sigmas, self._may_checkpoint = [], {}, {}, None, None
        self.patcher.cleanup()

    def _checkpoint(self, choice: str, memory: float) -> bool:
        offloaded = sum(weight.nbytes for weight in offloaded_weights(self.model, self.device).values())
        is_offloaded = offloaded > OFFLOADED_SHARE * self.patcher.model_size()
        if is_offloaded:
            log.info(
                "LoRA²: %.1f GB of the model's weights are offloaded to the CPU, so steps take longer.", offloaded / 1e9
            )
        if choice != "auto":
            return choice == "on"
        if is_offloaded:
            log.info(
                "LoRA²: gradient checkpointing is on, so that copies of offloaded weights are not all kept at once."
            )
            return True
        needed = memory * TRAINING_OVER_INFERENCE
        free = self.patcher.get_free_memory(self.device)
        if needed > free:
            log.info(
                "LoRA²: gradient checkpointing is on: %.1f GB of activations do not fit into %.1f GB.",
                needed / 1e9,
                free / 1e9,
            )
        return bool(needed > free)

    def save_memory(self) -> str | None:
        """Turn gradient checkpointing on if it is "auto" and off; returns the change in words, None without one."""
        stack, self._may_checkpoint = self._may_checkpoint, None
        blocks = repeated_blocks(self.model.diffusion_model) if stack else []
        if stack is None or not blocks:
            return None
        stack.enter_context(checkpointed(blocks))
        return "gradient checkpointing is on"

    def _transformer_options(self) -> dict[str, Any]:
        options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options).get(
            "transformer_options", {}
        )
        for kind, added in (("wrappers", self.patcher.wrappers), ("callbacks", self.patcher.callbacks)):
            comfy.patcher_extension.merge_nested_dicts(options.setdefault(kind, {}), added, copy_dict1=False)
        return options

    def _encode(self, caption: Caption, latent: Tensor) -> dict[str, Any]:
        """The model's conditioning for one caption at one latent's shape, as plain tensors."""
        present = [k for k in _UNTRAINABLE if caption[1].get(k) is not None]
        present += [k for k, whole in _WHOLE_RANGE.items() if caption[1].get(k, whole) != whole]
        if present:
            raise LoraError(
                f"A caption's conditioning has {', '.join(present)}, which training does not support. Remove it."
            )
        sample = latent[None].to(self.device)
        conds = comfy.sampler_helpers.convert_cond([caption])
        try:
            encoded = comfy.samplers.encode_model_conds(
                self.model.extra_conds, conds, torch.zeros_like(sample), self.device, "positive", latent_image=sample
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if incompatibility(error):
                raise
            raise LoraError(
                f"A caption does not fit this model ({type(error).__name__}: {error}). {_ENCODE}"
            ) from error
        model_conds = encoded[0]["model_conds"]
        self._check_text(model_conds)
        return {k: _plain_cond(v.process_cond(batch_size=1, area=None)) for k, v in model_conds.items()}

    def _check_text(self, model_conds: dict[str, Any]) -> None:
        config = self.model.model_config.unet_config
        width = config.get("context_dim") or config.get("context_in_dim")
        text = getattr(model_conds.get("c_crossattn"), "cond", None)
        if isinstance(width, int) and isinstance(text, Tensor) and text.shape[-1] != width:
            raise LoraError(
                f"A caption has width {text.shape[-1]}, but this model reads text of width {width}. {_ENCODE}"
            )

    def _empty_for(self, shape: tuple[int, ...]) -> dict[str, Any]:
        if shape not in self._empty:
            self._empty[shape] = self._encode(self._empty_source, torch.zeros(shape[1:]))
        return self._empty[shape]

    # -- Denoiser (lora2/training/denoiser.py) -------------------------------------------------------------------

    @property
    def prediction(self) -> str:
        """The network's output: one of losses.PREDICTIONS; raises LoraError for other kinds."""
        sampling, known = self._sampling, comfy.model_sampling
        if isinstance(sampling, (known.IMG_TO_IMG_FLOW, known.IMG_TO_IMG, known.COSMOS_RFLOW)):
            raise LoraError(f"Models of the kind {type(self.model).__name__} cannot be trained yet.")
        if isinstance(
            sampling, (known.V_PREDICTION, getattr(known, "V_PREDICTION_DDPM", known.V_PREDICTION))
        ):  # newer hosts
            return V
        if isinstance(sampling, known.X0):
            return X0
        if isinstance(sampling, known.EPS):
            return EPSILON
        if isinstance(sampling, known.CONST):
            return FLOW
        raise LoraError(f"Models of the kind {type(self.model).__name__} cannot be trained yet.")

    @property
    def compute(self) -> torch.dtype:
        """The type that the model computes in."""
        return self.model.get_dtype_inference()

    @property
    def sigma_data(self) -> float:
        """The data's standard deviation in the model's parametrization."""
        return float(getattr(self._sampling, "sigma_data", 1.0))

    def sigma(self, time: Tensor, shifted: bool) -> Tensor:
        """σ of times in (0, 1): the model's table for discrete models, time itself or its shift for flow models."""
        sampling = self._sampling
        if self.prediction == FLOW:
            return sampling.sigma(time * getattr(sampling, "multiplier", 1)).float() if shifted else time
        if self._sigmas is None:
            self._sigmas = sampling.sigmas.float().cpu()  # read once: every read waits for the GPU
        table = self._sigmas
        return table[(time * len(table)).long().clamp(max=len(table) - 1)]

    def add_noise(self, sigma: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
        """The noisy latent as the model's sampling defines it."""
        return self._sampling.noise_scaling(sigma, noise, clean, False)

    def conditions(self, captions: Sequence[int], shape: torch.Size) -> list[tuple[list[int], dict[str, Any]]]:
        """The captions' conditioning on the model's device, joined for samples whose conditioning can be concatenated."""
        conds = [self._empty_for((1, *shape[1:])) if i == EMPTY_CAPTION else self._captions[i] for i in captions]
        groups: list[list[int]] = []
        for index, cond in enumerate(conds):
            for group in groups:
                if _fit(conds[group[0]], cond):
                    group.append(index)
                    break
            else:
                groups.append([index])
        return [(group, self._joined([conds[i] for i in group])) for group in groups]

    def _joined(self, conds: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {k: _to(c.concat([other[k] for other in conds[1:]]), self.device) for k, c in conds[0].items()}

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        """The x0 prediction of samples whose conditioning `conditions` joined."""
        options = dict(self._options, cond_or_uncond=[0] * len(sigma), uuids=[], sigmas=sigma)
        return self.model.apply_model(noisy, sigma, transformer_options=options, **conditioning)


def training_dtype(patcher: Any, choice: str) -> torch.dtype | None:
    """The compute type for a precision choice; None keeps the model's own.

    auto keeps bf16 and fp32, and leaves fp16, whose gradients underflow, for bf16 or else fp32.
    """
    # Not get_dtype_inference: an earlier run may have left its choice on the loaded model.
    own = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
    chosen = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(choice)
    if choice == "auto" and own == torch.float16:
        chosen = torch.bfloat16 if comfy.model_management.should_use_bf16(patcher.load_device) else torch.float32
    return None if chosen == own else chosen


def _plain_cond(cond: Any) -> Any:
    """Conditioning computed in inference mode, as tensors that autograd may save."""
    return _map(cond, lambda t: t.detach().clone())


def _to(cond: Any, device: torch.device) -> Any:
    if isinstance(cond, Tensor):
        return cond.to(device)
    return [_to(c, device) for c in cond] if isinstance(cond, list) else cond


def _map(cond: Any, change: Any) -> Any:
    value = cond.cond
    if isinstance(value, Tensor):
        value = change(value)
    elif isinstance(value, list):
        value = [change(v) if isinstance(v, Tensor) else v for v in value]
    return cond._copy_with(value)


def _fit(first: dict[str, Any], other: dict[str, Any]) -> bool:
    return first.keys() == other.keys() and all(first[k].can_concat(other[k]) for k in first)


def empty_caption(captions: Sequence[Caption], given: Sequence[Any] | None) -> Caption:
    """The replacement of a dropped caption: the given one, or zeros shaped like the first caption."""
    if given:
        entries = caption_entries(given[0], "The empty caption")
        if not entries:
            raise LoraError("The empty caption holds no conditioning. Connect a CLIP Text Encode of an empty text.")
        check_caption(entries[0], "The empty caption")
        return entries[0]
    tensor, options = captions[0]
    zeros = {
        k: torch.zeros_like(v) if isinstance(v, Tensor) and k == "pooled_output" else v for k, v in options.items()
    }
    return [torch.zeros_like(tensor), zeros]

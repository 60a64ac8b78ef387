"""Keys of tensors in LoRA files: which belong to one layer, and which kind of layer they make."""

from __future__ import annotations

# Suffixes of up and down per style, in the order in which ComfyUI looks for them
# (comfy/weight_adapter/lora.py): where one layer has several, the first is the one that counts.
KEY_STYLES: dict[str, tuple[str, str]] = {
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "diffusers": ("_lora.up.weight", "_lora.down.weight"),
    "peft": (".lora_B.weight", ".lora_A.weight"),
    "diffusers-processor": (".lora.up.weight", ".lora.down.weight"),
    "bare": (".lora_B", ".lora_A"),
    "transformers": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "peft-default": (".lora_B.default.weight", ".lora_A.default.weight"),
}

# Beside a pair these make the layer more than up · down; alone, another kind of layer.
COMPANIONS: dict[str, str] = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_mid.weight": "Tucker convolution (lora_mid)",
    ".reshape_weight": "changes the shape of its weight",
    ".diff": "full difference",
    ".set_weight": "replaces the weight",
    ".w_norm": "full difference of a norm",
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
    ".lokr_w1_a": "LoKr",
    ".lokr_w2": "LoKr",
    ".lokr_w2_a": "LoKr",
    ".a1.weight": "GLoRA",
    ".oft_blocks": "OFT",
}

# These add to a bias, not to the weight: the pair beside them stays plain.
BIASES: dict[str, str] = {".diff_b": "bias", ".b_norm": "bias", ".lora_B.bias": "bias"}


def stems(key: str) -> list[str]:
    """The prefixes that a key may belong to: without its last one, two or three parts, and without `_lora`."""
    parts = key.split(".")
    found = [".".join(parts[:-n]) for n in (1, 2, 3) if len(parts) > n]
    return found + [stem.removesuffix("_lora") for stem in found if stem.endswith("_lora")]

"""Layer names: part, block and projection of a layer, parsed from its key in any known style."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from ..util.text import clean

# Order of the stages in a run of the network; unknown names sort between 'layer' and 'single'.
_STAGES = (
    "in", "refiner", "down", "input", "double", "joint", "block", "layer", "?", "single", "mid", "middle",
    "up", "output", "out",
)  # fmt: skip

OUTSIDE = ("in", "out", "other")  # layers before and after the blocks: their whole name is the projection

_PARTS = re.compile(
    r"(?:lora_|lycoris_)?(?:prior_)?te(?P<te>\d?)_|text_encoder_?(?P<tenc>\d?)[._]|text_encoders\.(?P<tname>[a-z0-9_]+)\."
    r"|(?:lora_unet_|lora_prior_unet_|lora_transformer_|lycoris_|lora_|(?:base_model\.)?model\.(?=diffusion_model)"
    r"|base_model\.model\.)?(?:diffusion_model\.|diffusion_model_|transformer\.|unet\.|unet_)?",
)
_UNET = re.compile(r"(down|up)_blocks_(\d+)_(attentions|resnets|motion_modules|downsamplers|upsamplers)_(\d+)_(.+)")
_MID = re.compile(r"mid_block_(attentions|resnets|motion_modules)_(\d+)_(.+)")
_SGM = re.compile(r"(input|output)_blocks_(\d+)_(\d+)_(.+)")
_SGM_MID = re.compile(r"middle_block_(\d+)_(.+)")
_UNIT = re.compile(r"transformer_blocks_(\d+)_(.+)")
_NUMBERED = re.compile(r"(?:(.*?[a-z])_)?(\d+)_(?:(\d+)_)?(.*[a-z].*)")
_FIRST = re.compile(r"(?:^|_)(in|emb|embed|embedder|embedding|patch|time|guidance|vector)(?:_|$)")
_LAST = re.compile(r"(?:^|_)(final|out|head)(?:_|$)")

# Heads of numbered blocks, and the word displayed for each.
_HEADS = {
    "double_blocks": "double", "single_blocks": "single", "single_transformer_blocks": "single",
    "transformer_blocks": "block", "blocks": "block", "block": "block", "encoder_block": "layer",
    "joint_blocks": "joint", "joint_transformer_blocks": "joint", "double_layers": "double",
    "single_layers": "single", "layers": "layer", "encoder_layers": "layer",
    "text_model_encoder_layers": "layer", "model_layers": "layer",
    "noise_refiner": "refiner", "context_refiner": "refiner",
}  # fmt: skip

_Q = {
    **dict.fromkeys(("to_q", "q_proj", "q", "query", "wq", "q_linear", "add_q_proj"), "q"),
    **dict.fromkeys(("to_k", "k_proj", "k", "key", "wk", "k_linear", "add_k_proj"), "k"),
    **dict.fromkeys(("to_v", "v_proj", "v", "value", "wv", "v_linear", "add_v_proj"), "v"),
    **dict.fromkeys(("to_out_0", "to_out", "out_proj", "o_proj", "proj", "o", "out", "wo", "out_0", "to_add_out"), "o"),
    **dict.fromkeys(("qkv", "to_qkv", "qkv_proj", "in_proj", "to_added_qkv", "qkv_linear"), "qkv"),
    **dict.fromkeys(("kv", "to_kv", "kv_proj", "kv_linear"), "kv"),
}
_ATTENTION = re.compile(r"(?:layer_\d+_)?(.*?(?:attn\d?|attention|selfattention))_(.+)")
_MODULES = {
    "self_attn": "self", "selfattention": "self", "cross_attn": "cross", "encdecattention": "cross",
    "attention": "attn", "x_block_attn": "x attn", "context_block_attn": "ctx attn",
}  # fmt: skip
_FEED = re.compile(
    r"(?:layer_\d+_)?(.*?(?:mlp|ff|ffn|feed_forward|densereludense)(?:_context)?)_"
    r"(?:net_(0_proj|2)|layers?_(\d)|(fc1|fc2|\d|gate_proj|up_proj|down_proj|w[123]|wi_0|wi_1|wi|wo))"
)
_FEED_LEAF = {
    "0_proj": "in", "0": "in", "fc1": "in", "wi": "in", "2": "out", "fc2": "out", "wo": "out",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
_WHOLE = {
    "proj_in": ("proj", "in"), "proj_out": ("proj", "out"), "proj_mlp": ("mlp", "in"),
    "linear1": ("", "linear1"), "linear2": ("", "linear2"),
    "conv1": ("res", "conv1"), "in_layers_2": ("res", "conv1"), "conv2": ("res", "conv2"),
    "out_layers_3": ("res", "conv2"), "time_emb_proj": ("res", "time"), "emb_layers_1": ("res", "time"),
    "conv_shortcut": ("res", "skip"), "skip_connection": ("res", "skip"),
    "conv": ("sample", "conv"), "op": ("sample", "conv"),
}  # fmt: skip

# Order of the rows; others follow by name.
_GROUPS = (
    "attn1", "attn2", "self", "cross", "img attn", "txt attn", "x attn", "ctx attn", "attn", "add attn",
    "ff", "mlp", "img mlp", "txt mlp", "x mlp", "ctx mlp", "ff ctx", "", "mod", "img mod", "txt mod",
    "proj", "res", "sample",
)  # fmt: skip
_LEAVES = ("q", "k", "v", "qkv", "kv", "o", "in", "gate", "up", "down", "out", "linear1", "linear2", "lin")


@dataclass(frozen=True)
class LayerName:
    """A layer's position in the network.

    part: 'UNet', 'text encoder 2', or ''. stage, number: the block, 'down' and '1.0'. unit: the transformer
    block inside it, where it can have several. group, leaf: the projection, 'attn1' and 'q'. order: sorts
    blocks as they run.
    """

    part: str
    stage: str
    number: str
    unit: int | None
    group: str
    leaf: str
    order: tuple[int, int, str, int, int, int]

    @property
    def block(self) -> str:
        """The block in words, 'down 1.0'."""
        return f"{self.stage} {self.number}".strip()

    @property
    def projection(self) -> str:
        """The projection in words, 'attn1 q'."""
        return f"{self.group} {self.leaf}".strip()

    @property
    def row_order(self) -> tuple[int, str, int, str]:
        """Sorts projections: attention first, q before k before v."""
        group, leaf = _natural(self.group), _natural(self.leaf)
        return (_rank_in(_GROUPS, self.group), group, _rank_in(_LEAVES, self.leaf), leaf)


@lru_cache(maxsize=16384)
def parse_layer_name(name: str) -> LayerName:
    """Parse a layer's key without suffix, in the style of kohya, diffusers, ComfyUI or PEFT.

    A name that fits no known style is split at its first number: words before it are the block, words after
    it the projection. Never fails: any text gives a LayerName with bounded, printable labels.
    """
    text = clean(name, 300)
    part_at, part, path = _part(text)
    path = re.sub(r"[\W_]+", "_", path.lower()).strip("_").replace("_processor_", "_").removesuffix("_lora") or "layer"
    stage, number, indices, unit, rest, family = _block(path)
    group, leaf = _projection(rest) if number or stage not in OUTSIDE else (rest.replace("_", " "), "")
    if part_at == 0:
        part = family
    known = stage if stage in _STAGES else "?"
    order = (part_at, _STAGES.index(known), stage if known == "?" else "", *indices)
    return LayerName(part, clean(stage, 24), number, unit, clean(group, 24), clean(leaf, 24), order)


def _part(name: str) -> tuple[int, str, str]:
    """(order of the part, its name, the rest): the model first, then the text encoders by number."""
    match = _PARTS.match(name)
    if match is None or not match.group():
        return 0, "", name
    rest = name[match.end() :]
    if match.group("tname"):
        return 9, f"text encoder {match.group('tname')[:12]}", rest.removeprefix("transformer.")
    numbers = [g for g in (match.group("te"), match.group("tenc")) if g is not None]
    if numbers:
        return 1 + int(numbers[0] or 1), f"text encoder {numbers[0]}".strip(), rest
    return 0, "", rest


def _block(path: str) -> tuple[str, str, tuple[int, int, int], int | None, str, str]:
    """(stage, number shown, (i, j, kind) to sort, unit, rest of the path, family's name for the part)."""
    if match := _UNET.fullmatch(path):
        stage, i, kind, j, rest = match.groups()
        if kind.endswith("samplers"):
            return stage, f"{i[:4]}.s", (_int(i), 99, 0), None, rest, "UNet"
        unit, rest = _unit(rest)
        rest = f"motion_{rest}" if kind.startswith("motion") else rest
        return stage, f"{i[:4]}.{j[:4]}", (_int(i), _int(j), 0), unit, rest, "UNet"
    if match := _MID.fullmatch(path):
        unit, rest = _unit(match.group(3))
        rest = f"motion_{rest}" if match.group(1).startswith("motion") else rest
        return "mid", "", (0, 0, 0), unit, rest, "UNet"
    if match := _SGM.fullmatch(path):
        unit, rest = _unit(match.group(4))
        return match.group(1), match.group(2)[:6], (_int(match.group(2)), 0, 0), unit, rest, "UNet"
    if match := _SGM_MID.fullmatch(path):
        unit, rest = _unit(match.group(2))
        return "middle", "", (0, 0, 0), unit, rest, "UNet"
    if match := _NUMBERED.fullmatch(path):
        head, i, j, rest = match.groups()
        stage = _HEADS.get(head or "", head or "block")
        if stage == "refiner":
            return (
                stage,
                f"{(head or '')[:1]}{i[:4]}",
                (0 if head == "noise_refiner" else 1, _int(i), 0),
                None,
                rest,
                "",
            )
        number = i[:6] if j is None else f"{i[:4]}.{j[:4]}"
        return stage, number, (_int(i), _int(j), 0), None, rest, ""
    stage = "out" if _LAST.search(path) else "in" if _FIRST.search(path) else "other"
    return stage, "", (0, 0, 0), None, path, ""


def _int(digits: str | None) -> int:
    """A number from a name; a hostile one of a million digits is cut instead of parsed."""
    return int((digits or "0")[:9])


def _unit(rest: str) -> tuple[int | None, str]:
    """A transformer block inside a UNet's attention module, and what follows it."""
    match = _UNIT.fullmatch(rest)
    return (_int(match.group(1)), match.group(2)) if match else (None, rest)


def _projection(rest: str) -> tuple[str, str]:
    """(group, leaf) of the words that follow the block."""
    if rest in _WHOLE:
        return _WHOLE[rest]
    if match := _ATTENTION.fullmatch(rest):
        module, leaf = match.groups()
        if leaf in _Q:
            group = _MODULES.get(module, module.replace("_", " "))
            return ("add attn" if "add" in leaf.split("_") or "added" in leaf else group), _Q[leaf]
    if match := _FEED.fullmatch(rest):
        module = match.group(1)
        leaf = match.group(2) or match.group(3) or match.group(4)
        group = {"ff_context": "ff ctx", "ffn": "ff", "feed_forward": "ff", "densereludense": "ff"}.get(module)
        group = group or module.replace("x_block", "x").replace("context_block", "ctx").replace("_", " ")
        return group, _FEED_LEAF.get(leaf, leaf)
    if match := re.fullmatch(r"(.*?)_?mod(?:ulation)?_(lin|\d)", rest):
        return f"{match.group(1).replace('_', ' ')} mod".strip(), "lin"
    words = rest.split("_")
    return " ".join(words[:-1]), words[-1]


def _natural(words: str) -> str:
    """Sorts 'expert 2' before 'expert 10'."""
    return re.sub(r"\d+", lambda match: match.group().zfill(9), words)


def _rank_in(known: tuple[str, ...], word: str) -> int:
    return known.index(word) if word in known else len(known)

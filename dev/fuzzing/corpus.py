"""Files to begin with: good ones of every kind, and handmade ones that mean harm."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from .files import Part, Parts, dump, with_header

WORDS = (
    "../../../etc/passwd", "/etc/passwd", "C:\\Windows\\win.ini", "\\\\host\\share", "con", "NUL.txt", "a/b\\c:d", ".", "..", "",
    "\0", "\x1b[31mred\x1b[0m", "\x9b31m", "\r\n\r\n", "\b\b\b", "\u2028", "\u202egpj.exe", "\u2066\u2069", "\u200b\u200d\ufeff",
    "l\u043era_un\u0435t", "e\u0301\u0301\u0301" * 40, "\ud800", "\udfff x", "\U000e0041", "\ufdfa" * 30, "\uffff",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</pre><b>", "&lt;b&gt;", "![x](http://evil.example/x.png)",
    "[a](javascript:alert(1))", "<http://evil.example>", "www.evil.example", "mailto:a@b.c", "| a | b |", "|---|",
    "```", "# head",
    "a\n\n# head", "$x$", "{{7*7}}", "${7*7}", "%s%n%x", "{0.__class__}", "__proto__", "__metadata__", "__class__", "[[a]]",
    "x" * 5000, "1" * 5000, "9" * 19, "-1", "NaN", "Infinity", "None", "null", "true", "0x10", "1e999",
)  # fmt: skip
"""Texts for names and metadata."""

LAYERS = (
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet_mid_block_attentions_0_proj_in",
    "lora_unet_up_blocks_99999999999999999999_attentions_0_proj_out", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.3.linear1",
    "lora_unet_input_blocks_1_1_proj_in",
    "transformer.single_transformer_blocks.0.attn.to_q", "unet.down_blocks.0.resnets.0.conv1", "lora_unet_conv_in",
    "a", "1", "_", ".",
    "diffusion_model.layers." + "9" * 400 + ".attention.q", "lora_unet_" + "blocks_1_" * 300 + "q", "_" * 3000, "0_" * 2000 + "a",
)  # fmt: skip
"""Prefixes of layers, some as trainers write them."""

PAIRS = (
    (".lora_up.weight", ".lora_down.weight"), ("_lora.up.weight", "_lora.down.weight"), (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"), (".lora_B", ".lora_A"), (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
)  # fmt: skip
OTHERS = (
    ".alpha", ".dora_scale", ".lora_mid.weight", ".diff", ".diff_b", ".hada_w1_a", ".lokr_w1", ".w_norm", ".reshape_weight",
    ".oft_blocks", ".a1.weight", ".lora_magnitude_vector", ".lora_B.bias", "", ".weight", ".bias", ".alpha.alpha", ".lora_up",
)  # fmt: skip
"""Endings of keys."""


def layer(
    prefix: str, rank: int = 2, size: tuple[int, int] = (4, 3), style: int = 0, dtype: str = "F16", kernel: int = 0
) -> list[Part]:
    """The tensors of one layer with its alpha; kernel: the side of a convolution's, 0 for a linear layer."""
    rng = random.Random(len(prefix))  # noqa: S311 (files, not secrets)
    up, down = PAIRS[style]
    noise = [b"".join(struct.pack("<e", rng.uniform(-1, 1)) for _ in range(64)) for _ in range(2)]
    square = [kernel, kernel] if kernel else []
    return [
        Part(prefix + up, dtype, [size[0], rank] + [1] * len(square), noise[0]),
        Part(prefix + down, dtype, [rank, size[1], *square], noise[1]),
        Part(prefix + ".alpha", "F32", [], struct.pack("<f", float(rank))),
    ]


def account(parts: list[Part], **more: Any) -> str:
    """Our JSON for these tensors, as a trained file has it."""
    layers = {
        p.name.removesuffix(".lora_down.weight"): {
            "rank": p.shape[0], "nu": 0.7, "target": 2.0, "shape": [4, *p.shape[1:]], "order": "importance",
        }
        for p in parts if p.shape and p.name.endswith(".lora_down.weight")
    }  # fmt: skip
    return json.dumps({"format": 1, "layers": layers, "training": {"steps": 3, "optimizer": "adamw"}} | more)


def good() -> dict[str, bytes]:
    """Files that read without complaint: every style, type and kind of layer."""
    ours = [part for name in LAYERS[:3] for part in layer(name)]
    found = {
        "ours": Parts(ours, {"lora2": account(ours), "ss_output_name": "mug", "ss_network_dim": "Dynamic"}).to_bytes(),
        "convolution": Parts(layer(LAYERS[8], kernel=3) + layer(LAYERS[9], kernel=1)).to_bytes(),
        "no alpha": Parts(layer(LAYERS[4])[:2]).to_bytes(),
        "rank 0": Parts(layer(LAYERS[0], rank=0) + layer(LAYERS[1])).to_bytes(),
        "rank above size": Parts(layer(LAYERS[0], rank=9)).to_bytes(),
        "others": Parts(
            layer(LAYERS[0]) + [Part(LAYERS[1] + ending, "F16", [2, 2], b"\0<") for ending in OTHERS]
        ).to_bytes(),
    }
    for style in range(len(PAIRS)):
        for dtype in ("F32", "BF16", "F8_E4M3", "F64", "I8", "C64"):
            found[f"style {style} {dtype}"] = Parts(layer(LAYERS[style], style=style, dtype=dtype)).to_bytes()
    return found


def hostile() -> dict[str, bytes]:
    """Files that mean harm: each must end in a result or in our error, soon and within little memory."""
    up = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}
    eight, ours = b"\0<\0<\0<\0<", layer(LAYERS[0])
    name = "a.lora_up.weight"
    found: dict[str, bytes] = {
        "nothing": b"",
        "seven bytes": b"1234567",
        "a header of 2⁶⁴": b"\xff" * 8,
        "a header longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
        "no header": with_header(b""),
        "spaces": with_header(b" " * 100_000),
        "a list": with_header(b"[]"),
        "not UTF-8": with_header(b'{"\xff\xfe":1}'),
        "UTF-16": with_header("{}".encode("utf-16")),
        "a byte order mark": with_header(b"\xef\xbb\xbf{}"),
        "deep lists": with_header(b'{"__metadata__":' + b"[" * 200_000),
        "deep tables": with_header(b'{"a":' * 100_000),
        "deep and closed": with_header(b'{"__metadata__":' + b"[" * 900 + b"]" * 900 + b"}"),
        "millions of lists": with_header(b'{"a":[' + b"[]," * 2_000_000 + b"0]}"),
        "sixty thousand layers": with_header(
            dump({f"l{i}{end}": up | {"shape": [0, 0], "data_offsets": [0, 0]} for i in range(60_000) for end in PAIRS[0]})
        ),
        "a million names": with_header(b"{" + b",".join(b'"%d":0' % i for i in range(1_000_000)) + b"}"),
        "a number of a million digits": with_header(b'{"a":' + b"9" * 1_000_000 + b"}"),
        "NaN as a size": with_header(b'{"a":{"dtype":"F16","shape":[NaN],"data_offsets":[0,2]}}', eight),
        "infinite offsets": with_header(b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,1e999]}}', eight),
        "twice the same name": with_header(b'{"a":' + dump(up) + b',"a":' + dump(up) + b"}", eight),
        "metadata twice": with_header(b'{"__metadata__":{},"__metadata__":{"a":"b"}}'),
        "metadata of numbers": with_header(b'{"__metadata__":{"a":1}}'),
        "metadata as a text": with_header(b'{"__metadata__":"a"}'),
        "text as a tensor": with_header(b'{"a":"b"}'),
        "bytes left over": with_header(dump({name: up}), eight + b"more"),
    }  # fmt: skip
    entries: dict[str, Any] = {
        "overlap": {name: up, "b": up | {"data_offsets": [4, 12]}},
        "a gap": {name: up, "b": up | {"data_offsets": [10, 18]}},
        "backwards": {name: up | {"data_offsets": [8, 0]}},
        "negative": {name: up | {"data_offsets": [-8, 0]}},
        "offsets of terabytes": {name: up | {"shape": [1 << 20, 1 << 20], "data_offsets": [0, 2 << 40]}},
        "a shape beyond 64 bits": {name: up | {"shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}},
        "a shape that overflows to 8": {name: up | {"shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}},
        "nothing times everything": {name: up | {"shape": [0, (1 << 63) - 1], "data_offsets": [0, 0]}},
        "a thousand dimensions": {name: up | {"shape": [1] * 1000, "data_offsets": [0, 2]}},
        "dimensions as texts": {name: up | {"shape": ["2", "2"]}},
        "dimensions as fractions": {name: up | {"shape": [2.0, 2.0]}},
        "true as a size": {name: up | {"shape": [True, True], "data_offsets": [0, 2]}},
        "an unknown type": {name: up | {"dtype": "F4"}},
        "a type that is a table": {name: up | {"dtype": {"F16": 1}}},
        "more in an entry": {name: up | {"more": 1}},
    }
    found |= {what: with_header(dump(entry), eight * 2) for what, entry in entries.items()}
    for number, text in enumerate(WORDS):
        found[f"name {number}"] = Parts(layer(text)).to_bytes()
        found[f"text {number}"] = Parts(
            ours,
            {text: text, "ss_output_name": text, "modelspec.title": text, "ss_sd_model_name": text, "ss_steps": text},
        ).to_bytes()
        found[f"training {number}"] = Parts(ours, {"lora2": account(ours, training={text: text})}).to_bytes()
        found[f"account {number}"] = Parts(ours, {"lora2": text}).to_bytes()
        left_out = {text + "x": {"rank": 0, "shape": [4, 3]}}
        found[f"left out {number}"] = Parts(ours, {"lora2": account(ours, layers=left_out)}).to_bytes()
    for name in LAYERS:
        found[f"layer {name[:40]}"] = Parts(layer(name)).to_bytes()
    accounts = {
        "nested": "[" * 100_000, "a long one": '{"format":1,"layers":{},"x":"' + "x" * (9 << 20) + '"}',
        "NaN": '{"format":1,"layers":{"a":{"nu":NaN}}}',
        "infinity": '{"format":1,"layers":{"a":{"nu":1e999}}}', "ten thousand empty layers": account(
            ours, layers={f"lora_unet_b_{i}_attn_q{i}": {"rank": 0, "shape": [1 << 30, 1 << 30]} for i in range(12_000)}
        ),
        "huge numbers": account(ours, layers={LAYERS[0]: {"rank": 10**300, "nu": 1e308, "target": 1e308, "shape": [10**300]}}),
        "the least ν": account(ours, layers={LAYERS[0]: {"nu": 5e-324}}),
        "ν of a million": account(ours, layers={LAYERS[0]: {"nu": 1e6}}),
        "order of another kind": account(ours, layers={LAYERS[0]: {"nu": 1, "order": ["importance"]}}),
        "training of lists": account(ours, training={"a": [[[]]], "b": {"c": {}}}), "the future": account(ours, format=2),
    }  # fmt: skip
    found |= {f"account: {what}": Parts(ours, {"lora2": text}).to_bytes() for what, text in accounts.items()}
    values = {"NaN": b"\0\x7e", "infinity": b"\0\x7c", "largest": b"\xff\x7b", "smallest": b"\x01\0", "zero": b"\0\0"}
    for what, value in values.items():
        found[f"factors: {what}"] = Parts(
            [Part(p.name, p.dtype, p.shape, value) if p.shape else p for p in ours]
        ).to_bytes()
        alpha = Part(ours[2].name, "F16", [], value)
        found[f"alpha: {what}"] = Parts([*ours[:2], alpha]).to_bytes()
    huge = struct.pack("<f", 3e38)
    found["factors that overflow"] = Parts([Part(p.name, "F32", p.shape, huge) for p in ours]).to_bytes()
    found["a rank of sixty thousand"] = Parts(layer(LAYERS[0], rank=30_000, size=(1, 1))).to_bytes()
    found["factors that do not fit"] = Parts([ours[0], Part(ours[1].name, "F16", [7, 3], b"\0")]).to_bytes()
    found["half of a pair"] = Parts(ours[:1]).to_bytes()
    found["an alpha of eight"] = Parts([*ours[:2], Part(ours[2].name, "F32", [8], b"\0")]).to_bytes()
    return found

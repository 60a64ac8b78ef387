"""Keys, factors, and the file: what is written is what is read, and nothing broken is let in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora2.files.document import LoraStateDict, fold_scale, parse, read, to_state_dict
from lora2.files.keys import KEY_STYLES
from lora2.method.factors import Factors
from lora2.util.errors import LoraError
from lora2.util.text import escaped

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(rank: int, d_out: int = 6, inner: tuple[int, ...] = (5,), alpha: float | None = None) -> Factors:
    generator = torch.Generator().manual_seed(rank)
    up = torch.randn(d_out, rank, *[1] * (len(inner) - 1), generator=generator)
    return Factors(up, torch.randn(rank, *inner, generator=generator), alpha)


def delta(factors: Factors) -> Tensor:
    scale = 1.0 if factors.alpha is None else factors.alpha / factors.rank
    return scale * (factors.up.double().flatten(1) @ factors.down.double().flatten(1)).reshape(
        factors.up.shape[0], *factors.down.shape[1:]
    )


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit, with types and shapes."""
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype
        and left[k].shape == right[k].shape
        and left[k].contiguous().view(-1).view(torch.uint8).equal(right[k].contiguous().view(-1).view(torch.uint8))
        for k in left
    )


# --- from factors to tensors


@pytest.mark.parametrize("style", ["kohya", "peft"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tensors_of_a_file(style: str, dtype: torch.dtype) -> None:
    layers = {"p.linear": layer(3), "p.conv": layer(2, inner=(4, 3, 3)), "p.empty": layer(0)}
    tensors = to_state_dict(layers, style, dtype)
    up, down = KEY_STYLES[style]
    assert set(tensors) == {f"p.{n}{s}" for n in ("linear", "conv") for s in (up, down, ".alpha")}
    assert all(t.is_contiguous() and t.device.type == "cpu" for t in tensors.values())
    for name in ("linear", "conv"):
        alpha = tensors[f"p.{name}.alpha"]
        assert alpha.dtype == torch.float32
        assert alpha.shape == ()
        assert alpha == layers[f"p.{name}"].rank
        assert torch.equal(tensors[f"p.{name}{up}"], layers[f"p.{name}"].up.to(dtype))
        assert torch.equal(tensors[f"p.{name}{down}"], layers[f"p.{name}"].down.to(dtype))


@pytest.mark.parametrize("alpha", [1.0, 0.37, -2.0, 0.0, 64.0])
def test_a_scale_is_folded_in(alpha: float) -> None:
    factors = layer(3, alpha=alpha)
    folded = fold_scale(factors)
    # Two float32 roundings of 6e-8 in each factor.
    assert torch.allclose(delta(folded), delta(factors), rtol=1e-6, atol=1e-6)
    assert folded.alpha == 3


@pytest.mark.parametrize("one", [1.0, 8.0])
def test_one_alpha_for_all_layers(one: float) -> None:
    layers = {"p.a": layer(1), "p.b": layer(7, alpha=3.0), "p.c": layer(32), "p.empty": layer(0)}
    document = parse(to_state_dict(layers, "kohya", torch.float32, alpha=one))
    assert set(document.layers) == {"p.a", "p.b", "p.c"}
    for name, factors in document.layers.items():
        assert factors.alpha == one
        # Two float32 roundings of 6e-8 in each factor.
        assert (delta(factors) - delta(layers[name])).norm() <= 1e-6 * delta(layers[name]).norm()


def test_the_file_holds_copies() -> None:
    factors = layer(2)
    tensors = to_state_dict({"p": factors}, "peft", torch.float32)
    factors.up.zero_()
    assert tensors["p.lora_B.weight"].any()


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e5), (torch.float32, float("nan"))])
def test_values_that_no_file_should_hold(dtype: torch.dtype, value: float) -> None:
    with pytest.raises(LoraError, match="Layer p\\.q contains NaN"):
        to_state_dict({"p.q": Factors(torch.full((4, 1), value), torch.ones(1, 4))}, "kohya", dtype)


# --- from tensors to layers


@pytest.mark.parametrize("style", list(KEY_STYLES))
@pytest.mark.parametrize("alpha", [None, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2, dtype=torch.int32)])
def test_every_style_is_read_and_given_back(style: str, alpha: Tensor | None) -> None:
    factors = layer(3, inner=(4, 3, 3))
    up, down = KEY_STYLES[style]
    tensors = {f"some.prefix{up}": factors.up.half(), f"some.prefix{down}": factors.down.double()}
    if alpha is not None:
        tensors["some.prefix.alpha"] = alpha
    document = parse(tensors)
    assert set(document.layers) == {"some.prefix"}
    assert not document.other
    assert document.styles == {"some.prefix": style}
    assert document.layers["some.prefix"].alpha == (None if alpha is None else 2.0)
    assert all(document.state_dict()[key] is tensor for key, tensor in tensors.items())
    assert len(document.state_dict()) == len(tensors)


PAIR = {
    "x.lora_up.weight": torch.ones(4, 2),
    "x.lora_down.weight": torch.ones(2, 5),
    "x.alpha": torch.tensor(1.0),
}


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        (".dora_scale", "DoRA"),
        (".lora_magnitude_vector", "DoRA"),
        (".lora_mid.weight", "Tucker"),
        (".reshape_weight", "shape"),
        (".diff", "difference"),
        (".set_weight", "replaces"),
        (".w_norm", "norm"),
        (".hada_w1_a", "LoHa"),
        (".lokr_w1", "LoKr"),
        (".lokr_w2_a", "LoKr"),
        (".oft_blocks", "OFT"),
        (".a1.weight", "GLoRA"),
    ],
)
def test_a_pair_that_is_more_than_a_pair_stays_whole(suffix: str, reason: str) -> None:
    tensors = {**PAIR, f"x{suffix}": torch.ones(4, 1)}
    document = parse(tensors)
    assert not document.layers
    assert set(document.other) == set(tensors)
    assert list(document.uncut()) == ["x"]
    assert reason in document.uncut()["x"]
    assert same(document.state_dict(), tensors)


def test_what_is_no_pair_is_kept() -> None:
    others = {
        "x.diff_b": torch.ones(4),
        "x.lora_B.bias": torch.ones(4),
        "y.lokr_w1": torch.ones(2, 2),
        "y.lokr_w2": torch.ones(2, 2),
        "y.alpha": torch.tensor(1.0),
        "z.lora_down.weight": torch.ones(2, 5),
        "i.lora_A.weight": torch.ones(2, 5, dtype=torch.int8),
        "i.lora_B.weight": torch.ones(4, 2, dtype=torch.int8),
        "emb_params": torch.ones(1, 768),
        ".lora_up.weight": torch.ones(4, 2),
    }
    document = parse({**PAIR, **others})
    assert set(document.layers) == {"x"}
    assert set(document.other) == set(others)
    reasons = document.uncut()
    assert reasons["x.diff_b"] == reasons["x.lora_B.bias"] == "bias"
    assert reasons["y"] == "LoKr"
    assert {"y.lokr_w1", "y.lokr_w2", "y.alpha", "x"}.isdisjoint(reasons)
    assert {"emb_params", "z.lora_down.weight", "i.lora_A.weight", "i.lora_B.weight"} <= set(reasons)
    assert same(document.state_dict(), {**PAIR, **others})


def test_of_two_styles_comfyui_takes_the_first() -> None:
    tensors = {"x.lora_B.weight": torch.ones(4, 1), "x.lora_A.weight": torch.ones(1, 5), **PAIR}
    document = parse(tensors)
    assert document.styles == {"x": "kohya"}
    assert set(document.other) == {"x.lora_B.weight", "x.lora_A.weight"}


def test_a_layer_of_rank_0_is_read_and_not_given_to_others() -> None:
    # ComfyUI divides an alpha by the rank.
    tensors = {
        **PAIR,
        "e.lora_B": torch.ones(4, 0),
        "e.lora_A": torch.ones(0, 5),
        "e.alpha": torch.tensor(1.0),
    }
    document = parse(tensors)
    assert document.layers["e"].rank == 0
    assert same(document.state_dict(), PAIR)


def test_metadata_of_a_state_dict_is_taken() -> None:
    assert parse(LoraStateDict(PAIR, {"a": "b"})).metadata == {"a": "b"}
    assert parse(LoraStateDict(PAIR, {"a": "b"}), {}).metadata == {} == parse(PAIR).metadata
    assert isinstance(LoraStateDict(PAIR), dict)
    assert LoraStateDict(PAIR).metadata == {}


BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": (
        {"a.lora_A.weight": torch.ones(2, 5), "a.lora_B.weight": torch.ones(4, 3)},
        r"fit.*\[4, 3\].*\[2, 5\]",
    ),
    "flat": ({"a.lora_A.weight": torch.ones(2), "a.lora_B.weight": torch.ones(4, 2)}, "fit together"),
    "scalar": ({"a.lora_A.weight": torch.ones(()), "a.lora_B.weight": torch.ones(())}, "fit together"),
    "no down": ({"a.lora_B.weight": torch.ones(4, 2)}, "has lora_B.weight but no lora_A.weight"),
    "no size": ({"a.lora_A.weight": torch.ones(2, 0), "a.lora_B.weight": torch.ones(4, 2)}, "size 0"),
    "NaN": (
        {"a.lora_A.weight": torch.full((2, 5), float("nan")), "a.lora_B.weight": torch.ones(4, 2)},
        "NaN",
    ),
    "inf": (
        {"a.lora_A.weight": torch.ones(2, 5), "a.lora_B.weight": torch.full((4, 2), float("inf")).bfloat16()},
        "infinity",
    ),
    "fp8 NaN": (
        {
            "a.lora_A.weight": torch.full((2, 5), float("nan")).to(torch.float8_e4m3fn),
            "a.lora_B.weight": torch.ones(4, 2),
        },
        "NaN",
    ),
    "alphas": (
        {"a.lora_A": torch.ones(2, 5), "a.lora_B": torch.ones(4, 2), "a.alpha": torch.ones(2)},
        "alpha of layer a",
    ),
    "alpha NaN": (
        {"a.lora_A": torch.ones(2, 5), "a.lora_B": torch.ones(4, 2), "a.alpha": torch.tensor(float("nan"))},
        "alpha of layer a",
    ),
    "no tensor": ({"a": [1, 2]}, "not a tensor"),
    "no name": (cast(Any, {7: torch.ones(1)}), "not a tensor"),
}


@pytest.mark.parametrize("case", list(BAD_PAIRS))
def test_pairs_that_make_no_sense_are_refused_by_name(case: str) -> None:
    tensors, words = BAD_PAIRS[case]
    with pytest.raises(LoraError, match=words):
        parse(tensors)


def test_the_file_is_named_too_and_strange_names_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "strange.safetensors"
    name = "bad\x1b[31m\n\u202ename"
    safetensors.torch.save_file({f"{name}.lora_B": torch.ones(4, 2), f"{name}.lora_A": torch.ones(3, 4)}, path)
    with pytest.raises(LoraError, match=r"strange\.safetensors: .*bad\\x1b\[31m\\n\\u202ename") as caught:
        read(path)
    assert str(caught.value).isprintable()
    assert len(escaped("x" * 10**6)) < 200
    assert escaped("käse ✓") == "käse ✓"
    assert escaped("\ud800") == "\\ud800"

"""Loading less of a LoRA: by share, by rank, by size."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora2.files.document import LoraDocument, parse, to_state_dict
from lora2.files.metadata import build
from lora2.files.rank_info import LayerInfo, layer_info
from lora2.files.resize import resize
from lora2.method.factors import Factors
from lora2.method.svd import decompose
from lora2.util.errors import LoraError

C = -math.log(0.1)  # −ln(1 − q) for q = 0.9
RANKS = {"a": 12, "b": 5, "c": 1, "d": 30}
INNER = {"a": (20,), "b": (4, 3, 3), "c": (7,), "d": (10,)}
D_OUT = {"a": 16, "b": 9, "c": 7, "d": 11}
# The layer d has 30 positions, but its weight is 11 × 10: ten singular values are all there are.
FULL = {"a": 12, "b": 5, "c": 1, "d": 10}


def factors_of(name: str, alpha: float | None = None) -> Factors:
    generator = torch.Generator().manual_seed(RANKS[name])
    inner = INNER[name]
    up = torch.randn(D_OUT[name], RANKS[name], *[1] * (len(inner) - 1), generator=generator)
    down = torch.randn(RANKS[name], *inner, generator=generator)
    fade = torch.exp(-0.2 * torch.arange(RANKS[name]))
    return Factors(up, down * fade.reshape(-1, *[1] * len(inner)), alpha)


def document(order: str | None = "importance", dtype: torch.dtype = torch.float32, other: bool = False) -> LoraDocument:
    """Four layers as our trainer writes them; `order` None is a file of another trainer."""
    layers = {name: factors_of(name) for name in RANKS}
    tensors = to_state_dict(layers, "peft", dtype)
    if other:
        tensors |= {"k.lokr_w1": torch.ones(4, 4), "k.lokr_w2": torch.ones(4, 4), "a.diff_b": torch.ones(16)}
    if order is None:
        return parse(tensors, {"ss_network_dim": "32"})
    entries: dict[str, LayerInfo] = {}
    for name, factors in layers.items():
        nu = C / factors.rank if order == "importance" else None
        entries[name] = layer_info(factors, nu=nu, target=8, order="importance" if nu else "singular")
    return parse(tensors, build(tensors, name="x", family="sd1", layers=entries, training={"steps": 3}))


def delta(factors: Factors) -> Tensor:
    scale = 1.0 if factors.alpha is None or not factors.rank else factors.alpha / factors.rank
    return scale * (factors.up.double().flatten(1) @ factors.down.double().flatten(1))


def energies(factors: Factors) -> Tensor:
    return torch.linalg.svdvals(delta(factors)).square()


def size(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("order", ["importance", "singular", None])
def test_all_of_it_is_the_very_same(order: str | None) -> None:
    doc = document(order, other=True)
    for result in (resize(doc), resize(doc, 1.0, 30, 1000.0), resize(doc, max_rank=10**9)):
        assert result.document is doc
        assert result.ranks_before == result.ranks_after == RANKS
        assert result.parameters_before == result.parameters_after
        assert result.bytes_before == result.bytes_after == size(doc.state_dict())
        assert result.uncut == {"k": "LoKr", "a.diff_b": "bias"}


# --- by share


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.9, 0.99, 0.999999])
def test_a_share_of_importance_is_the_shortest_prefix_that_holds_it(share: float) -> None:
    doc = document()
    result = resize(doc, share)
    for name, rank in RANKS.items():
        nu = C / rank
        mass = [sum(math.exp(-nu * j) * (1 - math.exp(-nu)) for j in range(d)) for d in range(rank + 1)]
        expected = next(d for d in range(1, rank + 1) if mass[d] >= share * mass[rank] * (1 - 1e-12))
        assert result.ranks_after[name] == expected
        after = result.document.layers[name]
        # A prefix of the same numbers, and alpha follows.
        assert torch.equal(after.up, doc.layers[name].up[:, :expected])
        assert torch.equal(after.down, doc.layers[name].down[:expected])
        assert after.alpha == expected == result.document.alphas[name]


@pytest.mark.parametrize("order", ["singular", None])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.9, 0.99, 0.999999])
def test_a_share_of_energy_is_the_lowest_rank_that_holds_it(order: str | None, share: float) -> None:
    doc = document(order)
    result = resize(doc, share)
    for name in RANKS:
        energy = energies(doc.layers[name])
        kept = energy.cumsum(0)
        expected = 1 + int((kept < share * kept[-1]).sum())
        assert result.ranks_after[name] == expected
        error = delta(result.document.layers[name]) - delta(doc.layers[name])
        # Eckart and Young, but for the float32 of the stored factors.
        tail = math.sqrt(float(energy[expected:].sum()))
        assert float(error.norm()) == pytest.approx(tail, rel=1e-4, abs=1e-6 * float(energy[0]) ** 0.5)


def test_a_layer_that_holds_nothing_is_left_out() -> None:
    tensors = {"z.lora_B.weight": torch.zeros(4, 3), "z.lora_A.weight": torch.randn(3, 5)}
    result = resize(parse(tensors), 0.9)
    assert result.ranks_after == {"z": 0}
    assert result.document.state_dict() == {}


# --- by rank


@pytest.mark.parametrize("max_rank", [1, 4, 5, 11])
@pytest.mark.parametrize("order", ["importance", "singular", None])
def test_a_maximal_rank(order: str | None, max_rank: int) -> None:
    doc = document(order)
    result = resize(doc, max_rank=max_rank)
    most = RANKS if order == "importance" else FULL
    assert result.ranks_after == {name: min(rank, max_rank) for name, rank in most.items()}
    for name, rank in RANKS.items():
        before, after = doc.layers[name], result.document.layers[name]
        if rank <= max_rank:
            assert after is before
            assert result.document.alphas[name] is doc.alphas[name]
        elif order == "importance":
            assert torch.equal(after.up, before.up[:, :max_rank])
        else:
            tail = math.sqrt(float(energies(before)[max_rank:].sum()))
            # Where nothing but the 20 useless positions of d goes, float32 alone is left.
            error = float((delta(after) - delta(before)).norm())
            assert error == pytest.approx(tail, rel=1e-4, abs=1e-6 * float(delta(before).norm()))


# --- by size


@pytest.mark.parametrize("order", ["importance", "singular", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0.15, 0.4, 0.8, 0.99])
def test_a_size_is_met_and_nearly_filled(order: str | None, dtype: torch.dtype, kept: float) -> None:
    doc = document(order, dtype, other=True)
    budget = int(kept * size(doc.state_dict()))
    result = resize(doc, megabytes=budget / 1e6)
    assert size(result.document.state_dict()) == result.bytes_after <= budget
    units = [doc.layers[name].cost for name in RANKS if result.ranks_after[name] < FULL[name]]
    # 4 bytes of alpha may be kept free for each layer that went; with all at full rank, room is left.
    assert not units or budget - result.bytes_after < min(units) * dtype.itemsize + 4 * len(RANKS)
    assert all(torch.equal(result.document.other[key], doc.other[key]) for key in doc.other)


def test_a_size_is_shared_by_energy_per_byte() -> None:
    doc = document("singular")
    budget = 3000
    result = resize(doc, megabytes=budget / 1e6)
    ratios = {name: energies(doc.layers[name]) / doc.layers[name].cost for name in RANKS}
    lowest_taken = min(float(ratios[n][r - 1]) for n, r in result.ranks_after.items() if r)
    for name, rank in result.ranks_after.items():
        if rank < FULL[name] and ratios[name][rank] > lowest_taken:
            # A better one was left only because it did not fit any more (16 bytes are for the alphas).
            assert result.bytes_after + 4 * doc.layers[name].cost > budget - 16


def test_limits_work_together() -> None:
    doc = document("importance")
    shared, both = resize(doc, 0.9), resize(doc, 0.9, 6)
    assert both.ranks_after == {name: min(rank, 6) for name, rank in shared.ranks_after.items()}
    budget = both.bytes_after // 2
    all_three = resize(doc, 0.9, 6, budget / 1e6)
    assert all_three.bytes_after <= budget
    assert all(all_three.ranks_after[name] <= both.ranks_after[name] for name in RANKS)


# --- scales, types, and what the file says afterwards


@pytest.mark.parametrize("alpha", [None, 4.0, 0.5, -1.0])
@pytest.mark.parametrize("limits", [{"share": 0.8}, {"max_rank": 3}, {"megabytes": 0.001}])
def test_the_scale_survives(alpha: float | None, limits: dict[str, float]) -> None:
    factors = factors_of("a", alpha)
    tensors = {"a_lora.up.weight": factors.up, "a_lora.down.weight": factors.down}
    if alpha is not None:
        tensors["a.alpha"] = torch.tensor(alpha)
    result = resize(parse(tensors), **limits)  # type: ignore[arg-type]
    after = parse(result.document.state_dict()).layers["a"]
    rank = result.ranks_after["a"]
    assert 0 < rank < 12
    assert after.alpha == rank
    ordered, _ = decompose(factors)
    expected = delta(Factors(ordered.up[:, :rank], ordered.down[:rank]))
    assert (delta(after) - expected).norm() <= 1e-6 * expected.norm()  # float32


def test_a_prefix_cut_folds_the_scale() -> None:
    doc = document()
    doc = replace(doc, layers={n: replace(f, alpha=3.0) for n, f in doc.layers.items()})
    after = resize(doc, max_rank=4).document.layers["a"]
    before = doc.layers["a"]
    expected = 3 / 12 * (before.up[:, :4].double() @ before.down[:4].double())
    assert after.alpha == 4
    assert (delta(after) - expected).norm() <= 1e-6 * expected.norm()  # float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("order", ["importance", None])
def test_types_stay_but_for_those_of_8_bits(dtype: torch.dtype, order: str | None) -> None:
    doc = document(order)
    doc = parse(
        {key: t if key.endswith("alpha") else t.to(dtype) for key, t in doc.state_dict().items()},
        doc.metadata,
    )
    result = resize(doc, 0.5)
    kept = dtype if dtype.itemsize > 1 else torch.bfloat16
    changed = [n for n in RANKS if result.ranks_after[n] < RANKS[n]]
    assert changed
    for name in changed:
        layer = result.document.layers[name]
        assert layer.up.dtype == layer.down.dtype == kept
        assert layer.up.is_contiguous()
        assert layer.down.is_contiguous()


def test_metadata_after_a_cut() -> None:
    doc = document()
    doc.metadata["lora_adapter_metadata"] = "{}"
    ordered = resize(doc, 0.5).document
    assert ordered.info is not None
    assert json.loads(ordered.metadata["lora2"]) == ordered.info
    assert ordered.info["layers"]["a"] == {
        "rank": ordered.layers["a"].rank,
        "nu": C / 12,
        "target": 8,
        "shape": [16, 20],
        "order": "importance",
    }
    assert {"sshs_model_hash", "sshs_legacy_hash", "lora_adapter_metadata"}.isdisjoint(ordered.metadata)
    assert ordered.metadata["ss_output_name"] == "x"
    singular = resize(doc, megabytes=0.002).document
    assert singular.info is not None
    entry = singular.info["layers"]["a"]
    assert (entry["rank"], entry["nu"], entry["order"]) == (singular.layers["a"].rank, None, "singular")
    assert parse(singular.state_dict()).notes == []
    assert doc.layers["a"].rank == 12  # the document that was cut is as it was
    assert "sshs_model_hash" in doc.metadata
    assert resize(document(None), 0.5).document.metadata == {"ss_network_dim": "Dynamic"}


# --- impossible limits


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_impossible_shares(share: float) -> None:
    with pytest.raises(LoraError, match="share"):
        resize(document(), share)


@pytest.mark.parametrize("megabytes", [-1.0, math.nan, math.inf])
def test_impossible_sizes(megabytes: float) -> None:
    with pytest.raises(LoraError, match="size"):
        resize(document(), megabytes=megabytes)


def test_impossible_ranks_and_sizes_that_leave_nothing() -> None:
    with pytest.raises(LoraError, match="maximum rank"):
        resize(document(), max_rank=-1)
    doc = document(other=True)
    with pytest.raises(LoraError, match=r"0\.0001 MB leaves nothing.* take 0\.0002\d+ MB") as caught:
        resize(doc, megabytes=1e-4)
    least = float(str(caught.value).split("take ")[1].split(" MB")[0])
    assert sum(resize(doc, megabytes=least * 1.01).ranks_after.values()) == 1
    # Nothing that can be cut is nothing that could be made smaller.
    with pytest.raises(LoraError, match="leaves nothing"):
        resize(parse({"k.lokr_w1": torch.ones(4, 4)}), megabytes=1e-5)


def test_hostile_values_do_not_reach_the_model() -> None:
    tensors = {
        "h.lora_B": torch.full((4, 3), 3e38),
        "h.lora_A": torch.full((3, 4), 3e38),
        "h.alpha": torch.tensor(3e38),
    }
    info = json.dumps({"format": 1, "layers": {"h": {"nu": 1.0, "order": "importance"}}})
    with pytest.raises(LoraError, match="Layer h is too strong"):
        resize(parse(tensors, {"lora2": info}), max_rank=1)
    doc = document()
    assert doc.info is not None
    for nu in (5e-324, 1e-300, 1e300):
        doc.info["layers"]["a"]["nu"] = nu
        rank = resize(doc, 0.5).ranks_after["a"]
        assert rank == (1 if nu > 1 else 6)  # an almost level importance is half used at half the rank

"""Load Adaptive LoRA with less than all of a file: the sizes that were asked for, and the best that they can hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph import load, random_lora, run_node, train, untouched, updates, write_lora
from torch import Tensor
from training import pack


def ranks_of(patched: Any) -> dict[str, int]:
    return {key: patches[-1][1].weights[1].shape[0] for key, patches in patched.patches.items()}


def settled_file(model: Any) -> tuple[str, dict[str, Tensor]]:
    """A trained file in singular order, and its ΔW."""
    name = train(model, steps=6, target_rank=8, save_dtype="fp32", learning_rate=3e-2)[4]
    return name, updates(load(model, name)[0])


def best(update: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank (Eckart and Young, 1936)."""
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_a_maximal_rank_keeps_the_best_of_every_layer(model: Any, folders: Path, said: Callable[[], str]) -> None:
    name, whole = settled_file(model)
    before = ranks_of(load(model, name)[0])
    for rank in (1, 3, 100):
        cut, _, report = load(model, name, max_rank=rank)
        assert ranks_of(cut) == {key: min(rank, r) for key, r in before.items()}
        assert max(layer.rank for layer in report.layers) <= rank
        for key, update in updates(cut).items():
            # float32 factors: a rounding of 6e-8 in every number.
            assert (update - best(whole[key], rank)).norm() < 1e-6 * whole[key].norm()
        assert ("Cut from" in said()) == (rank < max(before.values()))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_share_keeps_that_much_of_every_layer_and_no_position_more(share: float, model: Any, folders: Path) -> None:
    name, whole = settled_file(model)
    cut = load(model, name, share=share)[0]
    for key, rank in ranks_of(cut).items():
        energy = torch.linalg.svdvals(whole[key]).square()
        kept = (energy.cumsum(0) / energy.sum()).tolist()
        assert kept[rank - 1] >= share - 1e-6
        assert rank == 1 or kept[rank - 2] < share + 1e-6
        assert (updates(cut)[key] - best(whole[key], rank)).norm() < 1e-6 * whole[key].norm()


def test_a_share_of_the_papers_form_cuts_by_its_own_order(model: Any, folders: Path) -> None:
    """Positions in the order of Λ: the fewest first ones that hold the share of Σ f, cut without any decomposition."""
    name = train(model, settle_at=1.0, initial_rank=12, save_dtype="fp32")[4]
    document = pack("lora2.files.document").read(folders / "loras" / name)
    cut = load(model, name, share=0.5)[0]
    for prefix, factors in document.layers.items():
        nu = document.info["layers"][prefix]["nu"]
        mass = 1 - torch.exp(-nu * torch.arange(1, factors.rank + 1, dtype=torch.float64))
        rank = int((mass < 0.5 * mass[-1]).sum()) + 1
        up, down, *_ = cut.patches[f"{prefix}.weight"][0][1].weights
        assert torch.equal(down, factors.down[:rank])
        assert torch.equal(up, factors.up[:, :rank])
        assert rank < factors.rank


@pytest.mark.parametrize("megabytes", [0.02, 0.05, 0.1])
def test_a_size_is_met_from_below_by_the_strongest_positions(
    megabytes: float, model: Any, folders: Path, said: Callable[[], str]
) -> None:
    name, whole = settled_file(model)
    cut, _, report = load(model, name, megabytes=megabytes)
    assert 0.93 * megabytes * 1e6 <= report.bytes <= megabytes * 1e6
    assert "Cut from 213 KB to " in said()
    positions, kept = [], 0.0
    for key, update in whole.items():
        rank = ranks_of(cut).get(key, 0)
        energy = torch.linalg.svdvals(update).square().tolist()
        positions += [(e, 4 * sum(update.shape)) for e in energy]
        kept += sum(energy[:rank])
        if rank:
            assert (updates(cut)[key] - best(update, rank)).norm() < 1e-6 * update.norm()
    # No choice of positions can hold more than the strongest per byte, the last of them in part.
    room, bound = megabytes * 1e6, 0.0
    for energy, size in sorted(positions, key=lambda p: -p[0] / p[1]):
        bound += energy * min(1.0, room / size)
        room -= min(room, size)
    assert 0.95 * bound <= kept <= bound


def test_a_size_that_holds_nothing_is_refused(model: Any, folders: Path) -> None:
    write_lora(folders, "flux.safetensors", random_lora(model))
    with (
        untouched(model),
        pytest.raises(pack("lora2.util.errors").LoraError, match=r"leaves nothing.*Give a larger size"),
    ):
        load(model, "flux.safetensors", megabytes=0.0005)


def test_cuts_combine_and_leave_the_file_alone(model: Any, folders: Path) -> None:
    name, _ = settled_file(model)
    before = (folders / "loras" / name).read_bytes()
    report = load(model, name, share=0.9, max_rank=4, megabytes=0.05)[2]
    assert max(layer.rank for layer in report.layers) <= 4
    assert report.bytes <= 50_000
    assert (folders / "loras" / name).read_bytes() == before


def test_a_file_that_changed_is_read_again(model: Any, folders: Path) -> None:
    node = pack("nodes.load").LoadAdaptiveLora
    path = write_lora(folders, "flux.safetensors", random_lora(model))
    first = node.fingerprint_inputs(lora_name="flux.safetensors", model=None)
    assert node.fingerprint_inputs(lora_name="flux.safetensors", model=None) == first
    write_lora(folders, "flux.safetensors", random_lora(model, rank=5))
    assert node.fingerprint_inputs(lora_name="flux.safetensors", model=None) != first
    path.unlink()
    assert node.fingerprint_inputs(lora_name="flux.safetensors", model=None) == "missing"


@pytest.mark.parametrize("less", [{"share": 0.5}, {"max_rank": 1}, {"megabytes": 0.02}])
def test_a_cancel_stops_between_layers(less: dict[str, Any], model: Any, folders: Path) -> None:
    """Layers of thousands of positions take a minute each."""
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    write_lora(folders, "long.safetensors", random_lora(model))
    with untouched(model):
        interrupt_current_processing()
        with pytest.raises(InterruptProcessingException):
            load(model, "long.safetensors", **less)
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        run_node(pack("nodes.inspect_ranks").InspectRanks, lora_name="long.safetensors", show="rank in use")
    assert load(model, "long.safetensors", **less)

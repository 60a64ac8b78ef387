"""A network that starts from factors that were learned before, instead of from nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.layer import ZERO_TOLERANCE, Adapter, round_up_capacity
from ..adapters.network import AdaptiveNetwork
from ..checkpoints.state import State, raise_corrupted
from ..method import importance as imp
from ..method.factors import Factors
from ..method.init import init_scale
from ..method.svd import decompose


@dataclass(frozen=True)
class WarmStart:
    """What a start from factors kept, by layer: those taken, those cut to the largest rank allowed, those that start fresh."""

    taken: list[str]
    cut: list[str]
    fresh: list[str]


@torch.no_grad()
def warm_start(network: AdaptiveNetwork, factors: Mapping[str, Factors]) -> WarmStart:
    """Let a new network answer as these factors do at strength 1. Layers without any start as they would.

    Every layer's positions are brought into the order of its singular values, its rank becomes that of its factors, and Λ
    is divided out of them, so that B Λ A is their product up to float32's rounding. A layer below the smallest rank gets
    new positions, which change nothing; one above the largest is cut. Names of factors that the network has no layer for
    are not looked at; those of another shape than their layer raise ValueError.
    """
    taken, cut = [], []
    theta = network.theta.detach().cpu().clone()
    arrays, starts = [], []
    for index, (name, adapter, limit) in enumerate(
        zip(network.names, network.adapters, network.max_ranks, strict=True)
    ):
        given = factors.get(name)
        if given is None or given.rank == 0:
            arrays.append((adapter.down.detach(), adapter.up.detach()))
            starts.append((adapter.down_std, network.gains[index]))
            continue
        ordered, _ = decompose(given)
        taken.append(name)
        if ordered.rank > limit:
            cut.append(name)
        rank = max(min(ordered.rank, limit), min(network.config.min_adapting_rank, limit))
        theta[index] = torch.tensor(float(rank), dtype=torch.float64).log()
        start = init_scale(adapter.shape, rank, network.config)
        arrays.append(_arrays(network, adapter, ordered.head(limit), theta[index], rank, start))
        starts.append(start)
    network.load_arrays(theta, arrays, starts)
    return WarmStart(taken, cut, [n for n in network.names if n not in set(taken)])


def _arrays(
    network: AdaptiveNetwork, adapter: Adapter, ordered: Factors, theta: Tensor, rank: int, start: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The arrays of one layer: its factors with Λ divided out, then new positions, which carry nothing."""
    shape, kept = adapter.shape, ordered.rank
    capacity = round_up_capacity(rank)
    deviation, gain = start
    down = torch.randn(capacity, *shape[1:], generator=network.generator) * deviation
    up = torch.zeros(capacity, shape[0])
    flat_up = ordered.up.reshape(shape[0], kept).t().cpu()
    flat_down = ordered.down.reshape(kept, *shape[1:]).cpu()
    weight = flat_up.norm(dim=1) * flat_down.flatten(1).norm(dim=1)
    live = weight > ZERO_TOLERANCE * weight.amax()  # two zero factors would never learn
    root = (gain * imp.importance(torch.arange(kept), imp.rate(theta, network.config.q))).double().sqrt()
    down[:kept][live] = (flat_down / root.view(-1, *(1,) * (len(shape) - 1))).float()[live]
    up[:kept][live] = (flat_up / root[:, None]).float()[live]
    return down, up


@torch.no_grad()
def factors_from_state(state: State, q: float) -> dict[str, Factors]:
    """The factors of a training state's network by layer, Λ folded in, in the order that they lie in; on the CPU.

    q: of the settings that it was made with.
    """
    names, settled = state.list_of("layers", str), state.flag("pruned")
    theta, gains = state.tensor("theta", (len(names),)), state.list_of("gains", float, len(names))
    found = {}
    for index, name in enumerate(names):
        up = state.tensor(f"{index}.up", (None, None))
        down = state.tensors.get(f"{index}.down")
        if down is None or down.ndim < 2:
            raise_corrupted(f"{index}.down is missing")
        down = state.tensor(f"{index}.down", (len(up), *down.shape[1:]))
        rank = len(up) if settled else min(int(imp.quantile_rank(theta[index].clamp(0, 20))), len(up))
        tail = (1,) * (down.ndim - 2)
        up, down = up[:rank], down[:rank]
        if not settled:
            root = (gains[index] * imp.importance(torch.arange(rank), imp.rate(theta[index].clamp(0, 20), q))).sqrt()
            up, down = up * root[:, None], down * root.view(-1, *(1,) * (down.ndim - 1))
        found[name] = Factors(up.t().reshape(up.shape[1], rank, *tail), down, float(rank))
    return found

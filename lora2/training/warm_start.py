"""Warm start: a network that starts from given factors instead of from zero."""

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
    """Names of layers: those that start from factors, those of them cut to the largest allowed rank, those that start anew."""

    taken: list[str]
    cut: list[str]
    fresh: list[str]


@torch.no_grad()
def warm_start(network: AdaptiveNetwork, factors: Mapping[str, Factors]) -> WarmStart:
    """Make a new network compute the same as these factors at strength 1; layers without factors start as usual.

    A layer's rank becomes that of its factors, its components are ordered by singular value, and Λ is divided out of them,
    so that B Λ A is their product up to float32 rounding. A layer below the smallest rank gets new components with zero
    output; one above the largest is truncated. Factors whose name is no layer of the network are ignored.
    Raises ValueError for factors of another shape than their layer.
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
    """Down and up arrays of one layer: its factors with Λ divided out, then new components with zero output."""
    shape, given = adapter.shape, ordered.rank
    capacity = round_up_capacity(rank)
    deviation, gain = start
    down = torch.randn(capacity, *shape[1:], generator=network.generator) * deviation
    up = torch.zeros(capacity, shape[0])
    flat_up = ordered.up.reshape(shape[0], given).t().cpu()
    flat_down = ordered.down.reshape(given, *shape[1:]).cpu()
    weight = flat_up.norm(dim=1) * flat_down.flatten(1).norm(dim=1)
    nonzero = weight > ZERO_TOLERANCE * weight.amax()  # two zero factors would have no gradient
    root = (gain * imp.importance(torch.arange(given), imp.rate(theta, network.config.q))).double().sqrt()
    down[:given][nonzero] = (flat_down / root.view(-1, *(1,) * (len(shape) - 1))).float()[nonzero]
    up[:given][nonzero] = (flat_up / root[:, None]).float()[nonzero]
    return down, up


@torch.no_grad()
def factors_from_state(state: State, q: float) -> dict[str, Factors]:
    """The factors of the network in a training state, by layer, with Λ folded in; on the CPU.

    q: of the configuration that the state was made with.
    """
    names, pruned = state.list_of("layers", str), state.flag("pruned")
    theta, gains = state.tensor("theta", (len(names),)), state.list_of("gains", float, len(names))
    factors = {}
    for index, name in enumerate(names):
        up = state.tensor(f"{index}.up", (None, None))
        down = state.tensors.get(f"{index}.down")
        if down is None or down.ndim < 2:
            raise_corrupted(f"{index}.down is missing")
        down = state.tensor(f"{index}.down", (len(up), *down.shape[1:]))
        rank = len(up) if pruned else min(int(imp.quantile_rank(theta[index].clamp(0, 20))), len(up))
        tail = (1,) * (down.ndim - 2)
        up, down = up[:rank], down[:rank]
        if not pruned:
            root = (gains[index] * imp.importance(torch.arange(rank), imp.rate(theta[index].clamp(0, 20), q))).sqrt()
            up, down = up * root[:, None], down * root.view(-1, *(1,) * (down.ndim - 1))
        factors[name] = Factors(up.t().reshape(up.shape[1], rank, *tail), down, float(rank))
    return factors

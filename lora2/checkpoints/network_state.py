"""An adaptive network's state: saved, checked and restored."""

from __future__ import annotations

import math

from ..adapters.capacity import CapacityPolicy
from ..adapters.layer import GRANULE, round_up_capacity
from ..adapters.network import AdaptiveNetwork
from ..method.factors import full_rank
from ..util.errors import LoraError
from ..util.text import escaped
from .state import MAX_STEPS, State, raise_corrupted, restore_generator

MAX_GAIN = 1e9
"""Above the gain of any rank that a layer can start at."""


def state_of(network: AdaptiveNetwork) -> State:
    """Everything that a network of the same layers and configuration needs to continue as this one; see `restore`."""
    tensors = {"theta": network.theta, "multiplier": network.multiplier, "peak": network.peak}
    tensors["generator"] = network.generator.get_state()
    for index, adapter in enumerate(network.adapters):
        tensors |= {f"{index}.down": adapter.down, f"{index}.up": adapter.up}
    return State(
        tensors,
        {
            "layers": network.names,
            "pruned": network.pruned,
            "size_ratio": network.size_ratio,
            "down_stds": [a.down_std for a in network.adapters],
            "gains": list(network.gains),
            "last_ranks": list(network.capacity_policy.last_ranks),
            "resized_at": list(network.capacity_policy.resized_at),
            "syncs": network.capacity_policy.syncs,
        },
    )


def restore(network: AdaptiveNetwork, state: State) -> None:
    """Restore a network from `state_of`. Raises LoraError if the state is corrupted or of other layers."""
    if state.list_of("layers", str) != network.names:
        raise LoraError("The training state is of other layers. Adapt the layers that it was made with.")
    pruned, count = state.flag("pruned"), len(network.adapters)
    down_stds, gains = state.list_of("down_stds", float, count), state.list_of("gains", float, count)
    arrays = []
    for index, adapter in enumerate(network.adapters):
        down = state.tensor(f"{index}.down", (None, *adapter.shape[1:]))
        up = state.tensor(f"{index}.up", (down.shape[0], adapter.shape[0]))
        # While ranks adapt, flat buffers need capacities in multiples of 8.
        uneven = not pruned and (len(down) % GRANULE or not len(down))
        if uneven or len(down) > round_up_capacity(full_rank(adapter.shape)):
            raise_corrupted(f"layer {escaped(network.names[index])} has {len(down)} components")
        if not 0 < down_stds[index] < math.inf or not 0 < gains[index] < MAX_GAIN:
            raise_corrupted("a standard deviation or a gain is out of bounds")
        arrays.append((down, up))
    peak = state.tensor("peak", (count,))
    multiplier = state.tensor("multiplier", ())
    if not pruned and bool(((peak < 0) | (peak > peak.new_tensor([len(d) for d, _ in arrays]))).any()):
        raise_corrupted("a rank exceeds its array")
    if not 1e-6 <= float(multiplier) <= 1e6:
        raise_corrupted("the budget's multiplier is out of bounds")
    size_ratio = state.number("size_ratio", 0.0, 1e12)
    _restore_policy(network.capacity_policy, state)
    network.pruned, network.size_ratio = pruned, size_ratio
    network.load_arrays(state.tensor("theta", (count,)), arrays, list(zip(down_stds, gains, strict=True)))
    restore_generator(network.generator, state, "generator")
    network.multiplier.copy_(multiplier)
    network.peak.copy_(peak)


def _restore_policy(policy: CapacityPolicy, state: State) -> None:
    ranks = state.list_of("last_ranks", float, len(policy.last_ranks))
    syncs, resized_at = state.integer("syncs", 0, MAX_STEPS), list(state.list_of("resized_at", int))
    if not all(0 < rank < MAX_STEPS for rank in ranks) or any(sync > syncs for sync in resized_at):
        raise_corrupted("ranks or resizes are out of bounds")
    policy.last_ranks, policy.syncs, policy.resized_at = list(ranks), syncs, resized_at

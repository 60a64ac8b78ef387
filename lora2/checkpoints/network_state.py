"""What a network needs to go on: taken, checked and put back."""

from __future__ import annotations

import math

from ..adapters.capacity import CapacityPolicy
from ..adapters.layer import GRANULE, round_up_capacity
from ..adapters.network import AdaptiveNetwork
from ..method.factors import full_rank
from ..util.errors import LoraError
from ..util.text import escaped
from .state import MAX_STEPS, State, raise_corrupted, restore_generator

MOST_GAIN = 1e9
"""No rank that a layer can start at has a larger one."""


def state_of(network: AdaptiveNetwork) -> State:
    """All that a network of the same layers and settings needs to go on as this one; see `restore`."""
    tensors = {"theta": network.theta, "pressure": network.multiplier, "peak": network.peak}
    tensors["generator"] = network.generator.get_state()
    for index, adapter in enumerate(network.adapters):
        tensors |= {f"{index}.down": adapter.down, f"{index}.up": adapter.up}
    return State(
        tensors,
        {
            "layers": network.names,
            "settled": network.pruned,
            "last_ratio": network.last_ratio,
            "deviations": [a.std for a in network.adapters],
            "gains": list(network.gains),
            "last_ranks": list(network.capacity_policy.ranks),
            "resized": list(network.capacity_policy.at),
            "syncs": network.capacity_policy.syncs,
        },
    )


def restore(network: AdaptiveNetwork, state: State) -> None:
    """Let a network become what `state` was taken of. Raises LoraError where that is of other layers, or damaged."""
    if state.list_of("layers", str) != network.names:
        raise LoraError("The training state is of other layers. Adapt the layers that it was made with.")
    settled, count = state.flag("settled"), len(network.adapters)
    deviations, gains = state.list_of("deviations", float, count), state.list_of("gains", float, count)
    arrays = []
    for index, adapter in enumerate(network.adapters):
        down = state.tensor(f"{index}.down", (None, *adapter.shape[1:]))
        up = state.tensor(f"{index}.up", (down.shape[0], adapter.shape[0]))
        # Working copies (packed.py) are laid out for capacities in whole granules while ranks adapt.
        uneven = not settled and (len(down) % GRANULE or not len(down))
        if uneven or len(down) > round_up_capacity(full_rank(adapter.shape)):
            raise_corrupted(f"layer {escaped(network.names[index])} holds {len(down)} positions")
        if not 0 < deviations[index] < math.inf or not 0 < gains[index] < MOST_GAIN:
            raise_corrupted("a deviation or a gain is out of bounds")
        arrays.append((down, up))
    peak = state.tensor("peak", (count,))
    pressure = state.tensor("pressure", ())
    if not settled and bool(((peak < 0) | (peak > peak.new_tensor([len(d) for d, _ in arrays]))).any()):
        raise_corrupted("a rank was above its arrays")
    if not 1e-6 <= float(pressure) <= 1e6:
        raise_corrupted("the budget's multiplier is out of bounds")
    ratio = state.number("last_ratio", 0.0, 1e12)
    _restore_policy(network.capacity_policy, state)
    network.pruned, network.last_ratio = settled, ratio
    network.load_arrays(state.tensor("theta", (count,)), arrays, list(zip(deviations, gains, strict=True)))
    restore_generator(network.generator, state, "generator")
    network.multiplier.copy_(pressure)
    network.peak.copy_(peak)


def _restore_policy(policy: CapacityPolicy, state: State) -> None:
    ranks = state.list_of("last_ranks", float, len(policy.ranks))
    syncs, at = state.integer("syncs", 0, MAX_STEPS), list(state.list_of("resized", int))
    if not all(0 < rank < MAX_STEPS for rank in ranks) or any(sync > syncs for sync in at):
        raise_corrupted("ranks or resizes are out of bounds")
    policy.ranks, policy.syncs, policy.at = list(ranks), syncs, at

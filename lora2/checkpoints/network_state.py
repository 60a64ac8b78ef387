"""What a network needs to go on: taken, checked and put back."""

from __future__ import annotations

import math

from ..adapters.layer import GRANULE, capacity_for, full_rank
from ..adapters.network import AdaptiveNetwork
from ..files.keys import shown
from ..util.errors import LoraError
from .state import State, damaged, restore_generator

MOST_GAIN = 1e9
"""No rank that a layer can start at has a larger one."""


def state_of(network: AdaptiveNetwork) -> State:
    """All that a network of the same layers and settings needs to go on as this one; see `restore`."""
    tensors = {"theta": network.theta, "pressure": network.pressure, "peak": network.peak}
    tensors["generator"] = network.generator.get_state()
    for index, adapter in enumerate(network.adapters):
        tensors |= {f"{index}.down": adapter.down, f"{index}.up": adapter.up}
    return State(
        tensors,
        {
            "layers": network.names,
            "settled": network.settled,
            "last_ratio": network.last_ratio,
            "deviations": [a.std for a in network.adapters],
            "gains": list(network.gains),
            **network.resizes.facts(),
        },
    )


def restore(network: AdaptiveNetwork, state: State) -> None:
    """Let a network become what `state` was taken of. Raises LoraError where that is of other layers, or damaged."""
    if state.items("layers", str) != network.names:
        raise LoraError("The training state is of other layers. Adapt the layers that it was made with.")
    settled, count = state.flag("settled"), len(network.adapters)
    deviations, gains = state.items("deviations", float, count), state.items("gains", float, count)
    arrays = []
    for index, adapter in enumerate(network.adapters):
        down = state.tensor(f"{index}.down", (None, *adapter.shape[1:]))
        up = state.tensor(f"{index}.up", (down.shape[0], adapter.shape[0]))
        # Working copies (packed.py) are laid out for capacities in whole granules while ranks adapt.
        uneven = not settled and (len(down) % GRANULE or not len(down))
        if uneven or len(down) > capacity_for(full_rank(adapter.shape)):
            damaged(f"layer {shown(network.names[index])} holds {len(down)} positions")
        if not 0 < deviations[index] < math.inf or not 0 < gains[index] < MOST_GAIN:
            damaged("a deviation or a gain is out of bounds")
        arrays.append((down, up))
    peak = state.tensor("peak", (count,))
    pressure = state.tensor("pressure", ())
    if not settled and bool(((peak < 0) | (peak > peak.new_tensor([len(d) for d, _ in arrays]))).any()):
        damaged("a rank was above its arrays")
    if not 1e-6 <= float(pressure) <= 1e6:
        damaged("the budget's multiplier is out of bounds")
    ratio = state.number("last_ratio", 0.0, 1e12)
    network.resizes.restore(state)
    network.settled, network.last_ratio = settled, ratio
    network.assume(state.tensor("theta", (count,)), arrays, list(zip(deviations, gains, strict=True)))
    restore_generator(network.generator, state, "generator")
    network.pressure.copy_(pressure)
    network.peak.copy_(peak)

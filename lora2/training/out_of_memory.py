"""What to say when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import TrainingConfig


def advice(config: TrainingConfig, changes: Sequence[str]) -> str:
    """What a person can change. changes: what a run has changed by itself, in words."""
    if config.on_out_of_memory == "stop":
        return (
            "Turn checkpointing on, lower batch_size (and raise accumulation), train on smaller pictures, adapt fewer layers, "
            "or set on_out_of_memory to retry with less."
        )
    done = f", beside what was done by itself ({'; '.join(changes)})" if changes else ""
    return f"Train on smaller pictures, adapt fewer layers, lower initial_rank, or turn checkpointing on if it is off{done}."

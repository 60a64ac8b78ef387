"""Sampling of timesteps."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def sample_times(count: int, sampling: str, generator: Generator) -> Tensor:
    """(count,) times in (0, 1), 0 clean and 1 noise: uniform, or logit-normal (Esser et al., arXiv:2403.03206, §3.1)."""
    if sampling == "logit-normal":
        return torch.sigmoid(torch.randn(count, generator=generator))
    return torch.rand(count, generator=generator).clamp(1e-4, 1 - 1e-4)

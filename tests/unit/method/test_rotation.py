"""Rotation of components: the same layer in another basis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.models import pack

CPU = torch.device("cpu")
rotation_matrix, rotate = pack("lora2.method.rotation").rotation_matrix, pack("lora2.method.rotation").rotate


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 8, 31, 255])
def test_the_matrix_is_the_discrete_hartley_transform(rank: int) -> None:
    """By numpy's FFT, real part less imaginary part; sums of `rank` products in float64."""
    found = rotation_matrix(rank)
    assert torch.equal(found, found.t())
    assert torch.allclose(found @ found, torch.eye(rank, dtype=torch.float64), atol=1e-13)
    if rank:
        transform = np.fft.fft(np.eye(rank))
        assert np.allclose(found.numpy(), (transform.real - transform.imag) / rank**0.5, atol=1e-13)


def test_the_layer_stays_and_its_components_become_equally_long() -> None:
    """With singular values from 1 to 1e-4, as a pruned layer has them; float32's rounding of either factor."""
    g = torch.Generator().manual_seed(0)
    root = torch.logspace(0, -2, 24, dtype=torch.float64)[:, None]
    up, down = (root * torch.linalg.qr(torch.randn(n, 24, generator=g, dtype=torch.float64))[0].t() for n in (48, 64))
    new_up, new_down = rotate(up.float(), CPU), rotate(down.float().reshape(24, 16, 2, 2), CPU)
    assert new_up.dtype == torch.float32
    assert new_down.shape == (24, 16, 2, 2)
    change = new_up.double().t() @ new_down.double().flatten(1) - up.t() @ down
    assert float(change.norm() / (up.t() @ down).norm()) < 2e-7
    lengths = new_down.flatten(1).norm(dim=1)
    assert float(lengths.max() / lengths.min()) < 5 < 50 < float(root.max() / root.min())

"""Denoising loss in the model's own prediction space.

Every function takes the model's x0 prediction, which a host provides for any model, and weights its error so that the result
is the error of the network's own output. With data of standard deviation s = sigma_data:

    ε models     x0 = x − σ ε                          error of ε  = error of x0 / σ
    v models     x0 = x s²/(σ²+s²) − v σ s/√(σ²+s²)     error of v  = error of x0 √(σ²+s²) / (σ s)
    flow models  x0 = x − σ v                          error of v  = error of x0 / σ

(Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, table 1;
Lipman et al., "Flow Matching for Generative Modeling", arXiv:2210.02747.)
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON, V, FLOW, X0 = "epsilon", "v", "flow", "x0"
PREDICTIONS = (EPSILON, V, FLOW, X0)


def prediction_weight(sigma: Tensor, prediction: str, sigma_data: float = 1.0) -> Tensor:
    """w(σ) with w · (x0 error)² = (error of the network's own output)². sigma: (batch,); returns (batch,)."""
    if prediction in (EPSILON, FLOW):
        return sigma**-2
    if prediction == V:
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return torch.ones_like(sigma)


def signal_to_noise(sigma: Tensor, prediction: str, sigma_data: float = 1.0) -> Tensor:
    """SNR of the noisy latent: ((1−σ)/σ)² for flow models, which interpolate between data and noise, else (s/σ)²."""
    if prediction == FLOW:
        return ((1 - sigma) / sigma) ** 2
    return (sigma_data / sigma) ** 2


def min_snr_weight(sigma: Tensor, prediction: str, gamma: float, sigma_data: float = 1.0) -> Tensor:
    """min(SNR, γ), the weight of the x0 error in Min-SNR-γ (Hang et al., arXiv:2303.09556, eq. 10).

    For ε and v models the error is in units of the data's standard deviation s, hence 1 / s². The errors of ε and v then have
    the weights min(SNR, γ) / SNR and min(SNR, γ) / (SNR + 1), as published.
    """
    unit = sigma_data**2 if prediction in (EPSILON, V) else 1.0
    return signal_to_noise(sigma, prediction, sigma_data).clamp(max=gamma) / unit


def denoising_loss(
    predicted: Tensor, clean: Tensor, sigma: Tensor, prediction: str, gamma: float = 0.0, sigma_data: float = 1.0
) -> Tensor:
    """Mean squared error of the network's own output, averaged over the batch; weighted by Min-SNR-γ when gamma > 0.

    predicted, clean: (batch, channels, …) x0 predicted and true, in the model's latent scale. sigma: (batch,).
    """
    error = (predicted.float() - clean.float()).flatten(1).pow(2).mean(1)
    if gamma > 0:
        weight = min_snr_weight(sigma, prediction, gamma, sigma_data)
    else:
        weight = prediction_weight(sigma, prediction, sigma_data)
    return (weight * error).mean()

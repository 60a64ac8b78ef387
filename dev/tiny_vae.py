"""A VAE made by hand in TAESD's architecture: it keeps each 8x8 block's colour, so latents mean something.

No training: every layer passes three colour planes on, the strided ones average 2x2 pixels.
Values stay in [0, 1], where ReLU is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dev.host import import_comfy

# latent = MIX @ (colour - 1/2): brightness, two colour differences, brightness again. Every channel of a drawn
# picture then has a variance a little below 1, what dev.denoiser is made for.
MIX = torch.tensor([[1.3, 1.3, 1.3], [3.6, -3.6, 0.0], [1.8, 1.8, -3.6], [1.3, 1.3, 1.3]])
SCALE = 0.18215  # SD1.x latents are stored divided by this


def vae_state_dict() -> dict[str, Tensor]:
    """Tensors of comfy.taesd.taesd.TAESD(latent_channels=4), float32."""
    import_comfy()
    from comfy.taesd.taesd import TAESD

    model = TAESD(latent_channels=4)
    tensors = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    average, point = torch.zeros(3, 3), torch.zeros(3, 3)
    average[1:, 1:] = 0.25
    point[1, 1] = 1.0
    eye = torch.eye(3)
    encoder = {0: (eye, point), 14: (MIX, point)}
    encoder |= dict.fromkeys((2, 6, 10), (eye, average))
    decoder = {1: (torch.linalg.pinv(MIX), point), 19: (eye, point)}
    decoder |= dict.fromkeys((7, 12, 17), (eye, point))
    for half, layers in (("taesd_encoder", encoder), ("taesd_decoder", decoder)):
        for index, (colours, kernel) in layers.items():
            weight = tensors[f"{half}.{index}.weight"]
            rows, columns = colours.shape
            weight[:rows, :columns] = colours[:, :, None, None] * kernel
    tensors["taesd_encoder.14.bias"][:] = -MIX.sum(1) / 2
    tensors["taesd_decoder.1.bias"][:3] = 0.5
    tensors["vae_scale"].fill_(SCALE)
    return tensors

"""Pictures as ComfyUI IMAGE tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...lora2.report.ranks import RankReport
from ...lora2.report.summary import rank_picture


def rank_image(report: RankReport, in_use: bool = False) -> Tensor:
    """The picture of a report as an IMAGE: (1, height, 1024, 3) float32 in 0…1."""
    picture = np.array(rank_picture(report, in_use=in_use), dtype=np.float32)
    return torch.from_numpy(picture).div_(255.0)[None]

"""Lets torchvision import where its compiled operators do not load (a CUDA build beside a CPU torch).

Imported whenever `.venv` starts (dev/host.py writes the .pth file); acts only when torchvision is imported.
"""

import importlib.abc
import sys


class _OperatorSchemas(importlib.abc.MetaPathFinder):
    """Declares two operators after torchvision tried its own library and before it needs them."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            _declare_missing()
        return None


def _declare_missing() -> None:
    import torch

    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


sys.meta_path.insert(0, _OperatorSchemas())

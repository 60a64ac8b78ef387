"""What becomes of an optimizer's moments when layers are cut: carried over instead of dropped; dropped where nothing is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import pack

MOMENTS = ("exp_avg", "exp_avg_sq")


def carrying(own: type[Any]) -> type[Any]:
    """A trainer whose moments go on in the positions that a cut makes of the old ones."""

    class Carrying(own):
        def _prune_if_due(self) -> None:
            cuts, old = (
                len(self.progress.cuts),
                [_remembered(adapter, self.optimizer.inner) for adapter in self.network.adapters],
            )
            super()._prune_if_due()
            if len(self.progress.cuts) > cuts:
                for adapter, before in zip(self.network.adapters, old, strict=True):
                    _carry(adapter, before, self.optimizer.inner)

    return Carrying


def anew(own: type[Any]) -> type[Any]:
    """A trainer that drops all moments at the steps at which ours would cut, and cuts nothing."""

    class Anew(own):
        def _prune_if_due(self) -> None:
            super()._prune_if_due()
            usual = pack("lora2.config").TrainingConfig().settle_at
            if self.issued in replace(self.config, settle_at=usual).cut_steps:
                self.runner.reset()
                self.optimizer = pack("lora2.training.optimizer").Optimizer(self.network, self.config)

    return Anew


def _remembered(adapter: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of a layer's factors, Λ and moments."""
    weight = (
        torch.ones(adapter.capacity) if adapter.importance is None else adapter.importance[: adapter.capacity].clone()
    )
    state = {name: dict(optimizer.state.get(getattr(adapter, name), {})) for name in ("down", "up")}
    return {
        "factors": {name: getattr(adapter, name).detach().clone() for name in ("down", "up")},
        "importance": weight.to(adapter.down.device),
        "moments": {name: {k: v.clone() for k, v in own.items()} for name, own in state.items()},
    }


@torch.no_grad()
def _carry(adapter: Any, before: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """With new = Rᵀ old for a factor, ∂L/∂(the other's new) = (Λ⁻¹ R)ᵀ ∂L/∂(the other's old): so move both moments.

    The second one as if the gradients of two positions had nothing to do with each other.
    """
    live = before["importance"] > 0
    if not adapter.capacity or not before["moments"]["down"]:
        return
    for name, other in (("up", "down"), ("down", "up")):
        mix = (
            mixed(before["factors"][other][live], getattr(adapter, other))
            / before["importance"][live].double()[:, None]
        )
        parameter, own = getattr(adapter, name), before["moments"][name]
        moved = [
            weights.t() @ own[key][live].double() for key, weights in zip(MOMENTS, (mix, mix.square()), strict=True)
        ]
        optimizer.state[parameter] = {
            "step": own["step"],
            **dict(zip(MOMENTS, (m.float() for m in moved), strict=True)),
        }


def mixed(old: Tensor, new: Tensor) -> Tensor:
    """R (old positions, new positions) float64 with new = Rᵀ old, rows being positions, as near as can be."""
    rows, lengths = old.double(), old.double().norm(dim=1).clamp(min=1e-30)
    rows = rows / lengths[:, None]
    products = rows @ rows.t() + 1e-9 * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return torch.cholesky_solve(rows @ new.double().t(), torch.linalg.cholesky(products)) / lengths[:, None]

"""Working copies and gradients of many layers' factors, laid out together so that a step handles them in a few launches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .adapter import Adapter, capacity_for


class _Group:
    """The rows of all factors of one width, one below the other.

    copy, sums: (rows, width), values and summed gradients in the type that the model computes in; each layer's rows are
    padded with zeros to a multiple of 8, which tensor cores like. layer, position: where each row belongs.
    """

    def __init__(self, factors: Sequence[tuple[int, nn.Parameter]], dtype: torch.dtype, device: torch.device) -> None:
        self.members = list(factors)
        width = factors[0][1].shape[1]
        padded = [capacity_for(len(p)) for _, p in factors]
        self.copy = torch.zeros(sum(padded), width, dtype=dtype, device=device)
        self.sums = torch.zeros_like(self.copy)
        self.starts = [0, *itertools.accumulate(padded[:-1])]
        self.padded = padded
        self.layer = torch.cat([torch.full((n,), index) for n, (index, _) in zip(padded, factors, strict=True)]).to(device)
        self.position = torch.cat([torch.arange(n) for n in padded]).to(device)

    def views(self, of: Tensor) -> list[tuple[int, Tensor]]:
        """Every layer's rows of such a tensor, padded."""
        spans = zip(self.members, self.starts, self.padded, strict=True)
        return [(index, of[start : start + n]) for (index, _), start, n in spans]

    def factors(self, of: Tensor) -> list[Tensor]:
        """Every layer's rows of such a tensor, as many as its factor has."""
        return [of[start : start + len(p)] for (_, p), start in zip(self.members, self.starts, strict=True)]

    def finish(self, importance: Tensor | None) -> Tensor:
        """Turn the sums into float32 gradients, times Λ by rows if given, and start new sums. Returns all rows."""
        gradient = self.sums.float()
        if importance is not None:
            gradient.mul_(importance[self.layer, self.position][:, None])
        for (_, parameter), rows in zip(self.members, self.factors(gradient), strict=True):
            parameter.grad = rows
        self.sums.zero_()
        return gradient


class Packed:
    """Linear layers' factors in a half type, with Λ folded into the down factors, and room for their gradients."""

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype, device: torch.device) -> None:
        chosen = [(i, a) for i, a in enumerate(adapters) if len(a.shape) == 2]
        self.indices = {i for i, _ in chosen}
        self._downs = _by_width([(i, a.down) for i, a in chosen], dtype, device)
        self._ups = _by_width([(i, a.up) for i, a in chosen], dtype, device)
        groups = [*self._downs, *self._ups]
        self._targets = [t for g in groups for t in g.factors(g.copy)]
        self._sources = [p.detach() for g in groups for _, p in g.members]
        parts: dict[int, list[Tensor]] = {i: [] for i in self.indices}
        for select in ("copy", "sums"):
            for group in groups:
                for i, view in group.views(getattr(group, select)):
                    parts[i].append(view)
        for i, (folded, cast, to_folded, to_cast) in parts.items():
            adapters[i].working = (folded, cast, to_folded, to_cast)

    def refresh(self, importance: Tensor | None) -> None:
        """Copy the factors anew. importance: (layers, positions) Λ for capacities in multiples of 8, or None for ones."""
        torch._foreach_copy_(self._targets, self._sources)
        if importance is not None:
            for group in self._downs:
                group.copy.mul_(importance[group.layer, group.position][:, None])

    def forget(self) -> None:
        """Drop the sums of a step that was given up."""
        torch._foreach_zero_([group.sums for group in (*self._downs, *self._ups)])

    def finish_gradients(self, importance: Tensor | None, shares: Tensor | None) -> None:
        """Give every factor its `.grad` from the sums, which start anew.

        importance: as for `refresh`. shares: (layers, positions), filled with b_j · ∂L/∂b_j of every position.
        """
        for group in self._downs:
            group.finish(importance)
        for group in self._ups:
            gradient = group.finish(None)
            if shares is not None:
                shares[group.layer, group.position] = torch.linalg.vecdot(group.copy.float(), gradient)


def _by_width(
    factors: Sequence[tuple[int, nn.Parameter]], dtype: torch.dtype, device: torch.device
) -> list[_Group]:
    widths: dict[int, list[tuple[int, nn.Parameter]]] = {}
    for index, parameter in factors:
        widths.setdefault(parameter.shape[1], []).append((index, parameter))
    return [_Group(group, dtype, device) for group in widths.values()]

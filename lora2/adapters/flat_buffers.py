"""Many layers' factors, their working copies and gradients, laid out together so that a step handles them in a few launches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layer import Adapter, round_up_capacity


class FlatBuffer:
    """The rows of all factors of one width, one below the other; each layer's rows are padded with zeros to a multiple of 8.

    master: (rows, width) float32, the trained numbers: every member's data is a part of it. Rows of padding have no gradient
    and stay zero. copy, sums: the same in the type that the model computes in, values and summed gradients.
    layer, position: where each row belongs. members, starts, padded: the factors, their first rows and padded lengths.
    """

    def __init__(self, factors: Sequence[tuple[int, nn.Parameter]], dtype: torch.dtype, device: torch.device) -> None:
        self.members = list(factors)
        width = factors[0][1].shape[1]
        self.padded = [round_up_capacity(len(p)) for _, p in factors]
        self.starts = [0, *itertools.accumulate(self.padded[:-1])]
        self.master = nn.Parameter(torch.zeros(sum(self.padded), width, device=device))
        for (_, parameter), rows in zip(self.members, self.factors(self.master.data), strict=True):
            rows.copy_(parameter.data)
            parameter.data = rows
        self.copy = torch.zeros_like(self.master, dtype=dtype, requires_grad=False)
        self.sums = torch.zeros_like(self.copy)
        indices = [index for index, _ in factors]
        self.layer = torch.cat([torch.full((n,), i) for n, i in zip(self.padded, indices, strict=True)]).to(device)
        self.position = torch.cat([torch.arange(n) for n in self.padded]).to(device)

    def views(self, of: Tensor) -> list[tuple[int, Tensor]]:
        """Every layer's rows of such a tensor, padded."""
        return [(index, rows) for (index, _), rows in zip(self.members, of.split(self.padded), strict=True)]

    def factors(self, of: Tensor) -> list[Tensor]:
        """Every layer's rows of such a tensor, as many as its factor has."""
        rows = zip(of.split(self.padded), self.members, strict=True)
        return [part if len(part) == len(p) else part[: len(p)] for part, (_, p) in rows]

    def weights(self, importance: Tensor) -> Tensor:
        """(rows, 1) Λ of every row, from (layers, positions)."""
        return importance[self.layer, self.position][:, None]

    def finish(self, importance: Tensor | None) -> None:
        """Turn the sums into float32 gradients of the master and its members, times Λ by rows if given."""
        gradient = torch.empty_like(self.master, requires_grad=False)
        if importance is None:
            gradient.copy_(self.sums)
        else:
            torch.mul(self.sums, self.weights(importance), out=gradient)
        self.master.grad = gradient
        for (_, parameter), rows in zip(self.members, self.factors(gradient), strict=True):
            parameter.grad = rows


class FlatBuffers:
    """Linear layers' factors, with copies in a half type that hold Λ in the down factors, and room for their gradients."""

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype, device: torch.device) -> None:
        chosen = [(i, a) for i, a in enumerate(adapters) if not a.convolution]
        self.indices = {i for i, _ in chosen}
        self._downs = _by_width([(i, a.down) for i, a in chosen], dtype, device)
        self._ups = _by_width([(i, a.up) for i, a in chosen], dtype, device)
        parts: dict[int, list[Tensor]] = {i: [] for i in self.indices}
        for select in ("copy", "sums"):
            for block in self.blocks:
                for i, view in block.views(getattr(block, select)):
                    parts[i].append(view)
        for i, (folded, cast, to_folded, to_cast) in parts.items():
            adapters[i].working = (folded, cast, to_folded, to_cast)

    @property
    def blocks(self) -> list[FlatBuffer]:
        """All blocks, those of down factors first."""
        return [*self._downs, *self._ups]

    def refresh(self, importance: Tensor | None) -> None:
        """Copy the factors anew. importance: (layers, positions) Λ for capacities in multiples of 8, or None for ones."""
        for block in self.blocks:
            if importance is None or block in self._ups:
                block.copy.copy_(block.master.data)
            else:
                torch.mul(block.master.data, block.weights(importance), out=block.copy)

    def forget(self) -> None:
        """Drop the sums of a step that was given up."""
        for block in self.blocks:
            block.sums.zero_()
            block.master.grad = None

    def finish_gradients(self, importance: Tensor | None, shares: Tensor | None) -> None:
        """Give every factor its `.grad` from the sums, which start anew.

        importance: as for `refresh`. shares: (layers, positions), filled with b_j · ∂L/∂b_j of every position.
        """
        for block in self._downs:
            block.finish(importance)
        for block in self._ups:
            block.finish(None)
            if shares is not None:
                shares[block.layer, block.position] = (block.copy * block.sums).sum(1, dtype=torch.float32)
        for block in self.blocks:
            block.sums.zero_()


def _by_width(
    factors: Sequence[tuple[int, nn.Parameter]], dtype: torch.dtype, device: torch.device
) -> list[FlatBuffer]:
    widths: dict[int, list[tuple[int, nn.Parameter]]] = {}
    for index, parameter in factors:
        widths.setdefault(parameter.shape[1], []).append((index, parameter))
    return [FlatBuffer(members, dtype, device) for members in widths.values()]

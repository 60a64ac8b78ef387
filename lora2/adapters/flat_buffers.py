"""Factors of many linear layers in shared memory, so that a step handles them in a few kernel launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layer import Adapter, WorkingCopies, round_up_capacity


class FlatBuffer:
    """All factors of one width, stacked; every factor is padded with rows of zeros to a multiple of 8.

    members: (layer index, factor) in the order of their rows. master: (rows, width) float32, the trained parameters; every
    member's data is a view of it. Padding has no gradient and stays zero. working: (rows, width) values in the model's compute
    type; gradient_sums: its summed gradients. layer, component: (rows,) the layer index and component index of each row.
    """

    def __init__(self, factors: Sequence[tuple[int, nn.Parameter]], dtype: torch.dtype, device: torch.device) -> None:
        self.members = list(factors)
        width = factors[0][1].shape[1]
        self._lengths = [round_up_capacity(len(p)) for _, p in factors]
        self.master = nn.Parameter(torch.zeros(sum(self._lengths), width, device=device))
        for (_, parameter), rows in zip(self.members, self.member_rows(self.master.data), strict=True):
            rows.copy_(parameter.data)
            parameter.data = rows
        self.working = torch.zeros_like(self.master, dtype=dtype, requires_grad=False)
        self.gradient_sums = torch.zeros_like(self.working)
        layers = [torch.full((n,), index) for n, (index, _) in zip(self._lengths, self.members, strict=True)]
        self.layer = torch.cat(layers).to(device)
        self.component = torch.cat([torch.arange(n) for n in self._lengths]).to(device)

    def padded_rows(self, stacked: Tensor) -> list[Tensor]:
        """Views of every member's rows in a (rows, …) tensor, with padding."""
        return list(stacked.split(self._lengths))

    def member_rows(self, stacked: Tensor) -> list[Tensor]:
        """Views of every member's rows in a (rows, …) tensor, without padding."""
        rows = zip(stacked.split(self._lengths), self.members, strict=True)
        return [part if len(part) == len(p) else part[: len(p)] for part, (_, p) in rows]

    def row_importance(self, importance: Tensor) -> Tensor:
        """Λ of every row, (rows, 1), from (layers, components)."""
        return importance[self.layer, self.component][:, None]

    def finish_gradients(self, importance: Tensor | None) -> None:
        """Set the float32 gradients of the master and its members from the sums, rows times Λ if given."""
        gradient = torch.empty_like(self.master, requires_grad=False)
        if importance is None:
            gradient.copy_(self.gradient_sums)
        else:
            torch.mul(self.gradient_sums, self.row_importance(importance), out=gradient)
        self.master.grad = gradient
        for (_, parameter), rows in zip(self.members, self.member_rows(gradient), strict=True):
            parameter.grad = rows

    def clear_gradients(self) -> None:
        """Remove the gradients of the master and its members."""
        self.master.grad = None
        for _, parameter in self.members:
            parameter.grad = None


class FlatBuffers:
    """The factors of all linear layers in one FlatBuffer per width, with Λ folded into the working copies of down factors.

    layers: indices of the adapters whose factors they hold.
    """

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype, device: torch.device) -> None:
        linear = [(i, a) for i, a in enumerate(adapters) if not a.is_convolution]
        self.layers = {i for i, _ in linear}
        self._downs = _by_width([(i, a.down) for i, a in linear], dtype, device)
        self._ups = _by_width([(i, a.up) for i, a in linear], dtype, device)
        copies: dict[int, list[Tensor]] = {i: [] for i in self.layers}
        for kind in ("working", "gradient_sums"):
            for buffer in self.buffers:
                for (i, _), rows in zip(buffer.members, buffer.padded_rows(getattr(buffer, kind)), strict=True):
                    copies[i].append(rows)
        for i, tensors in copies.items():
            adapters[i].working = WorkingCopies(*tensors)

    @property
    def buffers(self) -> list[FlatBuffer]:
        """All buffers, those of down factors first."""
        return [*self._downs, *self._ups]

    def refresh(self, importance: Tensor | None) -> None:
        """Update the working copies. importance: Λ, (layers, components), for capacities in multiples of 8; None for ones."""
        for buffer in self.buffers:
            if importance is None or buffer in self._ups:
                buffer.working.copy_(buffer.master.data)
            else:
                torch.mul(buffer.master.data, buffer.row_importance(importance), out=buffer.working)

    def discard_gradients(self) -> None:
        """Zero the sums and remove the masters' gradients, after an abandoned step."""
        for buffer in self.buffers:
            buffer.gradient_sums.zero_()
            buffer.master.grad = None

    def finish_gradients(self, importance: Tensor | None, shares: Tensor | None) -> None:
        """Set every factor's `.grad` from the sums, and zero the sums.

        importance: as in `refresh`. shares: (layers, components), receives b_j · ∂L/∂b_j of every component.
        """
        for buffer in self._downs:
            buffer.finish_gradients(importance)
        for buffer in self._ups:
            buffer.finish_gradients(None)
            if shares is not None:
                shares[buffer.layer, buffer.component] = (buffer.working * buffer.gradient_sums).sum(
                    1, dtype=torch.float32
                )
        for buffer in self.buffers:
            buffer.gradient_sums.zero_()


def _by_width(
    factors: Sequence[tuple[int, nn.Parameter]], dtype: torch.dtype, device: torch.device
) -> list[FlatBuffer]:
    by_width: dict[int, list[tuple[int, nn.Parameter]]] = {}
    for index, parameter in factors:
        by_width.setdefault(parameter.shape[1], []).append((index, parameter))
    return [FlatBuffer(members, dtype, device) for members in by_width.values()]

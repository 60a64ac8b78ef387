"""Entropy of cross-attention: its mean, its gradient, and a probe for a model's blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_QUERIES = 256
"""Queries whose attention the entropy looks at; evenly spaced, since all of a large picture's would fill gigabytes."""


MAX_MAP_ENTRIES = 1 << 22
"""Numbers of attention maps that the entropy computes at once."""


def attention_entropy(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Mean over heads and queries of H(softmax(q kᵀ / √d)), in nats.

    q: (batch, queries, heads · d), k: (batch, keys, heads · d). At most ENTROPY_POSITIONS evenly spaced queries count.
    """
    return _entropy(_spaced(q), k, heads)


def _spaced(q: Tensor) -> Tensor:
    """At most ENTROPY_POSITIONS of the queries, evenly spaced."""
    return q[:, :: max(1, math.ceil(q.shape[1] / MAX_QUERIES))]


def _entropy(q: Tensor, k: Tensor, heads: int) -> Tensor:
    mean: Tensor = _MeanEntropy.apply(heads, q, k)
    return mean


def _split(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads · d) → (batch, heads, tokens, d) float32."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2).float()


def _join(x: Tensor, like: Tensor) -> Tensor:
    """The way back, in another tensor's type."""
    return x.transpose(-3, -2).flatten(-2).to(like.dtype)


class _MeanEntropy(torch.autograd.Function):
    """Mean of H(p) = −Σ p ln p over blocks, heads and queries, p = softmax(s), s = q kᵀ / √d; one q and one k per block.

    Attention maps of dozens of blocks would lie in memory just when it is fullest, so the gradient is taken right away, some
    blocks at a time: ∂H/∂s_i = −p_i (ln p_i + H).
    """

    @staticmethod
    def forward(ctx: Any, heads: int, *tensors: Tensor) -> Tensor:
        """tensors: all q (batch, queries, heads · d), then all k (batch, keys, heads · d), alike. Returns () float32."""
        queries, keys = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        map_size = heads * queries[0].shape[:-1].numel() * keys[0].shape[-2]
        step = max(1, MAX_MAP_ENTRIES // map_size)
        scale = (queries[0].shape[-1] // heads) ** -0.5
        rows = len(queries) * heads * queries[0].shape[:-1].numel()
        sums, to_q, to_k = [], [], []
        for start in range(0, len(queries), step):
            chunk = slice(start, start + step)
            joined_q, joined_k = torch.cat(queries[chunk]), torch.cat(keys[chunk])
            q, k = _split(joined_q, heads), _split(joined_k, heads)
            logs = torch.log_softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
            p = logs.exp()
            entropy = -(p * logs).sum(-1, keepdim=True)
            sums.append(entropy.sum())
            if any(ctx.needs_input_grad):
                slope = logs.add_(entropy).mul_(p).mul_(-scale / rows)
                to_q.append(_join(slope @ k, joined_q))
                to_k.append(_join(slope.transpose(-1, -2) @ q, joined_k))
        ctx.save_for_backward(*to_q, *to_k)
        ctx.batch = len(queries[0])
        return torch.stack(sums).sum() / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients, times that of the mean."""
        kept = torch._foreach_mul(list(ctx.saved_tensors), gradient)
        return None, *(part for joined in kept for part in joined.split(ctx.batch))


class EntropyProbe:
    """Listens to the q and k projections of cross-attention blocks and gives their mean entropy.

    blocks: (to_q, to_k, heads) of every cross-attention block.
    """

    def __init__(self, blocks: Sequence[tuple[nn.Module, nn.Module, int]]) -> None:
        self.blocks = list(blocks)
        self._queries: dict[int, Tensor] = {}
        self._heard: list[tuple[Tensor, Tensor, int]] = []
        self._listening = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While inside, every forward is listened to. Enter after the adapters, so that their share is heard."""
        handles = []
        for index, (to_q, to_k, heads) in enumerate(self.blocks):
            handles.append(to_q.register_forward_hook(self._hear_query(index)))
            handles.append(to_k.register_forward_hook(self._hear_key(index, heads)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.forget()

    def forget(self) -> None:
        """Forget what was heard, and listen to the next forward."""
        self._queries.clear()
        self._heard.clear()
        self._listening = True

    def take(self) -> Tensor | None:
        """The mean entropy of all forwards heard, every sample counted alike, and forget them; None if there were none.

        After that nothing is heard until the next `forget`: a backward with checkpointing runs the blocks again, and what was
        heard in it would keep all that they compute. Blocks of one shape are computed together: there are dozens, and each by
        itself would be a dozen launches.
        """
        shapes: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, int]]] = {}
        for q, k, heads in self._heard:
            shapes.setdefault((q.shape, k.shape, heads), []).append((q, k, heads))
        self.forget()
        if not shapes:
            return None
        self._listening = False
        sums, samples = [], 0
        for blocks in shapes.values():
            count = len(blocks) * blocks[0][0].shape[0]
            mean = _MeanEntropy.apply(blocks[0][2], *(q for q, _, _ in blocks), *(k for _, k, _ in blocks))
            sums.append(mean * count)
            samples += count
        return torch.stack(sums).sum() / samples

    def _hear_query(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            if self._listening:
                self._queries[index] = _spaced(output).contiguous()

        return hook

    def _hear_key(self, index: int, heads: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            query = self._queries.pop(index, None)
            if query is not None:
                self._heard.append((query, output, heads))

        return hook

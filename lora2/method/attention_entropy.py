"""Entropy of cross-attention: its mean, its gradient, and a probe that measures it in a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_QUERIES = 256
"""Queries of a block that the entropy samples, evenly spaced: the maps of all queries of a large image take gigabytes."""

MAX_MAP_ENTRIES = 1 << 22
"""Entries of the attention maps that are computed at once."""


def attention_entropy(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Mean over heads and queries of H(softmax(q kᵀ / √d)), in nats.

    q: (batch, queries, heads · d), k: (batch, keys, heads · d). At most MAX_QUERIES evenly spaced queries are used.
    """
    mean: Tensor = _MeanEntropy.apply(heads, _sample_queries(q), k)
    return mean


def _sample_queries(q: Tensor) -> Tensor:
    """At most MAX_QUERIES of the queries, evenly spaced."""
    return q[:, :: max(1, math.ceil(q.shape[1] / MAX_QUERIES))]


def _split(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads · d) → (batch, heads, tokens, d) float32."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2).float()


def _join(x: Tensor, like: Tensor) -> Tensor:
    """(batch, heads, tokens, d) → (batch, tokens, heads · d), in the dtype of `like`."""
    return x.transpose(-3, -2).flatten(-2).to(like.dtype)


class _MeanEntropy(torch.autograd.Function):
    """Mean of H(p) = −Σ p ln p over blocks, heads and queries, p = softmax(s), s = q kᵀ / √d; one q and one k per block.

    The gradient ∂H/∂s_i = −p_i (ln p_i + H) is computed in the forward, a few blocks at a time: autograd would keep the
    attention maps of all blocks until memory use is at its peak.
    """

    @staticmethod
    def forward(ctx: Any, heads: int, *tensors: Tensor) -> Tensor:
        """tensors: all q (batch, queries, heads · d), then all k (batch, keys, heads · d), of equal shapes. Returns () float32."""
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
        """The saved gradients times that of the mean."""
        scaled = torch._foreach_mul(list(ctx.saved_tensors), gradient)
        return None, *(part for joined in scaled for part in joined.split(ctx.batch))


class EntropyProbe:
    """Records the q and k projections of cross-attention blocks by forward hooks, and computes their mean entropy.

    blocks: (to_q, to_k, heads) of every cross-attention block.
    """

    def __init__(self, blocks: Sequence[tuple[nn.Module, nn.Module, int]]) -> None:
        self.blocks = list(blocks)
        self._queries: dict[int, Tensor] = {}
        self._recorded: list[tuple[Tensor, Tensor, int]] = []
        self._recording = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record every forward while inside. Enter after the adapters are attached, so that their output is included."""
        handles = []
        for index, (to_q, to_k, heads) in enumerate(self.blocks):
            handles.append(to_q.register_forward_hook(self._query_hook(index)))
            handles.append(to_k.register_forward_hook(self._key_hook(index, heads)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.forget()

    def forget(self) -> None:
        """Discard what was recorded, and record the next forward."""
        self._queries.clear()
        self._recorded.clear()
        self._recording = True

    def take(self) -> Tensor | None:
        """Mean entropy of all recorded forwards, with equal weight for every sample; None if there were none.

        Stops recording until the next `forget`: the backward of gradient checkpointing runs the blocks again, and a recording
        of that would keep all that they compute. Blocks of equal shapes are computed together to save kernel launches.
        """
        by_shape: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, int]]] = {}
        for q, k, heads in self._recorded:
            by_shape.setdefault((q.shape, k.shape, heads), []).append((q, k, heads))
        self.forget()
        if not by_shape:
            return None
        self._recording = False
        sums, samples = [], 0
        for blocks in by_shape.values():
            count = len(blocks) * blocks[0][0].shape[0]
            mean = _MeanEntropy.apply(blocks[0][2], *(q for q, _, _ in blocks), *(k for _, k, _ in blocks))
            sums.append(mean * count)
            samples += count
        return torch.stack(sums).sum() / samples

    def _query_hook(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            if self._recording:
                self._queries[index] = _sample_queries(output).contiguous()

        return hook

    def _key_hook(self, index: int, heads: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            query = self._queries.pop(index, None)
            if query is not None:
                self._recorded.append((query, output, heads))

        return hook

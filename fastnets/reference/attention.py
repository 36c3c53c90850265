"""Scaled dot-product attention with every option, in plain PyTorch.

softmax(cap(q k^T * scale) + bias) v: Vaswani et al., https://arxiv.org/abs/1706.03762; soft cap: Gemma 2,
https://arxiv.org/abs/2408.00118; ALiBi: https://arxiv.org/abs/2108.12409; grouped queries:
https://arxiv.org/abs/2305.13245.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .philox import philox


class Options(NamedTuple):
    """What a call does besides its tensors; the same on every backend."""

    scale: float
    softcap: float = 0.0
    """cap(s) = softcap * tanh(s / softcap); 0 means none."""
    left: int | None = None
    """Query i sees keys j >= i + offset - left; None means all of them."""
    right: int | None = None
    """Query i sees keys j <= i + offset + right; None means all of them."""
    offset: int | None = 0
    """Key i + offset is query i's own; None means Lk - Lq, the last query facing the last key."""
    dropout: float = 0.0
    tf32: bool = False
    """float32 products may be computed in TF32, on devices that have it."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, its rows' log-sum-exp and the softmax weights.

    Args:
        q: [B, Hq, Lq, D].
        k: [B, Hkv, Lk, D]; Hkv divides Hq.
        v: [B, Hkv, Lk, Dv].
        mask: broadcastable to [B, Hq, Lq, Lk]; boolean (True takes part) or additive.
        slopes: ALiBi, [Hq] or [B, Hq]: the bias -slope * |i + offset - j|. Without gradient.
        seed: two 32-bit words in int64, the key of dropout's random numbers; read only if options.dropout > 0.
        starts_q, starts_k: sequences of many lengths packed into one of B = 1: int [N + 1], where each begins and the
            last ends. Positions, and dropout's batch index, then count within and by the sequence.

    Returns:
        out [B, Hq, Lq, Dv] in q's dtype; lse [B, Hq, Lq], natural logarithm, in the dtype of the arithmetic; weights
        [B, Hq, Lq, Lk] in q's dtype, after dropout. A row that sees nothing: zeros, -inf, zeros, and zero gradient.
    """
    dtype = q.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    groups = q.size(1) // max(k.size(1), 1)
    if groups != 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    sequence_q, i, sequence_k, j, offset = _positions(q, k, starts_q, starts_k, options)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    if slopes is not None:
        slopes = slopes.detach().to(compute).expand(q.size(0) if starts_q is None else starts_q.numel() - 1, -1)
        per_query = slopes[:, :, None] if starts_q is None else slopes[sequence_q].mT[None]
        scores = scores - per_query[..., None] * (i + offset - j).abs()
    for hidden in _hidden(sequence_q, i, sequence_k, j, offset, options, mask):
        scores = scores.masked_fill(hidden, -torch.inf)

    # Softmax from its parts: a row without a finite score has no maximum and no sum, and must stay differentiable.
    largest = scores.detach().amax(-1, keepdim=True) if k.size(2) else scores.new_zeros(*scores.shape[:-1], 1)
    exponents = (scores - largest.masked_fill(largest == -torch.inf, 0.0)).exp()
    total = exponents.sum(-1, keepdim=True)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    weights = exponents / total
    lse = (total.log() + largest).masked_fill(empty, -torch.inf).squeeze(-1)
    if options.dropout:
        batch = torch.arange(q.size(0), device=q.device) if starts_q is None else None
        batch = sequence_q if batch is None else batch[:, None, None, None]
        weights = weights * _kept(seed, batch, q.size(1), i, j, options.dropout, compute)
    return (weights @ v).to(dtype), lse, weights.to(dtype)


def _positions(q: Tensor, k: Tensor, starts_q: Tensor | None, starts_k: Tensor | None, options: Options):
    """Each query's sequence and position as a column, each key's as a row, and the offset between the two."""
    i = torch.arange(q.size(2), device=q.device)
    j = torch.arange(k.size(2), device=q.device)
    if starts_q is None or starts_k is None:
        offset = k.size(2) - q.size(2) if options.offset is None else options.offset
        return None, i[:, None], None, j, offset
    starts_q, starts_k = starts_q.long(), starts_k.long()
    sequence_q = torch.searchsorted(starts_q, i, right=True) - 1
    sequence_k = torch.searchsorted(starts_k, j, right=True) - 1
    i, j = i - starts_q[sequence_q], j - starts_k[sequence_k]
    offset = (starts_k.diff() - starts_q.diff())[sequence_q][:, None] if options.offset is None else options.offset
    return sequence_q, i[:, None], sequence_k, j, offset


def _hidden(sequence_q, i, sequence_k, j, offset, options: Options, mask: Tensor | None):
    """Boolean tensors, True where a query must not see a key."""
    if options.left is not None:
        yield j < i + offset - options.left
    if options.right is not None:
        yield j > i + offset + options.right
    if sequence_q is not None:
        yield sequence_q[:, None] != sequence_k
    if mask is not None and mask.dtype == torch.bool:
        yield ~mask


def _kept(seed: Tensor, batch: Tensor, heads: int, i: Tensor, j: Tensor, dropout: float, dtype) -> Tensor:
    """What dropout multiplies the weights with: 0 with probability `dropout`, else 1 / (1 - dropout).

    Weight (batch, head, i, j) is decided by word j % 64 // 16 of the block of random numbers with the counter
    (j // 64 * 16 + j % 16, i, head, batch): 16 neighbouring keys, a vector's lanes, differ in one counter word only.
    """
    head = torch.arange(heads, device=i.device)[:, None, None]
    batch = batch if batch.dim() == 4 else batch[:, None]
    counter = (j // 64 * 16 + j % 16, i, head, batch)
    words = philox(counter, (seed[0], seed[1]))
    word = j % 64 // 16
    chosen = torch.where(
        word < 2, torch.where(word == 0, words[0], words[1]), torch.where(word == 2, words[2], words[3])
    )
    threshold = round(dropout * 2**24)
    factor = 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)
    return (chosen >> 8 >= threshold).to(dtype) * factor

"""Attention with every option of fastnets/reference/attention.py: online softmax over tiles of keys.

Scores are in units of log2, exp(s) = 2^(s log2 e). Which tiles of keys a tile of queries sees follows from causality
and window: of those in between, the ones that every query sees whole are worked off without asking. Few queries divide
the keys between programs, whose results a second kernel joins.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ._launch import architecture, launch, precision, processors
from .tuning import tuned

_LOG2_E = 1.4426950408889634
_FAR = 2**30 - 1  # more than any length
LOG2_E = tl.constexpr(_LOG2_E)

# Queries, keys, warps and stages of a tile by compute capability, bytes an element and widest head (D or Dv, to a power
# of 2): of scores that are scaled products, and of those with options. As wide as registers allow on 8.0 without
# spilling; float32's operands are held twice, as two parts in TF32.
_TILES = {
    8: {2: {64: ((128, 64, 4, 3), (128, 64, 8, 2)),
            128: ((128, 64, 8, 2), (64, 64, 8, 2)),
            256: ((64, 64, 8, 1), (64, 64, 8, 1))},
        4: {64: ((64, 32, 4, 1), (32, 32, 4, 1)),
            128: ((32, 16, 4, 1), (16, 16, 4, 1)),
            256: ((16, 16, 8, 1), (16, 16, 8, 1))}},
}  # fmt: skip
_TILES[9] = {
    2: {64: ((128, 128, 8, 3), (128, 64, 8, 2)), 128: ((128, 128, 8, 2), (128, 64, 8, 2)),
        256: ((128, 64, 8, 2), (32, 64, 8, 1))},
    4: _TILES[8][4],
}  # fmt: skip
# tcgen05's accumulators pass through registers whenever they are scaled: smaller tiles than 9.0's, which spilled.
_TILES[10] = {
    2: {**_TILES[9][2], 128: ((128, 64, 8, 2), (128, 64, 8, 2)), 256: ((64, 64, 8, 1), (32, 64, 8, 1))},
    4: {**_TILES[8][4], 64: ((64, 32, 4, 1), (32, 64, 4, 1))},
}
_TILES[12] = _TILES[8]
_FEW = 16  # queries of a tile where there are no more


@triton.jit
def rows_of(starts_ptr, rows, sequence):
    """Where a sequence's rows begin and how many they are; within the tensor whatever `starts` holds."""
    if starts_ptr is None:
        begin, end = rows * 0, rows
    else:
        begin = tl.minimum(tl.maximum(tl.load(starts_ptr + sequence), 0), rows).to(tl.int32)
        end = tl.minimum(tl.maximum(tl.load(starts_ptr + sequence + 1), begin), rows).to(tl.int32)
    return begin, end - begin


@triton.jit
def place_of(number, map_ptr, lq, SIZE: tl.constexpr, heads):
    """The batch (or sequence), head and first row of the number'th tile; batch -1: there is no such tile."""
    head = number % heads
    tile = number // heads
    if map_ptr is None:
        tiles = tl.cdiv(lq, SIZE)
        batch, within = tile // tiles, tile % tiles
    else:
        batch, within = tl.load(map_ptr + 2 * tile), tl.load(map_ptr + 2 * tile + 1)
    return batch, head, within * SIZE


@triton.jit
def window_of(lq, lk, left, right, offset, BOTTOM_RIGHT: tl.constexpr):
    """Query i sees key j where i + lower <= j < i + upper; the third is ALiBi's offset."""
    if BOTTOM_RIGHT:
        offset = lk - lq
    return offset - left, offset + right + 1, offset


# What the functions below pass on, as tuples:
# place: queries i [M], the lengths of both, and as window_of has them lower, upper and offset;
# scoring: the products' factor, the soft cap, the mask with its strides or None, ALiBi's slope;
# dropping: the seed or None, batch, head, and the threshold of what is kept.


@triton.jit
def scores_of(
    products,  # [M, N] of queries i and keys j
    j, place, scoring,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Products become scores; -inf where a query does not see a key. Unbounded tiles lie within every bound of keys."""
    i, lq, lk, lower, upper, offset = place
    factor, cap, mask_ptr, mask_i, mask_j, slope = scoring
    s = products * factor
    if SOFTCAP:
        s = cap * libdevice.tanh(s)
    if mask_ptr is not None:
        at = mask_ptr + i.to(tl.int64)[:, None] * mask_i + j.to(tl.int64)[None, :] * mask_j
        mask = tl.load(at, mask=(i < lq)[:, None] & (j < lk)[None, :], other=0)
        if mask_ptr.dtype.element_ty == tl.int8:
            s = tl.where(mask != 0, s, float("-inf"))
        else:
            s += mask.to(tl.float32) * LOG2_E
    if ALIBI:
        s -= slope * tl.abs(offset + i[:, None] - j[None, :]).to(tl.float32)
    if BOUNDED:
        seen = (j < lk)[None, :]
        if LEFT:
            seen = seen & (j[None, :] - i[:, None] >= lower)
        if RIGHT:
            seen = seen & (j[None, :] - i[:, None] < upper)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def kept(dropping, i, start, N: tl.constexpr):
    """Which weights of queries i and N keys from `start`, a multiple of N, dropout keeps; as the reference's _kept."""
    seed_ptr, batch, head, threshold = dropping
    seed = tl.load(seed_ptr).to(tl.uint64) | (tl.load(seed_ptr + 1).to(tl.uint64) << 32)
    M: tl.constexpr = i.shape[0]
    COUNTERS: tl.constexpr = N // 4 if N >= 64 else 16  # 16 for 64 keys, each of 4 words
    key = (start // 64 * 16 + tl.arange(0, COUNTERS))[None, :] + tl.zeros((M, COUNTERS), tl.int32)
    row = i[:, None] + tl.zeros((M, COUNTERS), tl.int32)
    a, b, c, d = tl.philox(seed, key, row, head + tl.zeros_like(row), batch + tl.zeros_like(row))
    word = start % 64 // 16
    if N >= 64:
        words = tl.join(tl.join(a, b), tl.join(c, d))  # [M, N / 4, low bit of the word's number, high bit]
        words = tl.permute(tl.reshape(words, (M, N // 64, 16, 2, 2)), (0, 1, 4, 3, 2))
    elif N == 32:
        words = tl.permute(tl.join(tl.where(word == 0, a, c), tl.where(word == 0, b, d)), (0, 2, 1))
    else:
        words = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    words = tl.reshape(words, (M, N))
    return (words.to(tl.uint32, bitcast=True) >> 8) >= threshold.to(tl.uint32)


@triton.jit
def load_rows(ptr, stride, start, rows, width, SIZE: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """A [SIZE, WIDTH] tile of contiguous rows from `start`; zeros outside. WHOLE: no row is."""
    n = start + tl.arange(0, SIZE)
    d = tl.arange(0, WIDTH)
    at = ptr + n.to(tl.int64)[:, None] * stride + d[None, :]
    inside = (d < width)[None, :]
    if not WHOLE:
        inside = inside & (n < rows)[:, None]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def visible_keys(first, SIZE: tl.constexpr, lq, lk, lower, upper, N: tl.constexpr,
                 LEFT: tl.constexpr, RIGHT: tl.constexpr):  # fmt: skip
    """[begin, end): the keys that some query of a tile sees; [full, stop): those that all do, whole tiles of N keys."""
    last = tl.minimum(first + SIZE, lq) - 1
    begin, end = lk * 0, lk
    full, stop = lk * 0, lk
    if LEFT:
        begin = tl.minimum(tl.maximum(first + lower, 0), lk)
        full = tl.maximum(last + lower, 0)
    if RIGHT:
        end = tl.minimum(tl.maximum(last + upper, 0), lk)
        stop = tl.minimum(tl.maximum(first + upper, 0), lk)
    return begin // N * N, end, tl.cdiv(full, N) * N, stop // N * N


@triton.jit
def whole_tiles(begin, end, full, stop, N: tl.constexpr, PLAIN: tl.constexpr):
    """What of [full, stop) lies in [begin, end); nothing, from `begin`, unless scores are PLAIN products.

    Scores with options ask every tile for its bounds, which costs little beside them: one loop, not three to compile.
    """
    if PLAIN:
        full = tl.minimum(tl.maximum(full, begin), tl.maximum(begin, tl.cdiv(end, N) * N))
        stop = tl.maximum(tl.minimum(stop, end // N * N), full)
    else:
        full, stop = begin, begin
    return full, stop


@triton.jit
def row_products(
    held, side, other, first,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[M, N]: rows times other rows, N from `first`, in chunks of columns where CHUNK is less than D.

    held: the rows [M, D] themselves, of which chunks make no use; side: their pointer, stride, first row, number and
    columns; other: pointer, stride and number of the others.
    """
    a_ptr, a_row, a_first, a_rows, width = side
    b_ptr, b_row, b_rows = other
    if CHUNK == D:
        b = load_rows(b_ptr, b_row, first, b_rows, width, N, D, WHOLE)
        products = tl.dot(held, tl.trans(b), input_precision=PRECISION)
    else:
        products = tl.zeros((M, N), tl.float32)
        for c in range(0, D, CHUNK):
            a = load_rows(a_ptr + c, a_row, a_first, a_rows, width - c, M, CHUNK, False)
            b = load_rows(b_ptr + c, b_row, first, b_rows, width - c, N, CHUNK, WHOLE)
            products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
    return products


@triton.jit
def _forward_tiles(
    acc, largest, total, q, begin, end,
    q_side, k_side, v_ptr, v_row, dv, place, scoring, dropping,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end), in tiles of N, to what a tile of queries has seen."""
    i, lk = place[0], place[2]
    for start in range(begin, end, N):
        start = tl.multiple_of(start, N)
        products = row_products(q, q_side, k_side, start, M, N, D, CHUNK, not BOUNDED, PRECISION)
        j = start + tl.arange(0, N)
        s = scores_of(products, j, place, scoring, SOFTCAP, ALIBI, LEFT, RIGHT, BOUNDED)
        former = largest
        largest = tl.maximum(former, tl.max(s, 1))
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        shrink = tl.exp2(former - finite)
        p = tl.exp2(s - finite[:, None])
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(dropping, i, start, N), p, 0.0)
        v = load_rows(v_ptr, v_row, start, lk, dv, N, DV, not BOUNDED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, largest, total


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, Hq, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv], with contiguous rows
    out_ptr,  # [B, Hq, Lq, Dv]; with parts float32 [parts, B, Hq, Lq, Dv], contiguous
    lse_ptr,  # [B, Hq, Lq] in log2; with parts [parts, B, Hq, Lq]
    mask_ptr,  # None, int8 or additive [B, Hq, Lq, Lk] at any strides
    slopes_ptr,  # None or [B, Hq]
    seed_ptr,  # None or int64 [2]
    starts_q_ptr, starts_k_ptr, map_ptr,  # None, or int64 [N + 1] twice, and int32 [tiles, 2]: sequence and tile in it
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    mask_batch, mask_head, mask_i, mask_j, slopes_batch, slopes_head,
    heads, groups, lq, lk, d, dv, left, right, offset, factor, cap, threshold, keep_factor, parts, lse_part,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    batch, head, first = place_of(tl.program_id(0), map_ptr, lq, M, heads)
    if batch < 0:
        return
    begin_q, length_q = rows_of(starts_q_ptr, lq, batch)
    begin_k, length_k = rows_of(starts_k_ptr, lk, batch)
    lower, upper, offset = window_of(length_q, length_k, left, right, offset, BOTTOM_RIGHT)
    memory = batch.to(tl.int64) if starts_q_ptr is None else batch.to(tl.int64) * 0
    row_q, wide = begin_q.to(tl.int64), head.to(tl.int64)
    q_ptr += memory * q_batch + wide * q_head + row_q * q_row
    k_ptr += memory * k_batch + (wide // groups) * k_head + begin_k.to(tl.int64) * k_row
    v_ptr += memory * v_batch + (wide // groups) * v_head + begin_k.to(tl.int64) * v_row
    if mask_ptr is not None:
        mask_ptr += batch.to(tl.int64) * mask_batch + wide * mask_head
    ALIBI: tl.constexpr = slopes_ptr is not None
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * slopes_batch + head * slopes_head) * LOG2_E
    DROPOUT: tl.constexpr = seed_ptr is not None

    i = first + tl.arange(0, M)
    q_side, k_side = (q_ptr, q_row, first, length_q, d), (k_ptr, k_row, length_k)
    q = load_rows(q_ptr, q_row, first, length_q, d, M, CHUNK, False)  # used where it is whole
    acc = tl.zeros((M, DV), tl.float32)
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    begin, end, full, stop = visible_keys(first, M, length_q, length_k, lower, upper, N, LEFT, RIGHT)
    part = tl.program_id(1).to(tl.int64)
    if SPLIT:
        each = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), N), parts) * N
        begin += tl.program_id(1) * each
        end = tl.minimum(end, begin + each)
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or DROPOUT or mask_ptr is not None)
    full, stop = whole_tiles(begin, end, full, stop, N, PLAIN)
    place = (i, length_q, length_k, lower, upper, offset)
    scoring = (factor, cap, mask_ptr, mask_i, mask_j, slope)
    dropping = (seed_ptr, batch, head, threshold)
    if LEFT and PLAIN:
        acc, largest, total = _forward_tiles(
            acc, largest, total, q, begin, tl.minimum(full, end), q_side, k_side, v_ptr, v_row, dv, place, scoring,
            dropping, M, N, D, DV, CHUNK, PRECISION, SOFTCAP, ALIBI, DROPOUT, LEFT, RIGHT, True,
        )  # fmt: skip
    if PLAIN:
        acc, largest, total = _forward_tiles(
            acc, largest, total, q, full, stop, q_side, k_side, v_ptr, v_row, dv, place, scoring,
            dropping, M, N, D, DV, CHUNK, PRECISION, SOFTCAP, ALIBI, DROPOUT, LEFT, RIGHT, False,
        )  # fmt: skip
    acc, largest, total = _forward_tiles(
        acc, largest, total, q, stop, end, q_side, k_side, v_ptr, v_row, dv, place, scoring,
        dropping, M, N, D, DV, CHUNK, PRECISION, SOFTCAP, ALIBI, DROPOUT, LEFT, RIGHT, True,
    )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), largest + tl.log2(total))
    acc *= (keep_factor / total)[:, None]
    exists = i < length_q
    row = row_q + i.to(tl.int64)
    tl.store(lse_ptr + part * lse_part + (memory * heads + wide) * lq + row, lse, mask=exists)
    at = part * lse_part * dv + memory * out_batch + wide * out_head + row * out_row
    column = tl.arange(0, DV)
    inside = exists[:, None] & (column < dv)[None, :]
    tl.store(out_ptr + at[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attention_join_kernel(
    parts_ptr,  # [parts, rows, Dv], rows in the order of lse
    parts_lse_ptr,  # [parts, rows] in log2
    out_ptr,  # [B, Hq, Lq, Dv]
    lse_ptr,  # [rows]
    out_batch, out_head, out_row, heads, lq, rows, dv, parts,
    ROWS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for part in range(parts):
        lse = tl.load(parts_lse_ptr + part.to(tl.int64) * rows + row, mask=exists, other=float("-inf"))
        largest = tl.maximum(largest, lse)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    column = tl.arange(0, DV)
    inside = exists[:, None] & (column < dv)[None, :]
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DV), tl.float32)
    for part in range(parts):
        base = part.to(tl.int64) * rows
        weight = tl.exp2(tl.load(parts_lse_ptr + base + row, mask=exists, other=float("-inf")) - finite)
        total += weight
        out = tl.load(parts_ptr + (base + row)[:, None] * dv + column[None, :], mask=inside, other=0.0)
        acc += weight[:, None] * out
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), largest + tl.log2(total)), mask=exists)
    at = (row // lq // heads) * out_batch + (row // lq % heads) * out_head + (row % lq) * out_row
    out = acc / total[:, None]
    tl.store(out_ptr + at[:, None] + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attention_weights_kernel(
    q_ptr, k_ptr, lse_ptr, weights_ptr,  # the last [B, Hq, Lq, Lk]
    mask_ptr, slopes_ptr, seed_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    mask_batch, mask_head, mask_i, mask_j, slopes_batch, slopes_head,
    heads, groups, lq, lk, d, left, right, offset, factor, cap, threshold, keep_factor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(lk, N)
    batch, head, first = place_of(tl.program_id(0) // tiles_k, None, lq, M, heads)
    start = tl.multiple_of(tl.program_id(0) % tiles_k * N, N)
    lower, upper, offset = window_of(lq, lk, left, right, offset, BOTTOM_RIGHT)
    memory, wide = batch.to(tl.int64), head.to(tl.int64)
    if mask_ptr is not None:
        mask_ptr += memory * mask_batch + wide * mask_head
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * slopes_batch + head * slopes_head) * LOG2_E
    i, j = first + tl.arange(0, M), start + tl.arange(0, N)
    q_ptr += memory * q_batch + wide * q_head
    q = load_rows(q_ptr, q_row, first, lq, d, M, CHUNK, False)
    k_side = (k_ptr + memory * k_batch + (wide // groups) * k_head, k_row, lk)
    products = row_products(q, (q_ptr, q_row, first, lq, d), k_side, start, M, N, D, CHUNK, False, PRECISION)
    place = (i, lq, lk, lower, upper, offset)
    scoring = (factor, cap, mask_ptr, mask_i, mask_j, slope)
    s = scores_of(products, j, place, scoring, SOFTCAP, slopes_ptr is not None, LEFT, RIGHT, True)
    rows = (memory * heads + wide) * lq + i
    lse = tl.load(lse_ptr + rows, mask=i < lq, other=0.0)
    p = tl.exp2(s - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
    if seed_ptr is not None:
        dropping = (seed_ptr, batch, head, threshold)
        p = tl.where(kept(dropping, i, start, N), p * keep_factor, 0.0)
    inside = (i < lq)[:, None] & (j < lk)[None, :]
    tl.store(weights_ptr + rows[:, None] * lk + j[None, :], p.to(weights_ptr.dtype.element_ty), mask=inside)


# ---- from torch ----------------------------------------------------------------------------------------------------


def _strides(x: Tensor, name: str) -> dict[str, int]:
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), x.stride()[:3], strict=True))


def options_of(q, k, mask, slopes, seed, scale, softcap, left, right, offset, dropout, tf32) -> dict:
    """The arguments that every kernel has."""
    if max(q.size(2), k.size(2)) >= _FAR:
        raise ValueError("attention takes sequences of less than 2^30")

    def bounded(n: int | None) -> int:
        return 0 if n is None else max(-_FAR, min(n, _FAR))

    strides = [0, 0, 0, 0]
    if mask is not None:
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return {
        **_strides(q, "q"),
        **_strides(k, "k"),
        "q_ptr": q,
        "k_ptr": k,
        "mask_ptr": mask.view(torch.int8) if mask is not None and mask.dtype == torch.bool else mask,
        **dict(zip(("mask_batch", "mask_head", "mask_i", "mask_j"), strides, strict=True)),
        "slopes_ptr": slopes,
        "slopes_batch": 0 if slopes is None else slopes.stride(0),
        "slopes_head": 0 if slopes is None else slopes.stride(1),
        "seed_ptr": seed if dropout else None,
        "heads": q.size(1),
        "groups": q.size(1) // k.size(1),
        "lq": q.size(2),
        "lk": k.size(2),
        "d": q.size(3),
        "left": bounded(left),
        "right": bounded(right),
        "offset": bounded(offset),
        "factor": scale / softcap if softcap else scale * _LOG2_E,
        "cap": softcap * _LOG2_E,
        "threshold": round(dropout * 2**24),
        "keep_factor": 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout),
        "PRECISION": precision(q.dtype, tf32),
        "SOFTCAP": softcap != 0,
        "LEFT": left is not None,
        "RIGHT": right is not None,
        "BOTTOM_RIGHT": offset is None,
    }


def width_of(columns: int) -> int:
    """A tile's columns for rows of so many."""
    return max(16, triton.next_power_of_2(columns))


def chunk_of(columns: int, like: Tensor, widest: int = 64) -> int:
    """How many columns of rows are multiplied at once; float32's, two parts in TF32, are whole up to `widest` alone."""
    width = width_of(columns)
    return min(width, 32) if like.element_size() == 4 and width > widest else width


def is_general(options: dict) -> bool:
    """Whether scores are more than scaled products, bounds aside."""
    return options["SOFTCAP"] or any(options[name] is not None for name in ("mask_ptr", "slopes_ptr", "seed_ptr"))


def with_tile(table: dict, like: Tensor, width: int, options: dict, name: str, run: Callable[[dict], Any]) -> None:
    """run(the tile's constants), by one of the tables."""
    m, n, warps, stages = table[architecture(like)][like.element_size()][max(64, width)][is_general(options)]
    tile = {"M": m, "N": n, "num_warps": warps, "num_stages": stages}
    there = tuple(options[name] is not None for name in ("mask_ptr", "slopes_ptr", "seed_ptr"))
    flags = tuple(options[name] for name in ("SOFTCAP", "LEFT", "RIGHT", "PRECISION"))
    sizes = like.size(0) * options["heads"], options["lq"], options["lk"]
    run(tuned(f"attention_{name}", like, sizes, (width, *there, *flags), tile, run))


def map_of(starts: Tensor | None, rows: int, batch: int, size: int) -> tuple[Tensor | None, int]:
    """Which sequence each tile of `size` rows is of and which of its tiles, int32 [tiles, 2]; the number of tiles.

    There may be fewer: the rest are of sequence -1. Nothing waits for the device.
    """
    if starts is None:
        return None, batch * triton.cdiv(rows, size)
    tiles = rows // size + batch
    bounds = starts.clamp(0, rows).cummax(0).values
    ends = ((bounds.diff() + size - 1) // size).cumsum(0)
    number = torch.arange(tiles, device=starts.device)
    sequence = torch.searchsorted(ends, number, right=True)
    within = number - torch.cat((ends.new_zeros(1), ends))[sequence]
    return torch.stack((sequence.where(sequence < batch, -1), within), 1).int(), tiles


def like_rows(x: Tensor, *sizes: int) -> Tensor:
    """Empty, of the given sizes, with its first three dimensions in memory in the order of x's."""
    order = sorted(range(3), key=lambda n: -x.stride(n))
    data = x.new_empty([sizes[n] for n in order] + [sizes[3]])
    return data.permute(*(order.index(n) for n in range(3)), 3)


def attention_forward(
    q, k, v, mask, slopes, seed, starts_q, starts_k, scale, softcap, left, right, offset, dropout, tf32
) -> tuple[Tensor, Tensor]:
    """The output and its rows' log-sum-exp in log2; see csrc/ops.cpp."""
    batch, heads, lq, dv = *q.shape[:3], v.size(3)
    out = like_rows(q, batch, heads, lq, dv)
    lse = q.new_empty((batch, heads, lq), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    options = options_of(q, k, mask, slopes, seed, scale, softcap, left, right, offset, dropout, tf32)
    sequences = batch if starts_q is None else starts_q.numel() - 1
    width = max(width_of(q.size(3)), width_of(dv))

    def run(tile: dict) -> None:
        if lq <= _FEW < tile["M"]:
            tile = {**tile, "M": _FEW, "num_warps": 4}
        map_, tiles = map_of(starts_q, lq, sequences, tile["M"])
        programs = tiles * heads
        parts = 1
        if starts_q is None and 2 * programs <= processors(q):  # else multiprocessors would have nothing to do
            parts = max(1, min(2 * processors(q) // programs, triton.cdiv(k.size(2), 2 * tile["N"])))
        split = parts > 1
        target, target_lse = out, lse
        if split:
            target = q.new_empty((parts, batch, heads, lq, dv), dtype=torch.float32)
            target_lse = lse.new_empty((parts, *lse.shape))
        launch(
            attention_forward_kernel,
            (programs, parts),
            q,
            v_ptr=v,
            out_ptr=target,
            lse_ptr=target_lse,
            starts_q_ptr=starts_q,
            starts_k_ptr=starts_k,
            map_ptr=map_,
            **_strides(v, "v"),
            **_strides(target[0] if split else target, "out"),
            dv=dv,
            parts=parts,
            lse_part=lse.numel(),
            D=width_of(q.size(3)),
            CHUNK=chunk_of(q.size(3), q),
            DV=width_of(dv),
            SPLIT=split,
            **options,
            **tile,
        )
        if split:
            launch(
                attention_join_kernel,
                (triton.cdiv(lse.numel(), 16),),
                q,
                parts_ptr=target,
                parts_lse_ptr=target_lse,
                out_ptr=out,
                lse_ptr=lse,
                **_strides(out, "out"),
                heads=heads,
                lq=lq,
                rows=lse.numel(),
                dv=dv,
                parts=parts,
                ROWS=16,
                DV=width_of(dv),
            )

    with_tile(_TILES, q, width, options, "forward", run)
    return out, lse


def attention_weights(q, k, lse, mask, slopes, seed, scale, softcap, left, right, offset, dropout, tf32) -> Tensor:
    """The softmax weights [B, Hq, Lq, Lk], after dropout; see csrc/ops.cpp."""
    weights = q.new_empty((*q.shape[:3], k.size(2)))
    if weights.numel() == 0:
        return weights
    options = options_of(q, k, mask, slopes, seed, scale, softcap, left, right, offset, dropout, tf32)
    tile = {"M": 64, "N": 64, "num_warps": 8, "num_stages": 1}
    tiles = q.size(0) * q.size(1) * triton.cdiv(q.size(2), 64) * triton.cdiv(k.size(2), 64)
    width = {"D": width_of(q.size(3)), "CHUNK": chunk_of(q.size(3), q, 32)}
    launch(attention_weights_kernel, (tiles,), q, lse_ptr=lse, weights_ptr=weights, **width, **options, **tile)
    return weights

"""Attention's gradients: the weights are computed anew from the rows' log-sum-exp, tile by tile.

One kernel walks the queries for each tile of keys (the gradients of k and v), one the keys for each tile of queries
(that of q), one everything that an entry of the mask is broadcast over. Every sum has one order: the same bits in every
run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ._launch import launch, processors
from .attention import (
    LOG2_E,
    _strides,
    chunk_of,
    kept,
    like_rows,
    load_rows,
    map_of,
    options_of,
    place_of,
    row_products,
    rows_of,
    scores_of,
    visible_keys,
    whole_tiles,
    width_of,
    window_of,
    with_tile,
)

# Of the kernel for k and v, and of the one for q; as attention.py's.
_TILES_KEYS = {
    8: {2: {64: ((64, 32, 4, 2), (64, 32, 8, 1)),
            128: ((64, 64, 8, 1), (64, 32, 8, 1)),
            256: ((32, 32, 8, 1), (16, 32, 8, 1))},
        4: {64: ((16, 32, 4, 1), (16, 16, 4, 1)),
            128: ((16, 16, 8, 1), (16, 16, 8, 1)),
            256: ((16, 16, 8, 1), (16, 16, 8, 1))}},
}  # fmt: skip
_TILES_QUERIES = {
    8: {2: {64: ((128, 64, 8, 2), (64, 32, 4, 1)),
            128: ((64, 64, 8, 1), (64, 64, 8, 1)),
            256: ((64, 32, 8, 1), (64, 32, 8, 1))},
        4: {64: ((32, 32, 4, 1), (16, 32, 4, 1)),
            128: ((16, 16, 8, 1), (16, 16, 8, 1)),
            256: ((16, 16, 8, 1), (16, 16, 8, 1))}},
}  # fmt: skip
_TILES_KEYS[9] = {
    2: {**_TILES_KEYS[8][2], 128: ((32, 64, 8, 1), (32, 32, 8, 1))},
    4: _TILES_KEYS[8][4],
}
_TILES_QUERIES[9] = {
    2: {64: ((128, 64, 8, 2), (64, 64, 8, 1)), 128: ((128, 64, 8, 2), (32, 64, 8, 1)),
        256: ((32, 64, 8, 1), (32, 32, 8, 1))},
    4: _TILES_QUERIES[8][4],
}  # fmt: skip
_TILES_KEYS[10] = {2: {**_TILES_KEYS[9][2], 128: ((32, 64, 8, 1), (64, 32, 8, 1))}, 4: _TILES_KEYS[8][4]}
_TILES_QUERIES[10] = _TILES_QUERIES[9]
for _table in (_TILES_KEYS, _TILES_QUERIES):
    _table[12] = _table[8]


@triton.jit
def attention_delta_kernel(
    out_ptr, grad_out_ptr,  # [B, Hq, Lq, Dv]
    grad_lse_ptr,  # None or [rows], natural logarithm's
    delta_ptr,  # [rows]
    out_batch, out_head, out_row, grad_batch, grad_head, grad_row, heads, lq, rows, dv,
    ROWS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """What softmax's gradient subtracts in each row: weights times their gradients, less the log-sum-exp's."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch, head, i = row // lq // heads, row // lq % heads, row % lq
    column = tl.arange(0, DV)
    inside = (row < rows)[:, None] & (column < dv)[None, :]
    at = batch * out_batch + head * out_head + i * out_row
    out = tl.load(out_ptr + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    at = batch * grad_batch + head * grad_head + i * grad_row
    grad = tl.load(grad_out_ptr + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + row, mask=row < rows, other=0.0)
    tl.store(delta_ptr + row, delta, mask=row < rows)


@triton.jit
def gradients_of(
    products, grad_weights,  # [M, N]: q k^T and grad_out v^T
    lse, delta,  # [M]
    start, place, scoring, dropping, grad_weights_ptr, keep_factor,  # attention.py has the tuples
    N: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr, OF_MASK: tl.constexpr,
):  # fmt: skip
    """The weights that multiply v, and the gradient in the products (less the scale) or, OF_MASK, in the mask."""
    j = start + tl.arange(0, N)
    i, lq, lk, _, _, _ = place
    factor, seed_ptr = scoring[0], dropping[0]
    s = scores_of(products, j, place, scoring, SOFTCAP, ALIBI, LEFT, RIGHT, BOUNDED)
    p = tl.exp2(s - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
    weights = p
    if grad_weights_ptr is not None:
        at = grad_weights_ptr + i.to(tl.int64)[:, None] * lk + j[None, :]
        grad_weights += tl.load(at, mask=(i < lq)[:, None] & (j < lk)[None, :], other=0.0).to(tl.float32)
    if seed_ptr is not None:
        keep = kept(dropping, i, start, N)
        weights = tl.where(keep, p * keep_factor, 0.0)
        grad_weights = tl.where(keep, grad_weights * keep_factor, 0.0)
    gradient = p * (grad_weights - delta[:, None])
    if SOFTCAP and not OF_MASK:
        t = libdevice.tanh(products * factor)
        gradient *= 1.0 - t * t
    return weights, gradient


@triton.jit
def _keys_tiles(
    grad_k, grad_v, k, v, begin, end, start, queries, keys, columns, bounds, scoring, dropping, grad_weights_ptr,
    keep_factor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds the queries [begin, end) of one head, in tiles of M, to the gradients of a tile of keys.

    queries: q, grad_out, lse, delta and the strides of the first two; keys: k and v with their strides; bounds: place's
    but for i.
    """
    q_ptr, grad_out_ptr, lse_ptr, delta_ptr, q_row, grad_row = queries
    k_ptr, v_ptr, k_row, v_row = keys
    d, dv = columns
    lq, lk, lower, upper, offset = bounds
    for first in range(begin, end, M):
        first = tl.multiple_of(first, M)
        i = first + tl.arange(0, M)
        q = load_rows(q_ptr, q_row, first, lq, d, M, D, False)
        grad_out = load_rows(grad_out_ptr, grad_row, first, lq, dv, M, DV, False)
        lse = tl.load(lse_ptr + i, mask=i < lq, other=float("inf"))  # rows that do not exist weigh nothing
        delta = tl.load(delta_ptr + i, mask=i < lq, other=0.0)
        q_side, grad_side = (q_ptr, q_row, first, lq, d), (grad_out_ptr, grad_row, first, lq, dv)
        if CHUNK == D:
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            products = row_products(q, q_side, (k_ptr, k_row, lk), start, M, N, D, CHUNK, False, PRECISION)
        if CHUNK_V == DV:
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        else:
            grad_weights = row_products(
                grad_out, grad_side, (v_ptr, v_row, lk), start, M, N, DV, CHUNK_V, False, PRECISION
            )
        weights, gradient = gradients_of(
            products, grad_weights, lse, delta, start, (i, lq, lk, lower, upper, offset), scoring, dropping,
            grad_weights_ptr, keep_factor, N, SOFTCAP, ALIBI, LEFT, RIGHT, BOUNDED, False,
        )  # fmt: skip
        grad_v = tl.dot(tl.trans(weights.to(q.dtype)), grad_out, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(gradient.to(q.dtype)), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def attention_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr,  # [B, Hq, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv], [B, Hq, Lq, Dv]
    lse_ptr, delta_ptr,  # [B, Hq, Lq]
    grad_k_ptr, grad_v_ptr,  # as k and v
    mask_ptr, slopes_ptr, seed_ptr, grad_weights_ptr,  # the last None or [B, Hq, Lq, Lk]
    starts_q_ptr, starts_k_ptr, map_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    gk_batch, gk_head, gk_row, gv_batch, gv_head, gv_row,
    mask_batch, mask_head, mask_i, mask_j, slopes_batch, slopes_head,
    heads, groups, lq, lk, d, dv, left, right, offset, scale, factor, cap, threshold, keep_factor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
):  # fmt: skip
    batch, kv_head, start = place_of(tl.program_id(0), map_ptr, lk, N, heads // groups)
    if batch < 0:
        return
    start = tl.multiple_of(start, N)
    begin_q, length_q = rows_of(starts_q_ptr, lq, batch)
    begin_k, length_k = rows_of(starts_k_ptr, lk, batch)
    lower, upper, offset = window_of(length_q, length_k, left, right, offset, BOTTOM_RIGHT)
    memory = batch.to(tl.int64) if starts_q_ptr is None else batch.to(tl.int64) * 0
    row_q, row_k = begin_q.to(tl.int64), begin_k.to(tl.int64)
    k_ptr += memory * k_batch + kv_head * k_head + row_k * k_row
    v_ptr += memory * v_batch + kv_head * v_head + row_k * v_row
    k = load_rows(k_ptr, k_row, start, length_k, d, N, CHUNK, False)  # used where they are whole
    v = load_rows(v_ptr, v_row, start, length_k, dv, N, CHUNK_V, False)
    keys, columns, bounds = (k_ptr, v_ptr, k_row, v_row), (d, dv), (length_q, length_k, lower, upper, offset)

    ALIBI: tl.constexpr = slopes_ptr is not None
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or seed_ptr is not None or mask_ptr is not None)
    last = tl.minimum(start + N, length_k) - 1
    begin, end = length_q * 0, length_q
    full, stop = length_q * 0, length_q
    if RIGHT:
        begin = tl.minimum(tl.maximum(start - upper + 1, 0), length_q) // M * M
        full = tl.cdiv(tl.minimum(tl.maximum(last - upper + 1, 0), length_q), M) * M
    if LEFT:
        end = tl.minimum(tl.maximum(last - lower + 1, 0), length_q)
        stop = tl.minimum(tl.maximum(start - lower + 1, 0), length_q) // M * M
    full = tl.maximum(full, begin) if PLAIN else begin
    stop = tl.maximum(stop, full) if PLAIN else begin
    grad_k = tl.zeros((N, D), tl.float32)
    grad_v = tl.zeros((N, DV), tl.float32)
    for member in range(0, groups):
        head = kv_head * groups + member
        wide = head.to(tl.int64)
        rows = (memory * heads + wide) * lq + row_q
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + batch * slopes_batch + head * slopes_head) * LOG2_E
        q_base = q_ptr + memory * q_batch + wide * q_head + row_q * q_row
        grad_base = grad_out_ptr + memory * grad_batch + wide * grad_head + row_q * grad_row
        weights_base = grad_weights_ptr
        if grad_weights_ptr is not None:
            weights_base = grad_weights_ptr + rows * lk
        queries = (q_base, grad_base, lse_ptr + rows, delta_ptr + rows, q_row, grad_row)
        mask_at = memory * mask_batch + wide * mask_head
        scoring = (factor, cap, None if mask_ptr is None else mask_ptr + mask_at, mask_i, mask_j, slope)
        dropping = (seed_ptr, batch, head, threshold)
        if RIGHT and PLAIN:
            grad_k, grad_v = _keys_tiles(
                grad_k, grad_v, k, v, begin, tl.minimum(full, end), start, queries, keys, columns, bounds, scoring,
                dropping, weights_base, keep_factor,
                M, N, D, DV, CHUNK, CHUNK_V, PRECISION, SOFTCAP, ALIBI, LEFT, RIGHT, True,
            )  # fmt: skip
        if PLAIN:
            grad_k, grad_v = _keys_tiles(
                grad_k, grad_v, k, v, full, stop, start, queries, keys, columns, bounds, scoring,
                dropping, weights_base, keep_factor,
                M, N, D, DV, CHUNK, CHUNK_V, PRECISION, SOFTCAP, ALIBI, LEFT, RIGHT, False,
            )  # fmt: skip
        if LEFT or not PLAIN:
            grad_k, grad_v = _keys_tiles(
                grad_k, grad_v, k, v, stop, end, start, queries, keys, columns, bounds, scoring,
                dropping, weights_base, keep_factor,
                M, N, D, DV, CHUNK, CHUNK_V, PRECISION, SOFTCAP, ALIBI, LEFT, RIGHT, True,
            )  # fmt: skip
    store_rows(grad_k_ptr + memory * gk_batch + kv_head * gk_head + row_k * gk_row, gk_row, grad_k * scale,
               start, length_k, d, N, D)  # fmt: skip
    store_rows(grad_v_ptr + memory * gv_batch + kv_head * gv_head + row_k * gv_row, gv_row, grad_v,
               start, length_k, dv, N, DV)  # fmt: skip


@triton.jit
def store_rows(ptr, stride, tile, start, rows, width, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Stores a [SIZE, WIDTH] tile as contiguous rows from `start`."""
    n = start + tl.arange(0, SIZE)
    d = tl.arange(0, WIDTH)
    at = ptr + n.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(n < rows)[:, None] & (d < width)[None, :])


@triton.jit
def _queries_tiles(
    grad_q, q, grad_out, begin, end, lse, delta, q_side, grad_side, keys, place, scoring, dropping, grad_weights_ptr,
    keep_factor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds the keys [begin, end), in tiles of N, to the gradient of a tile of queries."""
    k_ptr, v_ptr, k_row, v_row = keys
    lk, d = place[2], q_side[4]
    for start in range(begin, end, N):
        start = tl.multiple_of(start, N)
        products = row_products(q, q_side, (k_ptr, k_row, lk), start, M, N, D, CHUNK, not BOUNDED, PRECISION)
        grad_weights = row_products(
            grad_out, grad_side, (v_ptr, v_row, lk), start, M, N, DV, CHUNK_V, not BOUNDED, PRECISION
        )
        _, gradient = gradients_of(
            products, grad_weights, lse, delta, start, place, scoring, dropping, grad_weights_ptr, keep_factor,
            N, SOFTCAP, ALIBI, LEFT, RIGHT, BOUNDED, False,
        )  # fmt: skip
        k = load_rows(k_ptr, k_row, start, lk, d, N, D, not BOUNDED)
        grad_q = tl.dot(gradient.to(k.dtype), k, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit
def attention_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    mask_ptr, slopes_ptr, seed_ptr, grad_weights_ptr, starts_q_ptr, starts_k_ptr, map_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    gq_batch, gq_head, gq_row, mask_batch, mask_head, mask_i, mask_j, slopes_batch, slopes_head,
    heads, groups, lq, lk, d, dv, left, right, offset, scale, factor, cap, threshold, keep_factor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
):  # fmt: skip
    batch, head, first = place_of(tl.program_id(0), map_ptr, lq, M, heads)
    if batch < 0:
        return
    begin_q, length_q = rows_of(starts_q_ptr, lq, batch)
    begin_k, length_k = rows_of(starts_k_ptr, lk, batch)
    lower, upper, offset = window_of(length_q, length_k, left, right, offset, BOTTOM_RIGHT)
    memory = batch.to(tl.int64) if starts_q_ptr is None else batch.to(tl.int64) * 0
    row_q, row_k, wide = begin_q.to(tl.int64), begin_k.to(tl.int64), head.to(tl.int64)
    k_ptr += memory * k_batch + (wide // groups) * k_head + row_k * k_row
    v_ptr += memory * v_batch + (wide // groups) * v_head + row_k * v_row
    rows = (memory * heads + wide) * lq + row_q
    if mask_ptr is not None:
        mask_ptr += memory * mask_batch + wide * mask_head
    if grad_weights_ptr is not None:
        grad_weights_ptr += rows * lk
    ALIBI: tl.constexpr = slopes_ptr is not None
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + batch * slopes_batch + head * slopes_head) * LOG2_E

    i = first + tl.arange(0, M)
    q_ptr += memory * q_batch + wide * q_head + row_q * q_row
    q = load_rows(q_ptr, q_row, first, length_q, d, M, CHUNK, False)  # used where they are whole
    grad_out_ptr += memory * grad_batch + wide * grad_head + row_q * grad_row
    grad_out = load_rows(grad_out_ptr, grad_row, first, length_q, dv, M, CHUNK_V, False)
    lse = tl.load(lse_ptr + rows + i, mask=i < length_q, other=float("inf"))
    delta = tl.load(delta_ptr + rows + i, mask=i < length_q, other=0.0)
    begin, end, full, stop = visible_keys(first, M, length_q, length_k, lower, upper, N, LEFT, RIGHT)
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or seed_ptr is not None or mask_ptr is not None)
    full, stop = whole_tiles(begin, end, full, stop, N, PLAIN)
    grad_q = tl.zeros((M, D), tl.float32)
    q_side, grad_side = (q_ptr, q_row, first, length_q, d), (grad_out_ptr, grad_row, first, length_q, dv)
    keys, place = (k_ptr, v_ptr, k_row, v_row), (i, length_q, length_k, lower, upper, offset)
    scoring = (factor, cap, mask_ptr, mask_i, mask_j, slope)
    dropping = (seed_ptr, batch, head, threshold)
    if LEFT and PLAIN:
        grad_q = _queries_tiles(
            grad_q, q, grad_out, begin, tl.minimum(full, end), lse, delta, q_side, grad_side, keys, place, scoring,
            dropping, grad_weights_ptr, keep_factor,
            M, N, D, DV, CHUNK, CHUNK_V, PRECISION, SOFTCAP, ALIBI, LEFT, RIGHT, True,
        )  # fmt: skip
    if PLAIN:
        grad_q = _queries_tiles(
            grad_q, q, grad_out, full, stop, lse, delta, q_side, grad_side, keys, place, scoring,
            dropping, grad_weights_ptr, keep_factor,
            M, N, D, DV, CHUNK, CHUNK_V, PRECISION, SOFTCAP, ALIBI, LEFT, RIGHT, False,
        )  # fmt: skip
    grad_q = _queries_tiles(
        grad_q, q, grad_out, stop, end, lse, delta, q_side, grad_side, keys, place, scoring,
        dropping, grad_weights_ptr, keep_factor,
        M, N, D, DV, CHUNK, CHUNK_V, PRECISION, SOFTCAP, ALIBI, LEFT, RIGHT, True,
    )  # fmt: skip
    grad_q_ptr += memory * gq_batch + wide * gq_head + row_q * gq_row
    store_rows(grad_q_ptr, gq_row, grad_q * scale, first, length_q, d, M, D)


@triton.jit
def attention_backward_mask_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr,
    grad_mask_ptr,  # [parts, mask's B, H and Lq, Lk]: each part sums a share of what the mask is broadcast over
    mask_ptr, slopes_ptr, seed_ptr, grad_weights_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    mask_batch, mask_head, mask_i, mask_j, slopes_batch, slopes_head,
    over_batch, over_heads, over_tiles, own_heads, own_tiles, own_rows, each, part_size,
    heads, groups, lq, lk, d, dv, left, right, offset, factor, cap, threshold, keep_factor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr,
    PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    OVER_ROWS: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(lk, N)
    own = tl.program_id(0) // tiles_k  # a tile of rows of the mask
    start = tl.multiple_of(tl.program_id(0) % tiles_k * N, N)
    own_tile, own_head, own_batch = own % own_tiles, own // own_tiles % own_heads, own // own_tiles // own_heads
    lower, upper, offset = window_of(lq, lk, left, right, offset, BOTTOM_RIGHT)
    total = tl.zeros((M, N), tl.float32)
    count = over_batch * over_heads * over_tiles
    begin = tl.program_id(1) * each
    for n in range(begin, tl.minimum(begin + each, count)):
        batch = own_batch + n // over_tiles // over_heads
        head = own_head + n // over_tiles % over_heads
        first = (own_tile + n % over_tiles) * M
        seen = first < lq
        if LEFT:
            seen = seen & (start + N > first + lower)
        if RIGHT:
            seen = seen & (start < first + M - 1 + upper)
        if seen:
            memory, wide = batch.to(tl.int64), head.to(tl.int64)
            rows = (memory * heads + wide) * lq
            slope = 0.0
            if slopes_ptr is not None:
                slope = tl.load(slopes_ptr + batch * slopes_batch + head * slopes_head) * LOG2_E
            weights_base = grad_weights_ptr
            if grad_weights_ptr is not None:
                weights_base = grad_weights_ptr + rows * lk
            i = first + tl.arange(0, M)
            q_side = (q_ptr + memory * q_batch + wide * q_head, q_row, first, lq, d)
            q = load_rows(q_ptr + memory * q_batch + wide * q_head, q_row, first, lq, d, M, CHUNK, False)
            at = grad_out_ptr + memory * grad_batch + wide * grad_head
            grad_out = load_rows(at, grad_row, first, lq, dv, M, CHUNK_V, False)
            k_side = (k_ptr + memory * k_batch + (wide // groups) * k_head, k_row, lk)
            v_side = (v_ptr + memory * v_batch + (wide // groups) * v_head, v_row, lk)
            lse = tl.load(lse_ptr + rows + i, mask=i < lq, other=float("inf"))
            delta = tl.load(delta_ptr + rows + i, mask=i < lq, other=0.0)
            scoring = (factor, cap, mask_ptr + memory * mask_batch + wide * mask_head, mask_i, mask_j, slope)
            grad_side = (at, grad_row, first, lq, dv)
            _, gradient = gradients_of(
                row_products(q, q_side, k_side, start, M, N, D, CHUNK, False, PRECISION),
                row_products(grad_out, grad_side, v_side, start, M, N, DV, CHUNK_V, False, PRECISION),
                lse, delta, start, (i, lq, lk, lower, upper, offset), scoring, (seed_ptr, batch, head, threshold),
                weights_base, keep_factor, N, SOFTCAP, slopes_ptr is not None, LEFT, RIGHT, True, True,
            )  # fmt: skip
            total += gradient
    at = grad_mask_ptr + tl.program_id(1).to(tl.int64) * part_size
    at += (own_batch.to(tl.int64) * own_heads + own_head) * own_rows * lk
    j = start + tl.arange(0, N)
    if OVER_ROWS:
        tl.store(at + j, tl.sum(total, 0).to(grad_mask_ptr.dtype.element_ty), mask=j < lk)
    else:
        i = own_tile * M + tl.arange(0, M)
        inside = (i < own_rows)[:, None] & (j < lk)[None, :]
        tl.store(at + i.to(tl.int64)[:, None] * lk + j[None, :], total.to(grad_mask_ptr.dtype.element_ty), mask=inside)


# ---- from torch ----------------------------------------------------------------------------------------------------


def _grad_mask(like: Tensor, mask: Tensor, batch: int, arguments: dict) -> Tensor:
    """The gradient of an additive mask, of its sizes and dtype."""
    heads, lq, lk = arguments["heads"], arguments["lq"], arguments["lk"]
    own_batch, own_heads, own_rows = mask.shape[:3]
    wide = like.element_size() == 4 or max(arguments["D"], arguments["DV"]) > 128
    tile = {"M": 16 if wide else 32, "N": 64, "num_warps": 8 if wide else 4, "num_stages": 1}
    arguments = {
        **arguments,
        "CHUNK": chunk_of(arguments["d"], like, 32),
        "CHUNK_V": chunk_of(arguments["dv"], like, 32),
    }
    tiles = triton.cdiv(lq, tile["M"])
    own_tiles, over_tiles = (tiles, 1) if own_rows == lq else (1, tiles)
    over_batch, over_heads = batch // own_batch, heads // own_heads
    programs = own_batch * own_heads * own_tiles * triton.cdiv(lk, tile["N"])
    count = over_batch * over_heads * over_tiles
    parts = max(1, min(count, 4 * processors(like) // programs))
    shape = (parts, own_batch, own_heads, own_rows, lk)
    direct = parts == 1 and mask.size(3) == lk
    grad = mask.new_empty(shape, dtype=mask.dtype if direct else torch.float32)
    launch(
        attention_backward_mask_kernel,
        (programs, parts),
        like,
        grad_mask_ptr=grad,
        over_batch=over_batch,
        over_heads=over_heads,
        over_tiles=over_tiles,
        own_heads=own_heads,
        own_tiles=own_tiles,
        own_rows=own_rows,
        OVER_ROWS=own_rows != lq,
        each=triton.cdiv(count, parts),
        part_size=grad[0].numel(),
        **arguments,
        **tile,
    )
    return grad[0] if direct else grad.sum(0).sum_to_size(mask.shape).to(mask.dtype)


def attention_backward(
    grad_out, grad_lse, grad_weights, q, k, v, out, lse, mask, slopes, seed, starts_q, starts_k,
    scale, softcap, left, right, offset, dropout, tf32, bias_gradient, deterministic,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and the mask; see csrc/ops.cpp. Always deterministic."""
    grads = [like_rows(x, *x.shape) for x in (q, k, v)]
    if lse.numel() == 0 or k.size(2) == 0:
        grad_mask = torch.zeros(mask.shape, dtype=mask.dtype, device=q.device) if bias_gradient else q.new_empty(0)
        return (*(grad.zero_() for grad in grads), grad_mask)
    grad_q, grad_k, grad_v = grads
    batch, heads, lq, dv = out.shape
    delta = torch.empty_like(lse)
    launch(
        attention_delta_kernel,
        (triton.cdiv(lse.numel(), 32),),
        q,
        out_ptr=out,
        grad_out_ptr=grad_out,
        grad_lse_ptr=grad_lse,
        delta_ptr=delta,
        **_strides(out, "out"),
        **_strides(grad_out, "grad"),
        heads=heads,
        lq=lq,
        rows=lse.numel(),
        dv=dv,
        ROWS=32,
        DV=width_of(dv),
    )
    d, kv_heads = q.size(3), k.size(1)
    width = max(width_of(d), width_of(dv))
    arguments = {
        **options_of(q, k, mask, slopes, seed, scale, softcap, left, right, offset, dropout, tf32),
        **_strides(v, "v"),
        **_strides(grad_out, "grad"),
        "v_ptr": v,
        "grad_out_ptr": grad_out,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "grad_weights_ptr": grad_weights,
        "dv": dv,
        "D": width_of(d),
        "DV": width_of(dv),
        "CHUNK": chunk_of(d, q),
        "CHUNK_V": chunk_of(dv, q),
    }
    grad_mask = _grad_mask(q, mask, batch, arguments) if bias_gradient else q.new_empty(0)
    sequences = batch if starts_q is None else starts_q.numel() - 1
    arguments |= {"scale": scale, "starts_q_ptr": starts_q, "starts_k_ptr": starts_k}

    def run_keys(tile: dict) -> None:
        map_, tiles = map_of(starts_k, k.size(2), sequences, tile["N"])
        launch(
            attention_backward_keys_kernel,
            (tiles * kv_heads,),
            q,
            grad_k_ptr=grad_k,
            grad_v_ptr=grad_v,
            map_ptr=map_,
            **_strides(grad_k, "gk"),
            **_strides(grad_v, "gv"),
            **arguments,
            **tile,
        )

    def run_queries(tile: dict) -> None:
        map_, tiles = map_of(starts_q, lq, sequences, tile["M"])
        launch(
            attention_backward_queries_kernel,
            (tiles * heads,),
            q,
            grad_q_ptr=grad_q,
            map_ptr=map_,
            **_strides(grad_q, "gq"),
            **arguments,
            **tile,
        )

    with_tile(_TILES_KEYS, q, width, arguments, "backward_keys", run_keys)
    with_tile(_TILES_QUERIES, q, width, arguments, "backward_queries", run_queries)
    return grad_q, grad_k, grad_v, grad_mask

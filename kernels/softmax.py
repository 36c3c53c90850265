"""softmax(x * scale + mask) over one dimension: a row in one pass where it fits a program, else online.

x is seen as [outer, size, inner] with the softmax over the middle; a row is one (outer, inner).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

_TILE = 4096  # elements a program holds at a time, 32 a thread of 4 warps
_WIDEST = 16384  # the longest row that is held whole


@triton.jit
def _offsets(row, sizes1, sizes2, inner, s0, s1, s2, t0, t1, inner1):
    """Where each row of the mask begins: outer of up to 3 strides, inner of up to 2."""
    outer, i = row // inner, row % inner
    at = (outer // (sizes1 * sizes2)) * s0 + (outer // sizes2 % sizes1) * s1 + (outer % sizes2) * s2
    return at + (i // inner1) * t0 + (i % inner1) * t1


@triton.jit
def _scores(x_ptr, mask_ptr, at, mask_at, j, live, inner, mask_stride, scale):
    """A tile's scores in float32, -inf outside the row and where the mask hides."""
    s = tl.load(x_ptr + at[:, None] + j[None, :] * inner, mask=live, other=0.0).to(tl.float32) * scale
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + mask_at[:, None] + j[None, :] * mask_stride, mask=live, other=0)
        if mask_ptr.dtype.element_ty == tl.int8:
            live = live & (mask != 0)
        else:
            s += mask.to(tl.float32)
    return tl.where(live, s, float("-inf"))


@triton.jit
def _exponents(s, largest, masked: tl.constexpr):
    """exp(s - largest) of a tile; a row that a mask hides altogether gives zeros."""
    if masked:
        largest = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.exp(s - largest[:, None])


@triton.jit
def softmax_forward_kernel(
    x_ptr,  # [outer, size, inner]
    y_ptr,  # the same
    mask_ptr,  # None, or of x's elements at any strides: int8 (not 0 takes part) or additive
    rows,
    size,
    inner,
    scale,
    sizes1,
    sizes2,
    inner1,
    s0,
    s1,
    s2,
    t0,
    t1,
    mask_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (row // inner) * size * inner + row % inner
    mask_at = _offsets(row, sizes1, sizes2, inner, s0, s1, s2, t0, t1, inner1)
    masked: tl.constexpr = mask_ptr is not None
    j = tl.arange(0, COLUMNS).to(tl.int64)
    if WHOLE:
        live = (row < rows)[:, None] & (j < size)[None, :]
        s = _scores(x_ptr, mask_ptr, at, mask_at, j, live, inner, mask_stride, scale)
        e = _exponents(s, tl.max(s, 1), masked)
        total = tl.sum(e, 1)
        if masked:
            total = tl.where(total == 0.0, 1.0, total)
        y = e / total[:, None]
        tl.store(y_ptr + at[:, None] + j[None, :] * inner, y.to(y_ptr.dtype.element_ty), mask=live)
    else:
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, size, COLUMNS):
            live = (row < rows)[:, None] & (start + j < size)[None, :]
            s = _scores(x_ptr, mask_ptr, at, mask_at, start + j, live, inner, mask_stride, scale)
            former, largest = largest, tl.maximum(largest, tl.max(s, 1))
            finite = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp(former - finite) + tl.sum(tl.exp(s - finite[:, None]), 1)
        if masked:
            total = tl.where(total == 0.0, 1.0, total)
        for start in range(0, size, COLUMNS):
            live = (row < rows)[:, None] & (start + j < size)[None, :]
            s = _scores(x_ptr, mask_ptr, at, mask_at, start + j, live, inner, mask_stride, scale)
            y = _exponents(s, largest, masked) / total[:, None]
            tl.store(y_ptr + at[:, None] + (start + j)[None, :] * inner, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def softmax_backward_kernel(
    grad_ptr,  # [outer, size, inner]
    y_ptr,  # the same
    grad_x_ptr,  # the same
    rows,
    size,
    inner,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = (row // inner) * size * inner + row % inner
    j = tl.arange(0, COLUMNS).to(tl.int64)
    inside = (row < rows)[:, None]
    if WHOLE:
        live = inside & (j < size)[None, :]
        where = at[:, None] + j[None, :] * inner
        grad = tl.load(grad_ptr + where, mask=live, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + where, mask=live, other=0.0).to(tl.float32)
        grad_x = (grad - tl.sum(grad * y, 1)[:, None]) * y * scale
        tl.store(grad_x_ptr + where, grad_x.to(grad_x_ptr.dtype.element_ty), mask=live)
    else:
        inner_product = tl.zeros((ROWS,), tl.float32)
        for start in range(0, size, COLUMNS):
            live = inside & (start + j < size)[None, :]
            where = at[:, None] + (start + j)[None, :] * inner
            grad = tl.load(grad_ptr + where, mask=live, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + where, mask=live, other=0.0).to(tl.float32)
            inner_product += tl.sum(grad * y, 1)
        for start in range(0, size, COLUMNS):
            live = inside & (start + j < size)[None, :]
            where = at[:, None] + (start + j)[None, :] * inner
            grad = tl.load(grad_ptr + where, mask=live, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + where, mask=live, other=0.0).to(tl.float32)
            grad_x = (grad - inner_product[:, None]) * y * scale
            tl.store(grad_x_ptr + where, grad_x.to(grad_x_ptr.dtype.element_ty), mask=live)


def _coalesced(sizes, strides) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions, neighbours that one stride can walk made one."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = found[-1][0] * size, stride
        else:
            found.append((size, stride))
    return found


def _layout(x: Tensor, dim: int) -> tuple[int, int, int]:
    outer = inner = 1
    for d, size in enumerate(x.shape):
        outer, inner = outer * (size if d < dim else 1), inner * (size if d > dim else 1)
    return outer, x.size(dim), inner


def _tile(rows: int, size: int) -> dict:
    """The tile's constants for rows of `size`."""
    columns = triton.next_power_of_2(size)
    whole = columns <= _WIDEST
    columns = columns if whole else _TILE
    per_program = max(1, min(_TILE // columns, triton.next_power_of_2(rows), 64))
    warps = 4 if columns * per_program <= _TILE else 8
    return {"ROWS": per_program, "COLUMNS": columns, "WHOLE": whole, "num_warps": warps}


def softmax_forward(x: Tensor, mask: Tensor | None, dim: int, scale: float) -> Tensor:
    """softmax(x * scale + mask) over `dim`; x contiguous, the mask of its shape."""
    outer, size, inner = _layout(x, dim)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    before, after, stride = [], [], 0
    if mask is not None:
        mask = mask.view(torch.int8) if mask.dtype == torch.bool else mask
        before = _coalesced(mask.shape[:dim], mask.stride()[:dim])
        after = _coalesced(mask.shape[dim + 1 :], mask.stride()[dim + 1 :])
        if len(before) > 3 or len(after) > 2:
            return softmax_forward(x, mask.contiguous(), dim, scale)
        stride = mask.stride(dim)
    (_, s0), (n1, s1), (n2, s2) = [(1, 0)] * (3 - len(before)) + before
    (_, t0), (m1, t1) = [(1, 0)] * (2 - len(after)) + after
    tile = _tile(outer * inner, size)
    launch(
        softmax_forward_kernel,
        (triton.cdiv(outer * inner, tile["ROWS"]),),
        x,
        x,
        y,
        mask,
        outer * inner,
        size,
        inner,
        scale,
        n1,
        n2,
        m1,
        s0,
        s1,
        s2,
        t0,
        t1,
        stride,
        **tile,
    )
    return y


def softmax_backward(grad: Tensor, y: Tensor, dim: int, scale: float) -> Tensor:
    """The gradient in x, from the result's and the result."""
    outer, size, inner = _layout(y, dim)
    grad_x = torch.empty_like(y)
    if y.numel() == 0:
        return grad_x
    tile = _tile(outer * inner, size)
    grid = (triton.cdiv(outer * inner, tile["ROWS"]),)
    launch(softmax_backward_kernel, grid, y, grad, y, grad_x, outer * inner, size, inner, scale, **tile)
    return grad_x

"""Recurrent layers: the products with x for all steps at once, then the steps one after the other.

Where the state of a block of rows fits one program, that program walks the whole sequence with it (persistent); else
every step is a launch or, with a projection or backwards, a few. Formulas: fastnets/reference/recurrent.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..reference.recurrent import CELLS
from ._launch import launch, precision, processors

_PERSISTENT = 128  # the widest state, H or P, that a program holds
_LSTM, _GRU = CELLS.index("lstm"), CELLS.index("gru")
LSTM, GRU, TANH = tl.constexpr(_LSTM), tl.constexpr(_GRU), tl.constexpr(CELLS.index("rnn_tanh"))
_ROWS = 16  # of a program


@triton.jit
def cell_forward(a0, a1, a2, a3, c, h, CELL: tl.constexpr):
    """The next h and c, and what backward needs of the gates, from these before their activation.

    lstm: i, f, g, o. gru: n's part from x, r, z, n's part from h; becomes n, r, z and that part. Others: a0.
    """
    if CELL == LSTM:
        a0, a1, a2, a3 = tl.sigmoid(a0), tl.sigmoid(a1), libdevice.tanh(a2), tl.sigmoid(a3)
        c = a1 * c + a0 * a2
        h = a3 * libdevice.tanh(c)
    elif CELL == GRU:
        a1, a2 = tl.sigmoid(a1), tl.sigmoid(a2)
        a0 = libdevice.tanh(a0 + a1 * a3)
        h = a0 + a2 * (h - a0)
    elif CELL == TANH:
        h = libdevice.tanh(a0)
    else:
        h = tl.where(a0 < 0.0, 0.0, a0)
    return h, c, a0, a1, a2, a3


@triton.jit
def cell_backward(g0, g1, g2, g3, c, c_before, h, h_before, grad_h, grad_c, CELL: tl.constexpr):
    """The gradients in the gates before their activation, in c before, and grad_h's direct way to h before."""
    direct = 0.0 * grad_h
    if CELL == LSTM:
        squashed = libdevice.tanh(c)
        total = grad_c + grad_h * g3 * (1.0 - squashed * squashed)
        grad_c = total * g1
        d0, d1 = total * g2 * g0 * (1.0 - g0), total * c_before * g1 * (1.0 - g1)
        d2, d3 = total * g0 * (1.0 - g2 * g2), grad_h * squashed * g3 * (1.0 - g3)
    elif CELL == GRU:
        d0 = grad_h * (1.0 - g2) * (1.0 - g0 * g0)
        d1, d2 = d0 * g3 * g1 * (1.0 - g1), grad_h * (h_before - g0) * g2 * (1.0 - g2)
        d3 = d0 * g1
        direct = grad_h * g2
    else:
        d0 = grad_h * (1.0 - h * h) if CELL == TANH else tl.where(h <= 0.0, 0.0, grad_h)
        d1, d2, d3 = d0, d0, d0
    return d0, d1, d2, d3, grad_c, direct


@triton.jit
def load_f32(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def runs_at(row, t, batch, lengths_ptr):
    """Which rows' sequences have a step t."""
    runs = row < batch
    if lengths_ptr is not None:
        runs = runs & (t < tl.load(lengths_ptr + row, mask=runs, other=0))
    return runs


@triton.jit
def product(a, weight_ptr, n, n_size, k, k_size, n_stride, k_stride, PRECISION: tl.constexpr):
    """a [M, K] times a weight's [K, N], read at weight_ptr + n n_stride + k k_stride.

    The state is float32: of a 16-bit weight's it takes two factors, lest rounding adds up from step to step.
    """
    at = weight_ptr + (n * n_stride)[None, :] + (k * k_stride)[:, None]
    weight = tl.load(at, mask=(k < k_size)[:, None] & (n < n_size)[None, :], other=0.0)
    upper = a.to(weight.dtype)
    found = tl.dot(upper, weight, input_precision=PRECISION)
    if weight.dtype != tl.float32:
        found = tl.dot((a - upper.to(tl.float32)).to(weight.dtype), weight, found)
    return found


@triton.jit
def keep_gates(gates_ptr, at, hidden, inside, g0, g1, g2, g3):
    if gates_ptr is not None:
        tl.store(gates_ptr + at, g0, mask=inside)
        tl.store(gates_ptr + at + hidden, g1, mask=inside)
        tl.store(gates_ptr + at + 2 * hidden, g2, mask=inside)
        tl.store(gates_ptr + at + 3 * hidden, g3, mask=inside)


@triton.jit
def recurrent_persistent_kernel(
    inputs_ptr,  # float32 [T, B, G H]: W_ih x and the biases but for gru's n from h
    h0_ptr, c0_ptr, w_hh_ptr, b_n_ptr, w_hr_ptr, lengths_ptr,  # [B, P], [B, H], [G H, P], [H], [P, H], [B]
    y_ptr, h_ptr, c_ptr, gates_ptr, cells_ptr,  # [T, B, P], [B, P], [B, H]; float32 [T, B, 4 H] and [T, B, H]
    steps, batch, hidden, outputs,
    CELL: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    u, p = tl.arange(0, H), tl.arange(0, P)
    units, outs = (row < batch)[:, None] & (u < hidden)[None, :], (row < batch)[:, None] & (p < outputs)[None, :]
    gate = hidden * outputs  # a gate's part of w_hh
    GATES: tl.constexpr = 4 if CELL == LSTM else 3 if CELL == GRU else 1
    h = load_f32(h0_ptr, row[:, None] * outputs + p[None, :], outs)
    c = tl.zeros((M, H), tl.float32)
    if CELL == LSTM:
        c = load_f32(c0_ptr, row[:, None] * hidden + u[None, :], units)
    for s in range(0, steps):
        t = (steps - 1 - s if REVERSE else s).to(tl.int64)
        runs = runs_at(row, t, batch, lengths_ptr)
        here = (t * batch + row)[:, None]
        at = here * (GATES * hidden) + u[None, :]
        a0 = load_f32(inputs_ptr, at, units)
        a1, a2, a3 = a0, a0, a0
        from_h = product(h, w_hh_ptr, u, hidden, p, outputs, outputs, 1, PRECISION)
        if CELL == LSTM:
            a0 += from_h
            a1 = load_f32(inputs_ptr, at + hidden, units)
            a1 += product(h, w_hh_ptr + gate, u, hidden, p, outputs, outputs, 1, PRECISION)
            a2 = load_f32(inputs_ptr, at + 2 * hidden, units)
            a2 += product(h, w_hh_ptr + 2 * gate, u, hidden, p, outputs, outputs, 1, PRECISION)
            a3 = load_f32(inputs_ptr, at + 3 * hidden, units)
            a3 += product(h, w_hh_ptr + 3 * gate, u, hidden, p, outputs, outputs, 1, PRECISION)
        elif CELL == GRU:
            a1 = a0 + from_h
            a2 = load_f32(inputs_ptr, at + hidden, units)
            a2 += product(h, w_hh_ptr + gate, u, hidden, p, outputs, outputs, 1, PRECISION)
            a0 = load_f32(inputs_ptr, at + 2 * hidden, units)
            a3 = product(h, w_hh_ptr + 2 * gate, u, hidden, p, outputs, outputs, 1, PRECISION)
            if b_n_ptr is not None:
                a3 += load_f32(b_n_ptr, u, u < hidden)[None, :]
        else:
            a0 += from_h
        before = h if CELL == GRU else c
        new_h, new_c, g0, g1, g2, g3 = cell_forward(a0, a1, a2, a3, c, before, CELL)
        keep_gates(gates_ptr, here * (4 * hidden) + u[None, :], hidden, units, g0, g1, g2, g3)
        if cells_ptr is not None:
            tl.store(cells_ptr + here * hidden + u[None, :], new_c, mask=units)
        if w_hr_ptr is not None:
            new_h = product(new_h, w_hr_ptr, p, outputs, u, hidden, hidden, 1, PRECISION)
        y = tl.where(runs[:, None], new_h, 0.0)
        tl.store(y_ptr + here * outputs + p[None, :], y.to(y_ptr.dtype.element_ty), mask=outs)
        h = tl.where(runs[:, None], new_h, h)
        if CELL == LSTM:
            c = tl.where(runs[:, None], new_c, c)
    tl.store(h_ptr + row[:, None] * outputs + p[None, :], h.to(h_ptr.dtype.element_ty), mask=outs)
    if CELL == LSTM:
        tl.store(c_ptr + row[:, None] * hidden + u[None, :], c.to(c_ptr.dtype.element_ty), mask=units)


@triton.jit
def recurrent_step_kernel(
    inputs_ptr,  # float32 [B, G H]: this step's
    state_ptr, c_ptr, w_hh_ptr, b_n_ptr, lengths_ptr,  # float32 [B, P], float32 [B, H] in and out
    new_ptr, y_ptr,  # float32 [B, H], the state behind the step, or what is to be projected; y[B, H] or None
    gates_ptr, cells_ptr,  # this step's
    t, batch, hidden, outputs,
    CELL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    u = tl.program_id(1) * N + tl.arange(0, N)
    units = (row < batch)[:, None] & (u < hidden)[None, :]
    gate = hidden * outputs
    GATES: tl.constexpr = 4 if CELL == LSTM else 3 if CELL == GRU else 1
    at = row.to(tl.int64)[:, None] * (GATES * hidden) + u[None, :]
    a0 = load_f32(inputs_ptr, at, units)
    a1, a2, a3 = a0, a0, a0
    if CELL == LSTM:
        a1, a2 = load_f32(inputs_ptr, at + hidden, units), load_f32(inputs_ptr, at + 2 * hidden, units)
        a3 = load_f32(inputs_ptr, at + 3 * hidden, units)
    elif CELL == GRU:
        a2, a0 = load_f32(inputs_ptr, at + hidden, units), load_f32(inputs_ptr, at + 2 * hidden, units)
        a3 = tl.zeros((M, N), tl.float32)
        if b_n_ptr is not None:
            a3 += load_f32(b_n_ptr, u, u < hidden)[None, :]
    for start in range(0, outputs, K):
        k = start + tl.arange(0, K)
        h = load_f32(state_ptr, row[:, None] * outputs + k[None, :], (row < batch)[:, None] & (k < outputs)[None, :])
        part = product(h, w_hh_ptr, u, hidden, k, outputs, outputs, 1, PRECISION)
        if CELL == GRU:
            a1 += part
            a2 += product(h, w_hh_ptr + gate, u, hidden, k, outputs, outputs, 1, PRECISION)
            a3 += product(h, w_hh_ptr + 2 * gate, u, hidden, k, outputs, outputs, 1, PRECISION)
        else:
            a0 += part
            if CELL == LSTM:
                a1 += product(h, w_hh_ptr + gate, u, hidden, k, outputs, outputs, 1, PRECISION)
                a2 += product(h, w_hh_ptr + 2 * gate, u, hidden, k, outputs, outputs, 1, PRECISION)
                a3 += product(h, w_hh_ptr + 3 * gate, u, hidden, k, outputs, outputs, 1, PRECISION)
    own = row[:, None] * hidden + u[None, :]
    runs = runs_at(row, t, batch, lengths_ptr)[:, None]
    c = tl.zeros((M, N), tl.float32)
    if CELL == LSTM:
        c = load_f32(c_ptr, own, units)
    before = c
    if y_ptr is not None:
        before = load_f32(state_ptr, own, units)
    h, new_c, g0, g1, g2, g3 = cell_forward(a0, a1, a2, a3, c, before, CELL)
    keep_gates(gates_ptr, row.to(tl.int64)[:, None] * (4 * hidden) + u[None, :], hidden, units, g0, g1, g2, g3)
    if cells_ptr is not None:
        tl.store(cells_ptr + own, new_c, mask=units)
    if CELL == LSTM:
        tl.store(c_ptr + own, tl.where(runs, new_c, c), mask=units)
    if y_ptr is not None:
        tl.store(y_ptr + own, tl.where(runs, h, 0.0).to(y_ptr.dtype.element_ty), mask=units)
        h = tl.where(runs, h, before)
    tl.store(new_ptr + own, h, mask=units)


@triton.jit
def recurrent_project_kernel(
    new_ptr, w_hr_ptr, lengths_ptr, state_ptr, y_ptr,  # float32 [B, H], [P, H]; float32 [B, P] in and out, y[B, P]
    t, batch, hidden, outputs,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    p = tl.program_id(1) * N + tl.arange(0, N)
    h = tl.zeros((M, N), tl.float32)
    for start in range(0, hidden, K):
        k = start + tl.arange(0, K)
        new = load_f32(new_ptr, row[:, None] * hidden + k[None, :], (row < batch)[:, None] & (k < hidden)[None, :])
        h += product(new, w_hr_ptr, p, outputs, k, hidden, hidden, 1, PRECISION)
    outs = (row < batch)[:, None] & (p < outputs)[None, :]
    at = row[:, None] * outputs + p[None, :]
    runs = runs_at(row, t, batch, lengths_ptr)[:, None]
    tl.store(y_ptr + at, tl.where(runs, h, 0.0).to(y_ptr.dtype.element_ty), mask=outs)
    tl.store(state_ptr + at, tl.where(runs, h, load_f32(state_ptr, at, outs)), mask=outs)


@triton.jit
def recurrent_backward_cell_kernel(
    grad_hidden_ptr,  # float32 [B, H]: of the cell's output, all but y's part where that is `grad_y`
    grad_y_ptr, grad_c_ptr,  # [B, H] or None; float32 [B, H] in and out
    gates_ptr, cells_ptr, c_before_ptr, y_ptr, h_before_ptr,  # this step's, and the states before it
    lengths_ptr, dx_ptr, dh_ptr,  # [B, G H]: the gradients in the gates' parts from x and, for gru, from h
    direct_ptr,  # float32 [B, H] or None: grad_h's direct way
    t, batch, hidden,
    CELL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    u = tl.program_id(1) * N + tl.arange(0, N)
    units = (row < batch)[:, None] & (u < hidden)[None, :]
    own = row[:, None] * hidden + u[None, :]
    runs = runs_at(row, t, batch, lengths_ptr)[:, None]
    grad_h = load_f32(grad_hidden_ptr, own, units)
    if grad_y_ptr is not None:
        grad_h += load_f32(grad_y_ptr, own, units)
    GATES: tl.constexpr = 4 if CELL == LSTM else 3 if CELL == GRU else 1
    g0, g1, g2, g3 = grad_h, grad_h, grad_h, grad_h  # what a cell does not have is not looked at
    c, c_before, h, h_before, grad_c = grad_h, grad_h, grad_h, grad_h, grad_h
    at = row.to(tl.int64)[:, None] * (4 * hidden) + u[None, :]
    if gates_ptr is not None:
        g0, g1 = load_f32(gates_ptr, at, units), load_f32(gates_ptr, at + hidden, units)
        g2, g3 = load_f32(gates_ptr, at + 2 * hidden, units), load_f32(gates_ptr, at + 3 * hidden, units)
    if CELL == LSTM:
        c, c_before = load_f32(cells_ptr, own, units), load_f32(c_before_ptr, own, units)
        grad_c = load_f32(grad_c_ptr, own, units)
    elif CELL == GRU:
        h_before = load_f32(h_before_ptr, own, units)
    else:
        h = load_f32(y_ptr, own, units)
    d0, d1, d2, d3, new_c, direct = cell_backward(g0, g1, g2, g3, c, c_before, h, h_before, grad_h, grad_c, CELL)
    at = row.to(tl.int64)[:, None] * (GATES * hidden) + u[None, :]
    kind = dx_ptr.dtype.element_ty
    if CELL == LSTM:
        tl.store(grad_c_ptr + own, tl.where(runs, new_c, grad_c), mask=units)
        tl.store(dx_ptr + at, tl.where(runs, d0, 0.0).to(kind), mask=units)
        tl.store(dx_ptr + at + hidden, tl.where(runs, d1, 0.0).to(kind), mask=units)
        tl.store(dx_ptr + at + 2 * hidden, tl.where(runs, d2, 0.0).to(kind), mask=units)
        tl.store(dx_ptr + at + 3 * hidden, tl.where(runs, d3, 0.0).to(kind), mask=units)
    elif CELL == GRU:
        d1, d2 = tl.where(runs, d1, 0.0).to(kind), tl.where(runs, d2, 0.0).to(kind)
        tl.store(dx_ptr + at, d1, mask=units)
        tl.store(dx_ptr + at + hidden, d2, mask=units)
        tl.store(dx_ptr + at + 2 * hidden, tl.where(runs, d0, 0.0).to(kind), mask=units)
        tl.store(dh_ptr + at, d1, mask=units)
        tl.store(dh_ptr + at + hidden, d2, mask=units)
        tl.store(dh_ptr + at + 2 * hidden, tl.where(runs, d3, 0.0).to(kind), mask=units)
        tl.store(direct_ptr + own, direct, mask=units)
    else:
        tl.store(dx_ptr + at, tl.where(runs, d0, 0.0).to(kind), mask=units)


@triton.jit
def recurrent_backward_state_kernel(
    grad_ptr, w_ptr, direct_ptr, lengths_ptr,  # [B, K]; the weight [K, N] by strides; float32 [B, N] or None; [B]
    carry_ptr,  # float32 [B, N] in and out: rows that do not run keep theirs
    t, batch, depth, columns, w_k, w_n,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        k = start + tl.arange(0, K)
        inside = (row < batch)[:, None] & (k < depth)[None, :]
        grad = load_f32(grad_ptr, row.to(tl.int64)[:, None] * depth + k[None, :], inside)
        acc += product(grad, w_ptr, n, columns, k, depth, w_n, w_k, PRECISION)
    inside = (row < batch)[:, None] & (n < columns)[None, :]
    at = row[:, None] * columns + n[None, :]
    if direct_ptr is not None:
        acc += load_f32(direct_ptr, at, inside)
    runs = runs_at(row, t, batch, lengths_ptr)[:, None]
    tl.store(carry_ptr + at, tl.where(runs, acc, load_f32(carry_ptr, at, inside)), mask=inside)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, bias_ptr, other_bias_ptr,  # [M, K] and [K, N] by strides; [N] or None
    c_ptr,  # [parts, M, N]: each part sums a share of K
    rows, columns, depth, each, biased,  # other_bias counts for the first `biased` columns
    a_m, a_k, b_k, b_n,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, N)
    m = (tl.program_id(0) // tiles).to(tl.int64) * M + tl.arange(0, M)
    n = tl.program_id(0) % tiles * N + tl.arange(0, N)
    part = tl.program_id(1).to(tl.int64)
    begin = part * each
    kind = b_ptr.dtype.element_ty
    acc = tl.zeros((M, N), tl.float32)
    for start in range(begin, tl.minimum(begin + each, depth), K):
        k = start + tl.arange(0, K)
        a = tl.load(a_ptr + m[:, None] * a_m + (k * a_k)[None, :], mask=(m < rows)[:, None] & (k < depth)[None, :],
                    other=0.0)  # fmt: skip
        b = tl.load(b_ptr + (k * b_k)[:, None] + (n * b_n)[None, :], mask=(k < depth)[:, None] & (n < columns)[None, :],
                    other=0.0)  # fmt: skip
        acc = tl.dot(a.to(kind), b, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += load_f32(bias_ptr, n, n < columns)[None, :]
    if other_bias_ptr is not None:
        acc += load_f32(other_bias_ptr, n, n < biased)[None, :]
    at = (part * rows + m)[:, None] * columns + n[None, :]
    tl.store(c_ptr + at, acc.to(c_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


# ---- from torch ----------------------------------------------------------------------------------------------------


def _matmul(a: Tensor, b: Tensor, tf32: bool, dtype, bias=None, other=None, biased: int = 0) -> Tensor:
    """a [M, K] @ b [K, N] + biases, summed in float32; b in the type that tl.dot multiplies in."""
    (rows, depth), columns = a.shape, b.size(1)
    tile = {"M": 64, "N": 64, "K": 32 if b.element_size() == 2 else 16, "num_warps": 4, "num_stages": 3}
    programs = triton.cdiv(rows, tile["M"]) * triton.cdiv(columns, tile["N"])
    parts = 1 if bias is not None or other is not None or programs == 0 else 2 * processors(a) // programs
    parts = max(1, min(parts, depth // (8 * tile["K"])))
    each = triton.cdiv(triton.cdiv(depth, parts), tile["K"]) * tile["K"]
    c = a.new_empty((parts, rows, columns), dtype=torch.float32 if parts > 1 else dtype)
    if rows * columns:
        launch(
            matmul_kernel, (programs, parts), a, a, b, bias, other, c, rows, columns, depth, each, biased,
            *a.stride(), *b.stride(), PRECISION=precision(b.dtype, tf32), **tile,
        )  # fmt: skip
    return c[0] if parts == 1 else c.sum(0).to(dtype)


def _times(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _step_tile(width: int, like: Tensor) -> dict[str, int]:
    return {"M": _ROWS, "N": min(32, _width(width)), "K": 32 if like.element_size() == 2 else 16, "num_warps": 4}


def _width(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def recurrent_forward(
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, cell, reverse, tf32, save, *variant
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the last h and c, and with save the gates and lstm's cell states; see csrc/ops.cpp."""
    steps, batch, outputs = x.size(0), x.size(1), h0.size(1)
    hidden = outputs if w_hr is None else w_hr.size(1)
    y, h = x.new_empty((steps, batch, outputs)), torch.empty_like(h0)
    c = x.new_empty(0) if c0 is None else torch.empty_like(c0)
    keeps_cells = save and cell == _LSTM
    keeps_gates = keeps_cells or (save and cell == _GRU)
    gates = x.new_empty((steps, batch, 4 * hidden) if keeps_gates else 0, dtype=torch.float32)
    cells = x.new_empty((steps, batch, hidden) if keeps_cells else 0, dtype=torch.float32)
    if batch == 0:
        return y, h, c, gates, cells
    biased = 2 * hidden if cell == _GRU else w_hh.size(0)  # gru's n takes b_hh behind the reset gate
    b_n = b_hh[2 * hidden :] if cell == _GRU and b_hh is not None else None
    inputs = _matmul(x.flatten(0, 1), w_ih.t(), tf32, torch.float32, b_ih, b_hh, biased)
    shared = {"CELL": cell, "PRECISION": precision(x.dtype, tf32)}
    sizes = {"batch": batch, "hidden": hidden, "outputs": outputs}
    if max(hidden, outputs) <= _PERSISTENT:
        launch(
            recurrent_persistent_kernel, (triton.cdiv(batch, _ROWS),), x,
            inputs, h0, c0, w_hh, b_n, w_hr, lengths, y, h, c if cell == _LSTM else None,
            gates if keeps_gates else None, cells if keeps_cells else None, steps,
            REVERSE=reverse, M=_ROWS, H=_width(hidden), P=_width(outputs), num_warps=4, **sizes, **shared,
        )  # fmt: skip
        return y, h, c, gates, cells
    inputs = inputs.view(steps, batch, w_hh.size(0))
    state, c_state = h0.float(), None if c0 is None else c0.float()
    state = state.clone() if state is h0 else state
    c_state = c_state.clone() if c_state is c0 and c0 is not None else c_state
    new = x.new_empty((batch, hidden), dtype=torch.float32)
    tile = _step_tile(hidden, x)
    for t in _times(steps, reverse):
        launch(
            recurrent_step_kernel, (triton.cdiv(batch, _ROWS), triton.cdiv(hidden, tile["N"])), x,
            inputs[t], state, c_state, w_hh, b_n, lengths, new, y[t] if w_hr is None else None,
            gates[t] if keeps_gates else None, cells[t] if keeps_cells else None, t, **sizes, **shared, **tile,
        )  # fmt: skip
        if w_hr is None:
            state, new = new, state
            continue
        narrow = _step_tile(outputs, x)
        launch(
            recurrent_project_kernel, (triton.cdiv(batch, _ROWS), triton.cdiv(outputs, narrow["N"])), x,
            new, w_hr, lengths, state, y[t], t, PRECISION=shared["PRECISION"], **sizes, **narrow,
        )  # fmt: skip
    return y, h.copy_(state), c if c_state is None else c.copy_(c_state), gates, cells


def _before(first: Tensor, states: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """What each step started from: the step before's, or where a sequence begins the first."""
    first = first.to(states.dtype)[None]
    if not reverse:
        return torch.cat((first, states[:-1]))
    former = torch.cat((states[1:], first))
    if lengths is None:
        return former
    begins = torch.arange(1, states.size(0) + 1, device=states.device)[:, None] >= lengths
    return torch.where(begins[..., None], first, former)


def recurrent_backward(
    grad_y, grad_h, grad_c, x, h0, c0, w_ih, w_hh, w_hr, lengths, y, gates, cells, cell, reverse, tf32, need_x,
    need_weights, *variant,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients in x, h0, c0, w_ih, w_hh, b_ih, b_hh and w_hr; see csrc/ops.cpp."""
    steps, batch, outputs = x.size(0), x.size(1), h0.size(1)
    hidden = outputs if w_hr is None else w_hr.size(1)
    kind, width = x.dtype, w_hh.size(0)
    carry = h0.new_zeros((batch, outputs), dtype=torch.float32)
    carry = carry if grad_h is None else carry.copy_(grad_h)
    carry_c = None if c0 is None else h0.new_zeros((batch, hidden), dtype=torch.float32)
    carry_c = carry_c if grad_c is None else carry_c.copy_(grad_c)
    dx = x.new_empty((steps, batch, width))
    dh = torch.empty_like(dx) if cell == _GRU else dx
    h_before = _before(h0, y, lengths, reverse) if steps else y
    c_before = _before(c0, cells, lengths, reverse) if steps and cell == _LSTM else None
    direct = x.new_empty((batch, hidden), dtype=torch.float32) if cell == _GRU else None
    shared = {"batch": batch, "PRECISION": precision(kind, tf32)}
    projected = torch.empty_like(y) if w_hr is not None else None
    grad_hidden = x.new_zeros((batch, hidden), dtype=torch.float32) if w_hr is not None else carry
    tile, narrow = _step_tile(hidden, x), _step_tile(outputs, x)
    rows = triton.cdiv(batch, _ROWS)
    for t in _times(steps if batch else 0, not reverse):
        own = None if grad_y is None else grad_y[t]
        if w_hr is not None:
            total = carry if own is None else carry + own
            projected[t] = total if lengths is None else total * (lengths > t)[:, None]
            launch(
                recurrent_backward_state_kernel, (rows, triton.cdiv(hidden, tile["N"])), x,
                projected[t], w_hr, None, None, grad_hidden, t,
                depth=outputs, columns=hidden, w_k=hidden, w_n=1, **shared, **tile,
            )  # fmt: skip
            own = None
        launch(
            recurrent_backward_cell_kernel, (rows, triton.cdiv(hidden, tile["N"])), x,
            grad_hidden, own, carry_c, *(s[t] if s is not None and s.numel() else None for s in (gates, cells)),
            None if c_before is None else c_before[t], y[t], h_before[t], lengths, dx[t], dh[t], direct, t,
            batch, hidden, CELL=cell, M=_ROWS, N=tile["N"], num_warps=4,
        )  # fmt: skip
        launch(
            recurrent_backward_state_kernel, (rows, triton.cdiv(outputs, narrow["N"])), x,
            dh[t], w_hh, direct, lengths, carry, t,
            depth=width, columns=outputs, w_k=outputs, w_n=1, **shared, **narrow,
        )  # fmt: skip
    none = x.new_empty(0)
    flat_x, flat_h = dx.flatten(0, 1), dh.flatten(0, 1)
    grads = [none] * 6
    if need_x:
        grads[0] = _matmul(flat_x, w_ih, tf32, kind).view(x.shape)
    if need_weights:
        grads[1] = _matmul(flat_x.t(), x.flatten(0, 1), tf32, kind)
        grads[2] = _matmul(flat_h.t(), h_before.flatten(0, 1), tf32, kind)
        grads[3], grads[4] = (flat.sum(0, dtype=torch.float32).to(kind) for flat in (flat_x, flat_h))
        if w_hr is not None:
            cell_outputs = (gates[..., 3 * hidden :] * cells.tanh()).flatten(0, 1).to(kind)
            grads[5] = _matmul(projected.flatten(0, 1).t(), cell_outputs, tf32, kind)
    found = (
        grads[0], carry.to(kind), none if carry_c is None else carry_c.to(kind), *grads[1:5], grads[5],
    )  # fmt: skip
    returns = torch.ops.fastnets.recurrent_backward.default._schema.returns
    return (*found, *(none for _ in range(len(returns) - len(found))))

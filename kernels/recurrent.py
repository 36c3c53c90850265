"""Recurrent layers: the products with x for all steps at once, then the steps one after the other.

Where the state of a block of rows fits one program, that program walks the whole sequence with it (persistent); else
every step is a launch, with a projection or layer norm two or three. Formulas: fastnets/reference/recurrent.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import layer_norm

from ..reference.recurrent import CELLS, NORM_EPSILON
from ._launch import architecture, launch, precision, processors
from .recurrent_cells import (
    GRU,
    LSTM,
    ROWS,
    Options,
    add_part,
    cell_forward,
    gate_products,
    load_f32,
    load_gates,
    load_or,
    norm_gates,
    product,
    runs_at,
    store_gates,
    sum_products,
    variant_forward,
    width_of,
)
from .tuning import tuned

_PERSISTENT = {
    False: 64,
    True: 32,
}  # the widest state, H or P, that a program holds: of plain cells, of an lstm with options
_LSTM, _GRU = CELLS.index("lstm"), CELLS.index("gru")


@triton.jit
def recurrent_persistent_kernel(
    inputs_ptr,  # float32 [T, B, G H]: W_ih x, normalised where asked, and the biases but for gru's n from h
    h0_ptr, c0_ptr, w_hh_ptr, b_n_ptr, w_hr_ptr, lengths_ptr,  # [B, P], [B, H], [G H, P], [H], [P, H], [B]
    y_ptr, h_ptr, c_ptr, gates_ptr, cells_ptr,  # [T, B, P], [B, P], [B, H]; float32 [T, B, 4 H or 12 H] and [T, B, H]
    norm_ptr, peephole_ptr, keep_ptr, hold_h_ptr, hold_c_ptr,  # a variant's, or None
    keep_scale, zoneout_h, zoneout_c, clip,
    steps, batch, hidden, outputs,
    CELL: tl.constexpr, VARIANT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    u, p = tl.arange(0, H), tl.arange(0, P)
    units, outs = (row < batch)[:, None] & (u < hidden)[None, :], (row < batch)[:, None] & (p < outputs)[None, :]
    gate = hidden * outputs  # a gate's part of w_hh
    GATES: tl.constexpr = 4 if CELL == LSTM else 3 if CELL == GRU else 1
    SAVED: tl.constexpr = 4 if norm_ptr is None else 12
    more = (norm_ptr, peephole_ptr, keep_ptr, hold_c_ptr, keep_scale, zoneout_c, clip)
    h = load_f32(h0_ptr, row[:, None] * outputs + p[None, :], outs)
    c = tl.zeros((M, H), tl.float32)
    if CELL == LSTM:
        c = load_f32(c0_ptr, row[:, None] * hidden + u[None, :], units)
    for s in range(0, steps):
        t = (steps - 1 - s if REVERSE else s).to(tl.int64)
        runs = runs_at(row, t, batch, lengths_ptr)[:, None]
        here = (t * batch + row)[:, None]
        at = here * (GATES * hidden) + u[None, :]
        saved = here * (SAVED * hidden) + u[None, :]
        own = here * hidden + u[None, :]
        if CELL == LSTM:
            a0, a1, a2, a3 = load_gates(inputs_ptr, at, hidden, units)
            p0, p1, p2, p3 = gate_products(h, w_hh_ptr, gate, u, hidden, p, outputs, outputs, PRECISION)
            if norm_ptr is None:
                a0, a1, a2, a3 = a0 + p0, a1 + p1, a2 + p2, a3 + p3
            else:
                if gates_ptr is not None:
                    store_gates(gates_ptr, saved + 8 * hidden, hidden, units, p0, p1, p2, p3)
                gain_ptr = norm_ptr + 4 * hidden
                a0, a1, a2, a3 = norm_gates(a0, a1, a2, a3, p0, p1, p2, p3, gain_ptr, u, hidden, units)
        elif CELL == GRU:
            a1 = load_f32(inputs_ptr, at, units)
            a1 += product(h, w_hh_ptr, u, hidden, p, outputs, outputs, 1, PRECISION)
            a2 = load_f32(inputs_ptr, at + hidden, units)
            a2 += product(h, w_hh_ptr + gate, u, hidden, p, outputs, outputs, 1, PRECISION)
            a0 = load_f32(inputs_ptr, at + 2 * hidden, units)
            a3 = product(h, w_hh_ptr + 2 * gate, u, hidden, p, outputs, outputs, 1, PRECISION)
            if b_n_ptr is not None:
                a3 += load_f32(b_n_ptr, u, u < hidden)[None, :]
        else:
            a0 = load_f32(inputs_ptr, at, units)
            a0 += product(h, w_hh_ptr, u, hidden, p, outputs, outputs, 1, PRECISION)
            a1, a2, a3 = a0, a0, a0
        if VARIANT:
            new_h, new_c, g0, g1, g2, g3 = variant_forward(a0, a1, a2, a3, c, more, own, u, hidden, units)
        else:
            before = h if CELL == GRU else c
            new_h, new_c, g0, g1, g2, g3 = cell_forward(a0, a1, a2, a3, c, before, CELL)
        if gates_ptr is not None:
            store_gates(gates_ptr, saved, hidden, units, g0, g1, g2, g3)
        if cells_ptr is not None:
            tl.store(cells_ptr + own, new_c, mask=units)
        if w_hr_ptr is not None:
            new_h = product(new_h, w_hr_ptr, p, outputs, u, hidden, hidden, 1, PRECISION)
        if VARIANT:
            share = load_or(hold_h_ptr, here * outputs + p[None, :], outs, zoneout_h)
            new_h = share * h + (1.0 - share) * new_h
        y = tl.where(runs, new_h, 0.0)
        tl.store(y_ptr + here * outputs + p[None, :], y.to(y_ptr.dtype.element_ty), mask=outs)
        h = tl.where(runs, new_h, h)
        if CELL == LSTM:
            c = tl.where(runs, new_c, c)
    tl.store(h_ptr + row[:, None] * outputs + p[None, :], h.to(h_ptr.dtype.element_ty), mask=outs)
    if CELL == LSTM:
        tl.store(c_ptr + row[:, None] * hidden + u[None, :], c.to(c_ptr.dtype.element_ty), mask=units)


@triton.jit
def finish_step(
    h, new_c, g0, g1, g2, g3, c, row, own, units, runs, hidden,
    c_ptr, cells_ptr, state_ptr, new_ptr, y_ptr, gates_ptr, hold_h_ptr, zoneout_h,
    CELL: tl.constexpr, VARIANT: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """Stores what a step found; without y, h is yet to be projected."""
    if gates_ptr is not None:
        at = row.to(tl.int64)[:, None] * (SAVED * hidden) + own - row[:, None] * hidden
        store_gates(gates_ptr, at, hidden, units, g0, g1, g2, g3)
    if cells_ptr is not None:
        tl.store(cells_ptr + own, new_c, mask=units)
    if CELL == LSTM:
        tl.store(c_ptr + own, tl.where(runs, new_c, c), mask=units)
    if y_ptr is not None:
        before = load_f32(state_ptr, own, units)
        if VARIANT:
            share = load_or(hold_h_ptr, own, units, zoneout_h)
            h = share * before + (1.0 - share) * h
        tl.store(y_ptr + own, tl.where(runs, h, 0.0).to(y_ptr.dtype.element_ty), mask=units)
        h = tl.where(runs, h, before)
    tl.store(new_ptr + own, h, mask=units)


@triton.jit(do_not_specialize=["t"])  # one kernel for every step
def recurrent_step_kernel(
    inputs_ptr,  # float32 [B, G H]: this step's
    state_ptr, c_ptr, w_hh_ptr, b_n_ptr, lengths_ptr,  # float32 [B, P], float32 [B, H] in and out
    new_ptr, y_ptr,  # float32 [B, H], the state behind the step, or what is to be projected; y[B, H] or None
    gates_ptr, cells_ptr,  # this step's
    peephole_ptr, keep_ptr, hold_h_ptr, hold_c_ptr,
    keep_scale, zoneout_h, zoneout_c, clip,
    t, batch, hidden, outputs,
    CELL: tl.constexpr, VARIANT: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
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
        if CELL == LSTM:
            p0, p1, p2, p3 = gate_products(h, w_hh_ptr, gate, u, hidden, k, outputs, outputs, PRECISION)
            a0, a1, a2, a3 = a0 + p0, a1 + p1, a2 + p2, a3 + p3
        elif CELL == GRU:
            a1 += product(h, w_hh_ptr, u, hidden, k, outputs, outputs, 1, PRECISION)
            a2 += product(h, w_hh_ptr + gate, u, hidden, k, outputs, outputs, 1, PRECISION)
            a3 += product(h, w_hh_ptr + 2 * gate, u, hidden, k, outputs, outputs, 1, PRECISION)
        else:
            a0 += product(h, w_hh_ptr, u, hidden, k, outputs, outputs, 1, PRECISION)
    own = row[:, None] * hidden + u[None, :]
    runs = runs_at(row, t, batch, lengths_ptr)[:, None]
    c = tl.zeros((M, N), tl.float32)
    if CELL == LSTM:
        c = load_f32(c_ptr, own, units)
    if VARIANT:
        more = (None, peephole_ptr, keep_ptr, hold_c_ptr, keep_scale, zoneout_c, clip)
        h, new_c, g0, g1, g2, g3 = variant_forward(a0, a1, a2, a3, c, more, own, u, hidden, units)
    else:
        before = c
        if CELL == GRU:
            before = load_f32(state_ptr, own, units)
        h, new_c, g0, g1, g2, g3 = cell_forward(a0, a1, a2, a3, c, before, CELL)
    finish_step(
        h, new_c, g0, g1, g2, g3, c, row, own, units, runs, hidden,
        c_ptr, cells_ptr, state_ptr, new_ptr, y_ptr, gates_ptr, hold_h_ptr, zoneout_h, CELL, VARIANT, 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["t"])
def recurrent_norm_kernel(
    inputs_ptr, products_ptr,  # float32 [B, 4 H]: this step's from x, normalised and with the biases; those from h
    state_ptr, c_ptr, lengths_ptr, new_ptr, y_ptr, gates_ptr, cells_ptr,  # as recurrent_step_kernel's
    norm_ptr, peephole_ptr, keep_ptr, hold_h_ptr, hold_c_ptr, keep_scale, zoneout_h, zoneout_c, clip,
    t, batch, hidden,
    H: tl.constexpr,
):  # fmt: skip
    """A step of an lstm with layer norm behind its products: a program a row of the batch."""
    row = tl.program_id(0) + tl.arange(0, 1)
    u = tl.arange(0, H)
    units = (row < batch)[:, None] & (u < hidden)[None, :]
    at = row.to(tl.int64)[:, None] * (4 * hidden) + u[None, :]
    own = row[:, None] * hidden + u[None, :]
    a0, a1, a2, a3 = load_gates(inputs_ptr, at, hidden, units)
    p0, p1, p2, p3 = load_gates(products_ptr, at, hidden, units)
    if gates_ptr is not None:
        saved = row.to(tl.int64)[:, None] * (12 * hidden) + 8 * hidden + u[None, :]
        store_gates(gates_ptr, saved, hidden, units, p0, p1, p2, p3)
    a0, a1, a2, a3 = norm_gates(a0, a1, a2, a3, p0, p1, p2, p3, norm_ptr + 4 * hidden, u, hidden, units)
    c = load_f32(c_ptr, own, units)
    more = (norm_ptr, peephole_ptr, keep_ptr, hold_c_ptr, keep_scale, zoneout_c, clip)
    h, new_c, g0, g1, g2, g3 = variant_forward(a0, a1, a2, a3, c, more, own, u, hidden, units)
    runs = runs_at(row, t, batch, lengths_ptr)[:, None]
    finish_step(
        h, new_c, g0, g1, g2, g3, c, row, own, units, runs, hidden,
        c_ptr, cells_ptr, state_ptr, new_ptr, y_ptr, gates_ptr, hold_h_ptr, zoneout_h, LSTM, True, 12,
    )  # fmt: skip


@triton.jit(do_not_specialize=["t"])
def recurrent_project_kernel(
    new_ptr, w_hr_ptr, lengths_ptr, state_ptr, y_ptr,  # float32 [B, H], [P, H]; float32 [B, P] in and out, y[B, P]
    hold_h_ptr, zoneout_h,  # [B, P] or None
    t, batch, hidden, outputs,
    VARIANT: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    p = tl.program_id(1) * N + tl.arange(0, N)
    h = sum_products(new_ptr, w_hr_ptr, row, batch, p, outputs, hidden, hidden, 1, PRECISION, K)
    outs = (row < batch)[:, None] & (p < outputs)[None, :]
    at = row[:, None] * outputs + p[None, :]
    before = load_f32(state_ptr, at, outs)
    if VARIANT:
        share = load_or(hold_h_ptr, at, outs, zoneout_h)
        h = share * before + (1.0 - share) * h
    runs = runs_at(row, t, batch, lengths_ptr)[:, None]
    tl.store(y_ptr + at, tl.where(runs, h, 0.0).to(y_ptr.dtype.element_ty), mask=outs)
    tl.store(state_ptr + at, tl.where(runs, h, before), mask=outs)


@triton.jit
def recurrent_product_kernel(
    a_ptr, w_ptr, result_ptr,  # [B, K], the weight [K, N] by strides, float32 [B, N]
    batch, depth, columns, w_k, w_n,
    ADD: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A product by itself; ADD: to what is there."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    acc = sum_products(a_ptr, w_ptr, row, batch, n, columns, depth, w_n, w_k, PRECISION, K)
    inside = (row < batch)[:, None] & (n < columns)[None, :]
    at = row[:, None] * columns + n[None, :]
    if ADD:
        acc += load_f32(result_ptr, at, inside)
    tl.store(result_ptr + at, acc, mask=inside)


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
    lost = acc
    for start in range(begin, tl.minimum(begin + each, depth), K):
        k = start + tl.arange(0, K)
        a = tl.load(a_ptr + m[:, None] * a_m + (k * a_k)[None, :], mask=(m < rows)[:, None] & (k < depth)[None, :],
                    other=0.0)  # fmt: skip
        b = tl.load(b_ptr + (k * b_k)[:, None] + (n * b_n)[None, :], mask=(k < depth)[:, None] & (n < columns)[None, :],
                    other=0.0)  # fmt: skip
        if PRECISION == "tf32x3":
            acc, lost = add_part(acc, lost, tl.dot(a.to(kind), b, input_precision=PRECISION))
        else:
            acc = tl.dot(a.to(kind), b, acc, input_precision=PRECISION)
    if PRECISION == "tf32x3":
        acc += lost
    if bias_ptr is not None:
        acc += load_f32(bias_ptr, n, n < columns)[None, :]
    if other_bias_ptr is not None:
        acc += load_f32(other_bias_ptr, n, n < biased)[None, :]
    at = (part * rows + m)[:, None] * columns + n[None, :]
    tl.store(c_ptr + at, acc.to(c_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


# ---- from torch ----------------------------------------------------------------------------------------------------


def matmul(a: Tensor, b: Tensor, tf32: bool, dtype, bias=None, other=None, biased: int = 0) -> Tensor:
    """a [M, K] @ b [K, N] + biases, summed in float32; b in the type that tl.dot multiplies in."""
    (rows, depth), columns = a.shape, b.size(1)
    warps = 8 if architecture(b) >= 10 else 4  # 4 spill there
    tile = {"M": 64, "N": 64, "K": 32 if b.element_size() == 2 else 16, "num_warps": warps, "num_stages": 3}
    multiplies = precision(b.dtype, tf32)

    def run(tile: dict) -> Tensor:
        programs = triton.cdiv(rows, tile["M"]) * triton.cdiv(columns, tile["N"])
        parts = 1 if bias is not None or other is not None or programs == 0 else 2 * processors(a) // programs
        parts = max(1, min(parts, depth // (8 * tile["K"])))
        each = triton.cdiv(triton.cdiv(depth, parts), tile["K"]) * tile["K"]
        c = a.new_empty((parts, rows, columns), dtype=torch.float32 if parts > 1 else dtype)
        if rows * columns:
            launch(
                matmul_kernel, (programs, parts), a, a, b, bias, other, c, rows, columns, depth, each, biased,
                *a.stride(), *b.stride(), PRECISION=multiplies, **tile,
            )  # fmt: skip
        return c[0] if parts == 1 else c.sum(0).to(dtype)

    exact = *(stride == 1 for stride in (*a.stride(), *b.stride())), multiplies
    return run(tuned("matmul", b, (rows, columns, depth), exact, tile, run))


def times(steps: int, reverse: bool) -> range:
    """The steps in the order of their computation."""
    return range(steps - 1, -1, -1) if reverse else range(steps)


def step_tile(width: int, like: Tensor) -> dict[str, int]:
    """The tile of a step's products."""
    stages = 2 if architecture(like) == 10 else 3  # 3 spill there
    depth = 32 if like.element_size() == 2 else 16
    return {"M": ROWS, "N": min(32, width_of(width)), "K": depth, "num_warps": 4, "num_stages": stages}


def row_warps(width: int) -> int:
    """Warps of a program that holds whole rows."""
    return 4 if width <= 1024 else 8 if width <= 4096 else 16


def persistent_tile(hidden: int, outputs: int, options: Options, like: Tensor) -> dict[str, int] | None:
    """The tile of a program that holds the whole state, or None where it does not fit."""
    least = 32 if options.varies else 16  # the options' 4 warps of 16 units would spill
    h, p = max(width_of(hidden), least), max(width_of(outputs), least)
    most = _PERSISTENT[options.varies]
    if like.dtype == torch.float32:  # each product is three, whose parts stay in registers from step to step
        most = 0 if options.norm is not None else most // 2 if architecture(like) >= 10 else most
    if max(h, p) > most:
        return None
    warps = max(h, p) // (4 if options.varies else 8)
    # Copies ahead of the steps would fill shared memory.
    return {"M": ROWS, "H": h, "P": p, "num_warps": max(4, warps), "num_stages": 1}


def multiply(a: Tensor, weight: Tensor, result: Tensor, depth: int, w_k: int, w_n: int, tf32: bool, add: bool) -> None:
    """a [B, depth] times a weight by its strides, to or onto result float32 [B, columns]."""
    columns = result.size(1)
    tile = step_tile(columns, weight)
    launch(
        recurrent_product_kernel, (triton.cdiv(result.size(0), ROWS), triton.cdiv(columns, tile["N"])), a,
        a, weight, result, result.size(0), depth, columns, w_k, w_n, ADD=add, PRECISION=precision(weight.dtype, tf32),
        **tile,
    )  # fmt: skip


def recurrent_forward(
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, cell, reverse, tf32, save, *variant
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the last h and c, and with save the gates and lstm's cell states; see csrc/ops.cpp."""
    steps, batch, outputs = x.size(0), x.size(1), h0.size(1)
    hidden = outputs if w_hr is None else w_hr.size(1)
    options = Options.of(variant)
    y, h = x.new_empty((steps, batch, outputs)), torch.empty_like(h0)
    c = x.new_empty(0) if c0 is None else torch.empty_like(c0)
    keeps_cells = save and cell == _LSTM
    keeps_gates = keeps_cells or (save and cell == _GRU)
    saved = 4 * hidden if options.norm is None else 12 * hidden
    gates = x.new_empty((steps, batch, saved) if keeps_gates else 0, dtype=torch.float32)
    cells = x.new_empty((steps, batch, hidden) if keeps_cells else 0, dtype=torch.float32)
    if batch == 0:
        return y, h, c, gates, cells
    if options.norm is None:
        biased = 2 * hidden if cell == _GRU else w_hh.size(0)  # gru's n takes b_hh behind the reset gate
        inputs = matmul(x.flatten(0, 1), w_ih.t(), tf32, torch.float32, b_ih, b_hh, biased)
    else:
        inputs = matmul(x.flatten(0, 1), w_ih.t(), tf32, torch.float32)
        if keeps_gates:
            gates[..., 4 * hidden : 8 * hidden] = inputs.view(steps, batch, 4 * hidden)
        bias = None if b_ih is None else b_ih.float() + b_hh.float()
        inputs = layer_norm(inputs, (4 * hidden,), options.norm[: 4 * hidden].float(), bias, NORM_EPSILON)
    b_n = b_hh[2 * hidden :] if cell == _GRU and b_hh is not None else None
    shared = {"hidden": hidden, "batch": batch, "lengths_ptr": lengths, "peephole_ptr": options.peephole}
    shared |= {"zoneout_h": options.zoneout_h, **options.rates}
    of_cell = {"CELL": cell, "VARIANT": options.varies, "PRECISION": precision(x.dtype, tf32)}
    if (tile := persistent_tile(hidden, outputs, options, x)) is not None:
        launch(
            recurrent_persistent_kernel, (triton.cdiv(batch, ROWS),), x,
            inputs, h0, c0, w_hh, b_n, w_hr, y_ptr=y, h_ptr=h, c_ptr=c if cell == _LSTM else None,
            gates_ptr=gates if keeps_gates else None, cells_ptr=cells if keeps_cells else None, norm_ptr=options.norm,
            steps=steps, outputs=outputs, REVERSE=reverse, **options.masks(), **shared, **of_cell, **tile,
        )  # fmt: skip
        return y, h, c, gates, cells
    inputs = inputs.view(steps, batch, w_hh.size(0))
    state, c_state = h0.float(), None if c0 is None else c0.float()
    state = state.clone() if state is h0 else state
    c_state = c_state.clone() if c_state is c0 and c0 is not None else c_state
    new = x.new_empty((batch, hidden), dtype=torch.float32)
    products = None if options.norm is None else x.new_empty((batch, 4 * hidden), dtype=torch.float32)
    tile = step_tile(hidden, x)
    for t in times(steps, reverse):
        step = {
            **shared, **options.masks(t), "state_ptr": state, "c_ptr": c_state, "new_ptr": new, "t": t,
            "y_ptr": y[t] if w_hr is None else None, "gates_ptr": gates[t] if keeps_gates else None,
            "cells_ptr": cells[t] if keeps_cells else None,
        }  # fmt: skip
        if products is None:
            launch(
                recurrent_step_kernel, (triton.cdiv(batch, ROWS), triton.cdiv(hidden, tile["N"])), x,
                inputs[t], w_hh_ptr=w_hh, b_n_ptr=b_n, outputs=outputs, **step, **of_cell, **tile,
            )  # fmt: skip
        else:
            multiply(state, w_hh, products, outputs, 1, outputs, tf32, False)
            width = width_of(hidden)
            launch(
                recurrent_norm_kernel, (batch,), x,
                inputs[t], products, norm_ptr=options.norm, H=width, num_warps=row_warps(width), **step,
            )  # fmt: skip
        if w_hr is None:
            state, new = new, state
            continue
        narrow = step_tile(outputs, x)
        launch(
            recurrent_project_kernel, (triton.cdiv(batch, ROWS), triton.cdiv(outputs, narrow["N"])), x,
            new, w_hr, lengths, state, y[t], options.masks(t)["hold_h_ptr"], options.zoneout_h, t, batch, hidden,
            outputs, VARIANT=options.varies, PRECISION=of_cell["PRECISION"], **narrow,
        )  # fmt: skip
    return y, h.copy_(state), c if c_state is None else c.copy_(c_state), gates, cells

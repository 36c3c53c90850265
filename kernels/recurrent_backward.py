"""The recurrent layers' gradients: the steps one after the other, from the last, then products for all steps at once.

Where the state of a block of rows fits one program, that program walks the sequence back; else a step is a launch, with
a projection or layer norm one for each product and one for the cell.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import layer_norm
from triton.language.extra import libdevice

from ..reference.recurrent import CELLS, NORM_EPSILON
from ._launch import launch, precision
from .recurrent import matmul, multiply, persistent_tile, row_warps, step_tile, times
from .recurrent_cells import (
    GRU,
    LSTM,
    ROWS,
    TANH,
    Options,
    load_f32,
    load_gates,
    load_or,
    moments,
    normalise_gates,
    product,
    row_sum,
    runs_at,
    store_gates,
    sum_products,
    variant_factors,
    variant_state,
    width_of,
)

_LSTM, _GRU = CELLS.index("lstm"), CELLS.index("gru")


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
def variant_backward(g0, g1, g2, g3, c_before, grad_h, grad_c, more, at, u, hidden, inside):
    """As cell_backward, of an lstm with options (`more`: recurrent_cells.py); last, the gradient in what tanh saw."""
    norm_ptr, _, _, _, _, _, clip = more
    keep, hold, of_i, of_f, of_o = variant_factors(more, at, u, hidden, inside)
    whole, made = variant_state(g0, g1, g2, c_before, keep, clip)
    seen = made
    if norm_ptr is not None:
        known = (u < hidden)[None, :]
        mean, scale = moments(made, inside, hidden)
        unit = (made - mean) * scale
        gain = load_f32(norm_ptr, u[None, :] + 8 * hidden, known)
        seen = gain * unit + load_f32(norm_ptr, u[None, :] + 9 * hidden, known)
    squashed = libdevice.tanh(seen)
    d3 = grad_h * squashed * g3 * (1.0 - g3)
    grad_seen = grad_h * g3 * (1.0 - squashed * squashed)
    grad_made = grad_seen
    if norm_ptr is not None:
        grad_unit = gain * grad_seen
        along = row_sum(grad_unit * unit, inside) / hidden
        grad_made = scale * (grad_unit - row_sum(grad_unit, inside) / hidden - unit * along)
    total = grad_made + (1.0 - hold) * grad_c + d3 * of_o
    total = tl.where(tl.abs(whole) > clip, 0.0, total)  # clamp's gradient
    d0, d1 = total * g2 * keep * g0 * (1.0 - g0), total * c_before * g1 * (1.0 - g1)
    d2 = total * g0 * keep * (1.0 - g2 * g2)
    return d0, d1, d2, d3, hold * grad_c + total * g1 + d0 * of_i + d1 * of_f, grad_seen


@triton.jit
def products_backward(d0, d1, d2, d3, p0, p1, p2, p3, gain_ptr, u, hidden, inside):
    """The gradients in the products with h, from those in the gates that they were normalised for."""
    n0, n1, n2, n3, scale = normalise_gates(p0, p1, p2, p3, inside, hidden)
    k0, k1, k2, k3 = load_gates(gain_ptr, u[None, :], hidden, (u < hidden)[None, :])
    k0, k1, k2, k3 = k0 * d0, k1 * d1, k2 * d2, k3 * d3
    count = 4 * hidden
    mean = (row_sum(k0, inside) + row_sum(k1, inside) + row_sum(k2, inside) + row_sum(k3, inside)) / count
    along = row_sum(k0 * n0, inside) + row_sum(k1 * n1, inside) + row_sum(k2 * n2, inside) + row_sum(k3 * n3, inside)
    along /= count
    k0, k1 = scale * (k0 - mean - n0 * along), scale * (k1 - mean - n1 * along)
    return k0, k1, scale * (k2 - mean - n2 * along), scale * (k3 - mean - n3 * along)


@triton.jit
def gradient_arrives(carry, grad_y_ptr, at, inside, runs, hold_h_ptr, zoneout_h, VARIANT: tl.constexpr):
    """What goes on into the step, and what goes past it, of the gradient in the state behind it."""
    total = carry + load_or(grad_y_ptr, at, inside, 0.0)
    past = 0.0 * total
    if VARIANT:
        past = load_or(hold_h_ptr, at, inside, zoneout_h) * total
    return tl.where(runs, total - past, 0.0), tl.where(runs, past, carry)


@triton.jit
def step_backward(
    grad_h, grad_c, more, gates_ptr, cells_ptr, c_before_ptr, y_ptr, h_before_ptr, dx_ptr, dh_ptr, d_ptr, seen_ptr,
    row, u, runs, units, hidden,
    CELL: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """A step's cell: stores the gradients in its gates, and returns those in the products with h, in c, and in h.

    Pointers and rows: of [B, H] at this step, gates and the gradients in them several H wide.
    """
    own = row[:, None] * hidden + u[None, :]
    GATES: tl.constexpr = 4 if CELL == LSTM else 3 if CELL == GRU else 1
    SAVED: tl.constexpr = 12 if d_ptr is not None else 4
    g0, g1, g2, g3 = grad_h, grad_h, grad_h, grad_h  # what a cell does not have is not looked at
    c, c_before, h, h_before = grad_h, grad_h, grad_h, grad_h
    saved = row[:, None] * (SAVED * hidden) + u[None, :]
    if gates_ptr is not None:
        g0, g1, g2, g3 = load_gates(gates_ptr, saved, hidden, units)
    if CELL == LSTM:
        c_before = load_f32(c_before_ptr, own, units)
        if not VARIANT:
            c = load_f32(cells_ptr, own, units)
    elif CELL == GRU:
        h_before = load_f32(h_before_ptr, own, units)
    else:
        h = load_f32(y_ptr, own, units)
    direct = 0.0 * grad_h
    if VARIANT:
        d0, d1, d2, d3, new_c, seen = variant_backward(
            g0, g1, g2, g3, c_before, grad_h, grad_c, more, own, u, hidden, units
        )
    else:
        d0, d1, d2, d3, new_c, direct = cell_backward(g0, g1, g2, g3, c, c_before, h, h_before, grad_h, grad_c, CELL)
    d0, d1, d2 = tl.where(runs, d0, 0.0), tl.where(runs, d1, 0.0), tl.where(runs, d2, 0.0)
    d3, direct = tl.where(runs, d3, 0.0), tl.where(runs, direct, 0.0)
    at = row[:, None] * (GATES * hidden) + u[None, :]
    kind = dh_ptr.dtype.element_ty
    if CELL == LSTM:
        if d_ptr is not None:  # layer norm: the products have other gradients than the gates
            store_gates(d_ptr, at, hidden, units, d0, d1, d2, d3)
            tl.store(seen_ptr + own, tl.where(runs, seen, 0.0), mask=units)
            p0, p1, p2, p3 = load_gates(gates_ptr, saved + 8 * hidden, hidden, units)
            gain_ptr = more[0] + 4 * hidden
            d0, d1, d2, d3 = products_backward(d0, d1, d2, d3, p0, p1, p2, p3, gain_ptr, u, hidden, units)
        store_gates(dh_ptr, at, hidden, units, d0, d1, d2, d3)
    elif CELL == GRU:
        d1, d2 = d1.to(kind), d2.to(kind)
        tl.store(dx_ptr + at, d1, mask=units)
        tl.store(dx_ptr + at + hidden, d2, mask=units)
        tl.store(dx_ptr + at + 2 * hidden, d0.to(kind), mask=units)
        tl.store(dh_ptr + at, d1, mask=units)
        tl.store(dh_ptr + at + hidden, d2, mask=units)
        tl.store(dh_ptr + at + 2 * hidden, d3.to(kind), mask=units)
        d0, d1, d2 = d1.to(tl.float32), d2.to(tl.float32), d3
    else:
        tl.store(dh_ptr + at, d0.to(kind), mask=units)
    return d0, d1, d2, d3, tl.where(runs, new_c, grad_c), direct


@triton.jit
def recurrent_backward_persistent_kernel(
    grad_y_ptr, carry_ptr, carry_c_ptr,  # [T, B, P] or None; float32 [B, P] and [B, H], in and out
    w_hh_ptr, w_hr_ptr, lengths_ptr,
    gates_ptr, cells_ptr, c_before_ptr, y_ptr, h_before_ptr,  # of all steps, and the states before each
    dx_ptr, dh_ptr,  # [T, B, G H]: the gradients in the gates' parts from x (gru, else None) and from h
    projected_ptr, d_ptr, seen_ptr,  # float32 [T, B, P]: in w_hr's product; [T, B, 4 H], [T, B, H]: with layer norm
    norm_ptr, peephole_ptr, keep_ptr, hold_h_ptr, hold_c_ptr, keep_scale, zoneout_h, zoneout_c, clip,
    steps, batch, hidden, outputs,
    CELL: tl.constexpr, VARIANT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    u, p = tl.arange(0, H), tl.arange(0, P)
    units, outs = (row < batch)[:, None] & (u < hidden)[None, :], (row < batch)[:, None] & (p < outputs)[None, :]
    gate = hidden * outputs
    GATES: tl.constexpr = 4 if CELL == LSTM else 3 if CELL == GRU else 1
    first = row[:, None] * outputs + p[None, :]
    own = row[:, None] * hidden + u[None, :]
    more = (norm_ptr, peephole_ptr, keep_ptr, hold_c_ptr, keep_scale, zoneout_c, clip)
    carry = load_f32(carry_ptr, first, outs)
    carry_c = tl.zeros((M, H), tl.float32)
    if CELL == LSTM:
        carry_c = load_f32(carry_c_ptr, own, units)
    for s in range(0, steps):
        t = (s if REVERSE else steps - 1 - s).to(tl.int64)
        runs = runs_at(row, t, batch, lengths_ptr)[:, None]
        here = t * batch + row
        at = here[:, None] * outputs + p[None, :]
        grad, carry = gradient_arrives(carry, grad_y_ptr, at, outs, runs, hold_h_ptr, zoneout_h, VARIANT)
        if w_hr_ptr is not None:
            tl.store(projected_ptr + at, grad, mask=outs)
            grad = product(grad, w_hr_ptr, u, hidden, p, outputs, 1, hidden, PRECISION)
        d0, d1, d2, d3, carry_c, direct = step_backward(
            grad, carry_c, more, gates_ptr, cells_ptr, c_before_ptr, y_ptr, h_before_ptr, dx_ptr, dh_ptr, d_ptr,
            seen_ptr, here, u, runs, units, hidden, CELL, VARIANT,
        )  # fmt: skip
        carry += product(d0, w_hh_ptr, p, outputs, u, hidden, 1, outputs, PRECISION)
        if GATES > 1:
            carry += product(d1, w_hh_ptr + gate, p, outputs, u, hidden, 1, outputs, PRECISION)
            carry += product(d2, w_hh_ptr + 2 * gate, p, outputs, u, hidden, 1, outputs, PRECISION)
        if CELL == LSTM:
            carry += product(d3, w_hh_ptr + 3 * gate, p, outputs, u, hidden, 1, outputs, PRECISION)
        elif CELL == GRU:
            carry += direct
    tl.store(carry_ptr + first, carry, mask=outs)
    if CELL == LSTM:
        tl.store(carry_c_ptr + own, carry_c, mask=units)


@triton.jit(do_not_specialize=["t"])  # one kernel for every step
def recurrent_backward_step_kernel(
    a_ptr, w_ptr,  # [B, K], the weight [K, H] by strides: what brings this step's gradient
    carry_ptr, grad_y_ptr, carry_c_ptr,  # float32 [B, H] in and out, or None: the product is all; [B, H]; as carry
    gates_ptr, cells_ptr, c_before_ptr, y_ptr, h_before_ptr, lengths_ptr, dx_ptr, dh_ptr,  # this step's
    peephole_ptr, keep_ptr, hold_h_ptr, hold_c_ptr, keep_scale, zoneout_h, zoneout_c, clip,
    t, batch, hidden, depth, w_k, w_n,
    CELL: tl.constexpr, VARIANT: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    u = tl.program_id(1) * N + tl.arange(0, N)
    units = (row < batch)[:, None] & (u < hidden)[None, :]
    own = row[:, None] * hidden + u[None, :]
    runs = runs_at(row, t, batch, lengths_ptr)[:, None]
    grad = sum_products(a_ptr, w_ptr, row, batch, u, hidden, depth, w_n, w_k, PRECISION, K)
    carry = grad
    if carry_ptr is not None:
        carry += load_f32(carry_ptr, own, units)
        grad, carry = gradient_arrives(carry, grad_y_ptr, own, units, runs, hold_h_ptr, zoneout_h, VARIANT)
    carry_c = grad
    if CELL == LSTM:
        carry_c = load_f32(carry_c_ptr, own, units)
    more = (None, peephole_ptr, keep_ptr, hold_c_ptr, keep_scale, zoneout_c, clip)
    _, _, _, _, carry_c, direct = step_backward(
        grad, carry_c, more, gates_ptr, cells_ptr, c_before_ptr, y_ptr, h_before_ptr, dx_ptr, dh_ptr, None, None,
        row.to(tl.int64), u, runs, units, hidden, CELL, VARIANT,
    )  # fmt: skip
    if CELL == LSTM:
        tl.store(carry_c_ptr + own, carry_c, mask=units)
    if carry_ptr is not None:
        tl.store(carry_ptr + own, carry + direct, mask=units)


@triton.jit(do_not_specialize=["t"])
def recurrent_backward_carry_kernel(
    a_ptr, w_ptr,  # [B, K], the weight [K, P] by strides
    carry_ptr, grad_y_ptr, lengths_ptr, grad_ptr,  # float32 [B, P] in and out, [B, P] or None, [B], float32 [B, P]
    hold_h_ptr, zoneout_h,
    t, batch, outputs, depth, w_k, w_n,
    VARIANT: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """How a step's gradient arrives, where the step itself is other launches."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    p = tl.program_id(1) * N + tl.arange(0, N)
    outs = (row < batch)[:, None] & (p < outputs)[None, :]
    at = row[:, None] * outputs + p[None, :]
    carry = sum_products(a_ptr, w_ptr, row, batch, p, outputs, depth, w_n, w_k, PRECISION, K)
    carry += load_f32(carry_ptr, at, outs)
    runs = runs_at(row, t, batch, lengths_ptr)[:, None]
    grad, carry = gradient_arrives(carry, grad_y_ptr, at, outs, runs, hold_h_ptr, zoneout_h, VARIANT)
    tl.store(grad_ptr + at, grad, mask=outs)
    tl.store(carry_ptr + at, carry, mask=outs)


@triton.jit(do_not_specialize=["t"])
def recurrent_backward_norm_kernel(
    grad_ptr, carry_c_ptr, gates_ptr, c_before_ptr, lengths_ptr, dh_ptr, d_ptr, seen_ptr,  # this step's
    norm_ptr, peephole_ptr, keep_ptr, hold_c_ptr, keep_scale, zoneout_c, clip,
    t, batch, hidden,
    H: tl.constexpr,
):  # fmt: skip
    """The cell of an lstm with layer norm: a program a row of the batch."""
    row = tl.program_id(0) + tl.arange(0, 1)
    u = tl.arange(0, H)
    units = (row < batch)[:, None] & (u < hidden)[None, :]
    own = row[:, None] * hidden + u[None, :]
    more = (norm_ptr, peephole_ptr, keep_ptr, hold_c_ptr, keep_scale, zoneout_c, clip)
    _, _, _, _, carry_c, _ = step_backward(
        load_f32(grad_ptr, own, units), load_f32(carry_c_ptr, own, units), more, gates_ptr, None, c_before_ptr, None,
        None, None, dh_ptr, d_ptr, seen_ptr, row.to(tl.int64), u, runs_at(row, t, batch, lengths_ptr)[:, None], units,
        hidden, LSTM, True,
    )  # fmt: skip
    tl.store(carry_c_ptr + own, carry_c, mask=units)


# ---- from torch ----------------------------------------------------------------------------------------------------


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


def _steps(own: dict, options: Options, grad_y, w_hh, w_hr, reverse: bool, tf32: bool, shared: dict) -> None:
    """Every step by launches; `own`: what the persistent kernel works on."""
    carry, dh = own["carry_ptr"], own["dh_ptr"]
    steps, batch, width = dh.shape
    outputs, hidden, rows = carry.size(1), own["hidden"], triton.cdiv(batch, ROWS)
    normed = options.norm is not None
    tile, narrow = step_tile(hidden, w_hh), step_tile(outputs, w_hh)
    grad_hidden = carry.new_empty((batch, hidden)) if normed else None
    depth, former = 0, dh[0]  # nothing comes from behind the last step
    numbers = ("batch", "hidden", "lengths_ptr", "carry_c_ptr", "peephole_ptr")
    of_step = ("gates_ptr", "c_before_ptr", "dh_ptr", "grad_y_ptr")
    for t in times(steps, not reverse):
        masks = options.masks(t)
        here = {name: own[name] for name in numbers} | {name: _at(own[name], t) for name in of_step}
        here |= {"t": t, **options.rates, "keep_ptr": masks["keep_ptr"], "hold_c_ptr": masks["hold_c_ptr"]}
        arrives = {"hold_h_ptr": masks["hold_h_ptr"], "zoneout_h": options.zoneout_h}
        a, weight, sizes = former, w_hh, {"depth": depth, "w_k": outputs, "w_n": 1}
        grad_y = here.pop("grad_y_ptr")
        if w_hr is not None or normed:
            grad = own["projected_ptr"][t] if w_hr is not None else grad_hidden
            launch(
                recurrent_backward_carry_kernel, (rows, triton.cdiv(outputs, narrow["N"])), carry,
                a, weight, carry, grad_y, own["lengths_ptr"], grad, t=t, batch=batch, outputs=outputs,
                **arrives, **sizes, VARIANT=shared["VARIANT"], PRECISION=shared["PRECISION"], **narrow,
            )  # fmt: skip
            a, weight, sizes = grad, w_hr, {"depth": outputs, "w_k": hidden, "w_n": 1}
        if normed:
            if w_hr is not None:
                multiply(a, weight, grad_hidden, outputs, hidden, 1, tf32, False)
            whole = width_of(hidden)
            launch(
                recurrent_backward_norm_kernel, (batch,), carry,
                grad_hidden, d_ptr=own["d_ptr"][t], seen_ptr=own["seen_ptr"][t], norm_ptr=options.norm, H=whole,
                num_warps=row_warps(whole), **here,
            )  # fmt: skip
        else:
            launch(
                recurrent_backward_step_kernel, (rows, triton.cdiv(hidden, tile["N"])), carry,
                a, weight, carry if w_hr is None else None, grad_y if w_hr is None else None,
                cells_ptr=_at(own["cells_ptr"], t), y_ptr=own["y_ptr"][t], h_before_ptr=own["h_before_ptr"][t],
                dx_ptr=_at(own["dx_ptr"], t), **arrives, **sizes, **here, **shared, **tile,
            )  # fmt: skip
        depth, former = width, dh[t]
    if steps:
        multiply(former, w_hh, carry, width, outputs, 1, tf32, True)


def _at(tensor: Tensor | None, t: int) -> Tensor | None:
    return None if tensor is None else tensor[t]


def recurrent_backward(
    grad_y, grad_h, grad_c, x, h0, c0, w_ih, w_hh, w_hr, lengths, y, gates, cells, cell, reverse, tf32, need_x,
    need_weights, *variant,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients in x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, peephole and norm; see csrc/ops.cpp."""
    steps, batch, outputs = x.size(0), x.size(1), h0.size(1)
    hidden = outputs if w_hr is None else w_hr.size(1)
    kind, width, options = x.dtype, w_hh.size(0), Options.of(variant)
    normed = options.norm is not None
    carry = h0.new_zeros((batch, outputs), dtype=torch.float32)
    carry = carry if grad_h is None else carry.copy_(grad_h)
    carry_c = None if c0 is None else h0.new_zeros((batch, hidden), dtype=torch.float32)
    carry_c = carry_c if grad_c is None else carry_c.copy_(grad_c)
    h_before = _before(h0, y, lengths, reverse) if steps else y
    c_before = _before(c0, cells, lengths, reverse) if steps and cell == _LSTM else None

    def like_steps(*sizes: int, **kind) -> Tensor:
        return x.new_empty((steps, batch, *sizes), **kind)

    dh = like_steps(width)
    own = {
        "carry_ptr": carry,
        "carry_c_ptr": carry_c,
        "grad_y_ptr": grad_y,
        "lengths_ptr": lengths,
        "gates_ptr": gates if cell in (_LSTM, _GRU) else None,
        "cells_ptr": cells if cell == _LSTM else None,
        "c_before_ptr": c_before,
        "y_ptr": y,
        "h_before_ptr": h_before,
        "dh_ptr": dh,
        "dx_ptr": torch.empty_like(dh) if cell == _GRU else None,
        "projected_ptr": like_steps(outputs, dtype=torch.float32) if w_hr is not None else None,
        "d_ptr": like_steps(width, dtype=torch.float32) if normed else None,
        "seen_ptr": like_steps(hidden, dtype=torch.float32) if normed else None,
        "peephole_ptr": options.peephole,
        "batch": batch,
        "hidden": hidden,
    }
    shared = {"CELL": cell, "VARIANT": options.varies, "PRECISION": precision(kind, tf32)}
    if steps and batch:
        if (tile := persistent_tile(hidden, outputs, options, x)) is not None:
            launch(
                recurrent_backward_persistent_kernel, (triton.cdiv(batch, ROWS),), x,
                w_hh_ptr=w_hh, w_hr_ptr=w_hr, norm_ptr=options.norm, steps=steps, outputs=outputs, REVERSE=reverse,
                zoneout_h=options.zoneout_h, **own, **options.masks(), **options.rates, **shared, **tile,
            )  # fmt: skip
        else:
            _steps(own, options, grad_y, w_hh, w_hr, reverse, tf32, shared)

    none = x.new_empty(0)
    grads = [none] * 8  # x, w_ih, w_hh, b_ih, b_hh, w_hr, peephole, norm
    d, grad_norm = dh if own["d_ptr"] is None else own["d_ptr"], []  # in the gates
    dx = dh if own["dx_ptr"] is None else own["dx_ptr"]
    if normed:
        products = gates[..., 4 * hidden : 8 * hidden]
        dx, gain = _products_backward(d, products, options.norm[: 4 * hidden].float())
        units = layer_norm(gates[..., 8 * hidden :], (4 * hidden,), eps=NORM_EPSILON)
        grad_norm = [gain, (d * units).sum((0, 1))]
    flat_x, flat_h, flat = dx.flatten(0, 1), dh.flatten(0, 1), d.flatten(0, 1)
    if need_x:
        grads[0] = matmul(flat_x, w_ih, tf32, kind).view(x.shape)
    if need_weights:
        grads[1] = matmul(flat_x.t(), x.flatten(0, 1), tf32, kind)
        grads[2] = matmul(flat_h.t(), h_before.flatten(0, 1), tf32, kind)
        of_biases = (flat, flat) if normed else (flat_x, flat_h)
        grads[3], grads[4] = (of.sum(0, dtype=torch.float32).to(kind) for of in of_biases)
        if options.varies:
            made = _made(gates, c_before, options) if steps else cells
            unit = layer_norm(made, (hidden,), eps=NORM_EPSILON)
        if w_hr is not None:
            seen = cells
            if options.varies:
                seen = made
            if normed:
                gain, bias = options.norm[8 * hidden :].float().chunk(2)
                seen = gain * unit + bias
            outs = (gates[..., 3 * hidden : 4 * hidden] * seen.tanh()).flatten(0, 1).to(kind)
            grads[5] = matmul(own["projected_ptr"].flatten(0, 1).t(), outs, tf32, kind)
        if options.peephole is not None:
            i, f, _, o = d.float().split(hidden, 2)
            before = made if c_before is None else c_before
            grads[6] = torch.cat([(i * before).sum((0, 1)), (f * before).sum((0, 1)), (o * made).sum((0, 1))]).to(kind)
        if normed:
            seen = own["seen_ptr"]
            grads[7] = torch.cat((*grad_norm, (seen * unit).sum((0, 1)), seen.sum((0, 1)))).to(kind)
    found = (grads[0], carry.to(kind), none if carry_c is None else carry_c.to(kind), *grads[1:])
    return found


def _products_backward(grad: Tensor, products: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Layer norm's gradients, in the products and in the gain."""
    units = products.shape[-1:]
    _, mean, scale = torch.native_layer_norm(products, units, gain, None, NORM_EPSILON)
    needs = [True, True, False]
    of_products, of_gain, _ = torch.ops.aten.native_layer_norm_backward(
        grad, products, units, mean, scale, gain, None, needs
    )
    return of_products, of_gain


def _made(gates: Tensor, c_before: Tensor, options: Options) -> Tensor:
    """The new cell states, before zoneout."""
    i, f, g, _ = gates.split(c_before.size(2), 2)[:4]
    made = f * c_before + i * (g if options.keep_g is None else g * options.keep_g * options.keep_scale)
    return made.clamp(-options.clip, options.clip) if options.clip else made

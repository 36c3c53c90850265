"""What the recurrent kernels share: loads, products, the cells forwards, an lstm's variant."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..reference.recurrent import CELLS, NORM_EPSILON

LSTM, GRU, TANH = (tl.constexpr(CELLS.index(cell)) for cell in ("lstm", "gru", "rnn_tanh"))
EPSILON = tl.constexpr(NORM_EPSILON)
ROWS = 16
"""Of the batch, in a program."""


@triton.jit
def load_f32(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_or(ptr, at, inside, otherwise):
    """A tile, or where there is none this number."""
    return otherwise if ptr is None else load_f32(ptr, at, inside)


@triton.jit
def load_gates(ptr, at, hidden, inside):
    """Four tiles, `hidden` apart."""
    g0, g1 = load_f32(ptr, at, inside), load_f32(ptr, at + hidden, inside)
    return g0, g1, load_f32(ptr, at + 2 * hidden, inside), load_f32(ptr, at + 3 * hidden, inside)


@triton.jit
def store_gates(ptr, at, hidden, inside, g0, g1, g2, g3):
    kind = ptr.dtype.element_ty
    tl.store(ptr + at, g0.to(kind), mask=inside)
    tl.store(ptr + at + hidden, g1.to(kind), mask=inside)
    tl.store(ptr + at + 2 * hidden, g2.to(kind), mask=inside)
    tl.store(ptr + at + 3 * hidden, g3.to(kind), mask=inside)


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

    A float32 state takes two factors of a 16-bit weight's type, lest rounding adds up from step to step.
    """
    at = weight_ptr + (n * n_stride)[None, :] + (k * k_stride)[:, None]
    weight = tl.load(at, mask=(k < k_size)[:, None] & (n < n_size)[None, :], other=0.0)
    upper = a.to(weight.dtype)
    found = tl.dot(upper, weight, input_precision=PRECISION)
    if weight.dtype != a.dtype:
        found = tl.dot((a - upper.to(tl.float32)).to(weight.dtype), weight, found)
    return found


@triton.jit
def gate_products(a, weight_ptr, gate, n, n_size, k, k_size, n_stride, PRECISION: tl.constexpr):
    """The products with an lstm's four gates, whose weights lie `gate` apart."""
    p0 = product(a, weight_ptr, n, n_size, k, k_size, n_stride, 1, PRECISION)
    p1 = product(a, weight_ptr + gate, n, n_size, k, k_size, n_stride, 1, PRECISION)
    p2 = product(a, weight_ptr + 2 * gate, n, n_size, k, k_size, n_stride, 1, PRECISION)
    p3 = product(a, weight_ptr + 3 * gate, n, n_size, k, k_size, n_stride, 1, PRECISION)
    return p0, p1, p2, p3


@triton.jit
def add_part(total, lost, part):
    """Adds to a long sum, and to `lost` what its rounding takes (Dekker, Numerische Mathematik 18, 1971)."""
    grown = total + part
    return grown, lost + (part - (grown - total))


@triton.jit
def sum_products(a_ptr, weight_ptr, row, rows, n, n_size, depth, n_stride, k_stride, PRECISION: tl.constexpr,
                 K: tl.constexpr):  # fmt: skip
    """Rows of a [rows, depth] times a weight's [depth, n]."""
    acc = tl.zeros((row.shape[0], n.shape[0]), tl.float32)
    lost = acc
    for start in range(0, depth, K):
        k = start + tl.arange(0, K)
        inside = (row < rows)[:, None] & (k < depth)[None, :]
        a = tl.load(a_ptr + row.to(tl.int64)[:, None] * depth + k[None, :], mask=inside, other=0.0)
        part = product(a, weight_ptr, n, n_size, k, depth, n_stride, k_stride, PRECISION)
        if PRECISION == "tf32x3":
            acc, lost = add_part(acc, lost, part)
        else:
            acc += part
    return acc + lost if PRECISION == "tf32x3" else acc


# ---- cells ---------------------------------------------------------------------------------------------------------


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
def row_sum(x, inside):
    return tl.sum(tl.where(inside, x, 0.0), 1)[:, None]


@triton.jit
def moments(x, inside, count):
    """Mean and reciprocal deviation of a tile's rows, of `count` numbers each."""
    mean = row_sum(x, inside) / count
    return mean, 1.0 / tl.sqrt(row_sum((x - mean) * (x - mean), inside) / count + EPSILON)


@triton.jit
def normalise_gates(p0, p1, p2, p3, inside, hidden):
    """Four tiles' rows normalised together, and their reciprocal deviation."""
    count = 4 * hidden
    mean = (row_sum(p0, inside) + row_sum(p1, inside) + row_sum(p2, inside) + row_sum(p3, inside)) / count
    p0, p1, p2, p3 = p0 - mean, p1 - mean, p2 - mean, p3 - mean
    square = row_sum(p0 * p0, inside) + row_sum(p1 * p1, inside) + row_sum(p2 * p2, inside) + row_sum(p3 * p3, inside)
    scale = 1.0 / tl.sqrt(square / count + EPSILON)
    return p0 * scale, p1 * scale, p2 * scale, p3 * scale, scale


@triton.jit
def norm_gates(a0, a1, a2, a3, p0, p1, p2, p3, gain_ptr, u, hidden, inside):
    """Gates from x plus the gain times those from h, normalised."""
    n0, n1, n2, n3, _ = normalise_gates(p0, p1, p2, p3, inside, hidden)
    g0, g1, g2, g3 = load_gates(gain_ptr, u[None, :], hidden, (u < hidden)[None, :])
    return a0 + g0 * n0, a1 + g1 * n1, a2 + g2 * n2, a3 + g3 * n3


# What an lstm's variant has besides its gates, as a tuple `more`: norm_ptr, peephole_ptr, keep_ptr and hold_ptr (of c)
# of this step or None, the factor of what `keep` keeps, how much of c stays without `hold`, and the clip or infinity.


@triton.jit
def variant_state(g0, g1, g2, c, keep, clip):
    """The new cell state before the clip and behind it, of gates behind their activation."""
    whole = g1 * c + g0 * g2 * keep
    return whole, tl.where(whole > clip, clip, tl.where(whole < -clip, -clip, whole))


@triton.jit
def variant_factors(more, at, u, hidden, inside):
    """The factor of g, how much of c stays and the peepholes of i, f and o; neutral where there is none."""
    _, peephole_ptr, keep_ptr, hold_ptr, keep_scale, zoneout, _ = more
    known = (u < hidden)[None, :]
    keep = load_or(keep_ptr, at, inside, 1.0) * keep_scale
    hold = load_or(hold_ptr, at, inside, zoneout)
    of_i = load_or(peephole_ptr, u[None, :], known, 0.0)
    of_f = load_or(peephole_ptr, u[None, :] + hidden, known, 0.0)
    return keep, hold, of_i, of_f, load_or(peephole_ptr, u[None, :] + 2 * hidden, known, 0.0)


@triton.jit
def variant_forward(a0, a1, a2, a3, c, more, at, u, hidden, inside):
    """As cell_forward, of an lstm with options; `at`: where the tile lies in [B, H]."""
    norm_ptr, _, _, _, _, _, clip = more
    keep, hold, of_i, of_f, of_o = variant_factors(more, at, u, hidden, inside)
    g0, g1, g2 = tl.sigmoid(a0 + of_i * c), tl.sigmoid(a1 + of_f * c), libdevice.tanh(a2)
    _, made = variant_state(g0, g1, g2, c, keep, clip)
    seen = made
    if norm_ptr is not None:
        known = (u < hidden)[None, :]
        mean, scale = moments(made, inside, hidden)
        gain, bias = (
            load_f32(norm_ptr, u[None, :] + 8 * hidden, known),
            load_f32(norm_ptr, u[None, :] + 9 * hidden, known),
        )
        seen = gain * ((made - mean) * scale) + bias
    g3 = tl.sigmoid(a3 + of_o * made)
    return g3 * libdevice.tanh(seen), hold * c + (1.0 - hold) * made, g0, g1, g2, g3


# ---- from torch ----------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """An lstm's variant as the operators have it, masks as bytes; see fastnets.reference.recurrent.Variant."""

    peephole: Tensor | None = None
    norm: Tensor | None = None
    keep_g: Tensor | None = None
    hold_h: Tensor | None = None
    hold_c: Tensor | None = None
    keep_scale: float = 1.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    clip: float = 0.0

    @classmethod
    def of(cls, variant: tuple) -> "Options":
        found = cls(*variant)  # torch leaves out what is as by default from the end
        masks = {name: getattr(found, name) for name in ("keep_g", "hold_h", "hold_c")}
        return found._replace(**{name: m.view(torch.int8) for name, m in masks.items() if m is not None})

    @property
    def rates(self) -> dict:
        """The cells' numbers."""
        return {"keep_scale": self.keep_scale, "zoneout_c": self.zoneout_c, "clip": self.clip or float("inf")}

    @property
    def varies(self) -> bool:
        """Whether there is anything to be varied."""
        return any(tensor is not None for tensor in self[:5]) or self[5:] != Options()[5:]

    def masks(self, t: int | None = None) -> dict:
        """The kernels' pointers, of one step or of all."""
        found = {"keep_ptr": self.keep_g, "hold_h_ptr": self.hold_h, "hold_c_ptr": self.hold_c}
        return found if t is None else {name: None if mask is None else mask[t] for name, mask in found.items()}


def width_of(n: int) -> int:
    return max(16, triton.next_power_of_2(n))

"""One recurrent layer in one direction over a whole sequence: validation, autocast, autograd, fake kernels."""

import math
from itertools import zip_longest

import torch
from torch import Tensor

from .. import _library, dispatch
from ..reference.recurrent import CELLS, PLAIN, Variant
from ..reference.recurrent import recurrent as reference
from . import _autocast, _autograd, _precision
from ._checks import expect, expect_floating, expect_like, expect_shape, expect_tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Gates of each cell: the blocks of rows that its weights have."""


class _Recurrent(_autograd.Call):
    """Inputs: x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr and a variant's tensors. Visible outputs: y, h and lstm's c."""

    def __init__(
        self, operators, lengths: Tensor | None, cell: str, reverse: bool, rates: tuple[float, ...], save: bool
    ):
        self.operators, self.lengths, self.cell, self.reverse, self.save = operators, lengths, cell, reverse, save
        self.rates = rates
        self.tf32 = _precision.rnn_allows_tf32()
        self.visible = 3 if cell == "lstm" else 2

    def forward(self, *inputs):
        inputs = [t if t is None else t.contiguous() for t in inputs]
        options = CELLS.index(self.cell), self.reverse, self.tf32, self.save
        y, h, c, gates, cells = self.operators.recurrent_forward(
            *inputs[:8], self.lengths, *options, *inputs[8:], *self.rates
        )
        return (y, h, c, gates, cells) if self.cell == "lstm" else (y, h, gates)

    def backward(self, inputs, outputs, grads, needs):
        inputs = [t if t is None else t.contiguous() for t in inputs]
        x, h0, c0, w_ih, w_hh, _, _, w_hr = inputs[:8]
        grad_y, grad_h, grad_c = (g if g is None else g.contiguous() for g in (*grads, None)[:3])
        gates, cells = (*outputs[self.visible :], None)[:2]
        found = self.operators.recurrent_backward(
            *(grad_y, grad_h, grad_c, x, h0, c0, w_ih, w_hh, w_hr, self.lengths, outputs[0], gates, cells),
            *(CELLS.index(self.cell), self.reverse, self.tf32, needs[0], any(needs[3:])),
            *(*inputs[8:], *self.rates),
        )
        return tuple(grad if need else None for grad, need in zip_longest(found[: len(needs)], needs))

    def reference(self, *inputs):
        variant = Variant(*inputs[8:], *self.rates)
        return reference(*inputs[:8], self.lengths, self.cell, self.reverse, variant)[: self.visible]


def recurrent(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cell: str,
    reverse: bool = False,
    variant: Variant = PLAIN,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer, one direction, the whole sequence; arguments and result as in fastnets.reference.recurrent.

    Under autocast it computes in autocast's dtype, a variant's parameters included; gru returns the dtype of h0, as
    torch's does.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    expect(cell in CELLS, "cell", f"one of {', '.join(CELLS)}", repr(cell))
    expect_tensor(x, "x")
    expect_tensor(h0, "h0")
    expect_floating(x, "x")
    state_dtype = h0.dtype
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = _autocast.lower(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    _validate(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell)
    names = () if variant is PLAIN else variant.names
    if names:
        _, peephole, norm = _autocast.lower(x, variant.peephole, variant.norm)
        variant = variant._replace(peephole=peephole, norm=norm)
        _validate_variant(variant, names, x, h0, c0, cell)
    if lengths is not None:
        _validate_lengths(lengths, x)
    implementation = dispatch.select(dispatch.Case("recurrent", x.device.type, x.dtype, frozenset((cell, *names))))
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    if implementation.operators is None:
        results = reference(*inputs, lengths, cell, reverse, variant)
    else:
        tensors, rates = (variant[:5], variant[5:]) if names else ((), ())
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *tensors))
        call = _Recurrent(implementation.operators, lengths, cell, reverse, rates, save)
        results = _autograd.run(call, *inputs, *tensors)
    y, h = results[:2]
    if cell == "gru" and state_dtype != y.dtype:
        y, h = y.to(state_dtype), h.to(state_dtype)
    return y, h, results[2] if cell == "lstm" else None


def recurrent_step(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    cell: str,
) -> tuple[Tensor, Tensor | None]:
    """A single step, x[B, I] -> h[B, H] and, for lstm, c[B, H]: a sequence of length one."""
    expect_tensor(x, "x")
    expect(x.dim() == 2, "x", "2 dimensions [B, I]", f"{x.dim()}")
    _, h, c = recurrent(x.unsqueeze(0), h0, c0, w_ih, w_hh, b_ih, b_hh, cell=cell)
    return h, c


def _validate(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell: str) -> None:
    expect(x.dim() == 3, "x", "3 dimensions [T, B, I]", f"{x.dim()}")
    expect((c0 is not None) == (cell == "lstm"), "c0", "a Tensor for lstm, None for the others", type(c0).__name__)
    expect(w_hr is None or cell == "lstm", "w_hr", f"None for {cell}", "a Tensor")
    batch, features = x.shape[1], x.shape[2]
    expect(h0.dim() == 2, "h0", "2 dimensions [B, P]", f"{h0.dim()}")
    outputs = h0.shape[1]
    if w_hr is not None:
        expect_tensor(w_hr, "w_hr")
        expect(w_hr.dim() == 2, "w_hr", "2 dimensions [P, H]", f"{w_hr.dim()}")
    hidden = outputs if w_hr is None else w_hr.shape[1]
    expect(min(features, outputs, hidden) > 0, "I, P, H", "sizes of one or more", (features, outputs, hidden))
    gates = GATES[cell] * hidden
    wanted = (
        ("h0", h0, (batch, outputs)),
        ("c0", c0, (batch, hidden)),
        ("w_ih", w_ih, (gates, features)),
        ("w_hh", w_hh, (gates, outputs)),
        ("b_ih", b_ih, (gates,)),
        ("b_hh", b_hh, (gates,)),
        ("w_hr", w_hr, (outputs, hidden)),
    )
    for name, tensor, shape in wanted:
        if tensor is None and name in ("c0", "b_ih", "b_hh", "w_hr"):
            continue
        expect_tensor(tensor, name)
        expect_like(tensor, name, x, "x")
        expect_shape(tensor, name, shape)


def _validate_variant(variant: Variant, names: tuple[str, ...], x: Tensor, h0: Tensor, c0: Tensor, cell: str) -> None:
    expect(cell == "lstm", "variant", f"none for {cell}", ", ".join(names))
    hidden = c0.shape[1]
    for name, multiple in (("peephole", 3), ("norm", 10)):
        tensor = getattr(variant, name)
        if tensor is not None:
            expect_tensor(tensor, name)
            expect_like(tensor, name, x, "x")
            expect_shape(tensor, name, (multiple * hidden,))
    for name, columns in (("keep_g", hidden), ("hold_h", h0.shape[1]), ("hold_c", hidden)):
        mask = getattr(variant, name)
        if mask is not None:
            expect_tensor(mask, name)
            if mask.dtype != torch.bool:
                raise TypeError(f"{name}: expected bool, got {mask.dtype}")
            expect(mask.device == x.device, name, f"device {x.device} like x", mask.device)
            expect_shape(mask, name, (*x.shape[:2], columns))
    for name in ("zoneout_h", "zoneout_c"):
        expect(0 <= getattr(variant, name) <= 1, name, "a number in [0, 1]", getattr(variant, name))
    expect(0 < variant.keep_scale < math.inf, "keep_scale", "a positive number", variant.keep_scale)
    expect(0 <= variant.clip < math.inf, "clip", "a positive number, or 0 for none", variant.clip)


def _validate_lengths(lengths: Tensor, x: Tensor) -> None:
    expect_tensor(lengths, "lengths")
    if lengths.dtype != torch.int64:
        raise TypeError(f"lengths: expected int64, got {lengths.dtype}")
    expect(lengths.device == x.device, "lengths", f"device {x.device} like x", lengths.device)
    expect_shape(lengths, "lengths", x.shape[1:2])
    if torch.compiler.is_compiling() or lengths.numel() == 0 or lengths.is_meta:
        return  # no values to look at; the kernels clamp them
    least, most = lengths.aminmax()
    expect(least.item() >= 0 and most.item() <= x.shape[0], "lengths", f"values in [0, {x.shape[0]}]", lengths.tolist())


if _library.missing is None:

    @torch.library.register_fake("fastnets::recurrent_forward")
    def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, cell, reverse, tf32, save, peephole=None, norm=None, *more):
        steps, batch = x.shape[:2]
        hidden = h0.shape[1] if w_hr is None else w_hr.shape[1]
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        absent, kind, gates = (0,), CELLS[cell], 4 if norm is None else 12
        return (
            x.new_empty(steps, *h0.shape),
            torch.empty_like(h0),
            x.new_empty(absent) if c0 is None else torch.empty_like(c0),
            x.new_empty((steps, batch, gates * hidden) if save and kind in ("lstm", "gru") else absent, dtype=exact),
            x.new_empty((steps, batch, hidden) if save and kind == "lstm" else absent, dtype=exact),
        )

    @torch.library.register_fake("fastnets::recurrent_backward")
    def _(grad_y, grad_h, grad_c, x, h0, c0, w_ih, w_hh, w_hr, lengths, y, gates, cells, cell, reverse, tf32, *more):
        need_x, need_w, peephole, norm = (*more, None, None)[:4]

        def gradient(tensor, needed=True):
            return x.new_empty((0,)) if tensor is None or not needed else torch.empty_like(tensor)

        bias = x.new_empty(w_hh.shape[:1] if need_w else (0,))
        return (
            *(gradient(x, need_x), gradient(h0), gradient(c0)),
            *(gradient(w_ih, need_w), gradient(w_hh, need_w), bias, torch.empty_like(bias)),
            *(gradient(t, need_w) for t in (w_hr, peephole, norm)),
        )

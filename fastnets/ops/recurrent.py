"""One recurrent layer in one direction over a whole sequence: validation, autocast, autograd, fake kernels."""

import math
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _library, dispatch
from ..reference.recurrent import CELLS, PLAIN, Variant
from ..reference.recurrent import recurrent as reference
from . import _autocast, _autograd, _precision
from ._checks import expect, expect_floating, expect_like, expect_shape, expect_tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Gates of each cell: the blocks of rows that its weights have."""


class Direction(NamedTuple):
    """What one direction of a layer has of its own; shapes as in fastnets.reference.recurrent."""

    h0: Tensor
    c0: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    variant: Variant = PLAIN


class _Recurrent(_autograd.Call):
    """Inputs: x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr and a variant's tensors. Visible outputs: y, h and lstm's c."""

    def __init__(
        self, operators, lengths: Tensor | None, cell: str, reverse: bool, rates: tuple[float, ...], save: bool
    ):
        self.operators, self.lengths, self.cell, self.reverse, self.save = operators, lengths, cell, reverse, save
        self.rates = rates
        self.tf32 = _precision.rnn_allows_tf32()
        self.states = 3 if cell == "lstm" else 2
        self.visible = self.states

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
        gates, cells = (*outputs[self.states :], None)[:2]
        found = self.operators.recurrent_backward(
            *(grad_y, grad_h, grad_c, x, h0, c0, w_ih, w_hh, w_hr, self.lengths, outputs[0], gates, cells),
            *(CELLS.index(self.cell), self.reverse, self.tf32, needs[0], any(needs[3:])),
            *(*inputs[8:], *self.rates),
        )
        return tuple(grad if need else None for grad, need in zip_longest(found[: len(needs)], needs))

    def reference(self, *inputs):
        variant = Variant(*inputs[8:], *self.rates)
        return reference(*inputs[:8], self.lengths, self.cell, self.reverse, variant)[: self.visible]


class _Both(_Recurrent):
    """Both directions of a layer in one call. Inputs: x, then each direction's twelve, its variant's tensors at their
    end. Visible outputs: y, h and lstm's c of the one direction and of the other."""

    def __init__(self, *args):
        super().__init__(*args)
        self.visible = 2 * self.states

    def forward(self, *inputs):
        x, ahead, back = self._split(inputs)
        options = CELLS.index(self.cell), self.tf32, self.save
        found = self.operators.recurrent_forward_both(x, ahead, back, self.lengths, *options, *self.rates)
        kept = (slice(0, 3), slice(3, 5)) if self.cell == "lstm" else (slice(0, 2), slice(3, 4))
        return tuple(t for part in kept for direction in (found[:5], found[5:]) for t in direction[part])

    def backward(self, inputs, outputs, grads, needs):
        x, ahead, back = self._split(inputs)
        results, kept = outputs[: self.visible], outputs[self.visible :]

        def behind(direction: int) -> list[Tensor | None]:
            """The gradients of y, h and c, and y, the gates and the cell states."""
            own = slice(direction * self.states, (direction + 1) * self.states)
            of = [g if g is None else g.contiguous() for g in (*grads[own], None)[:3]]
            saved = kept[direction * len(kept) // 2 : (direction + 1) * len(kept) // 2]
            return [*of, results[own][0], *(*saved, None, None)[:2]]

        weights = any(needs[place] for first in (1, 13) for place in range(first + 2, first + 12))
        found = self.operators.recurrent_backward_both(
            *(x, ahead, back, behind(0), behind(1), self.lengths, CELLS.index(self.cell), self.tf32),
            *(needs[0], weights, *self.rates),
        )
        none = [None] * 3  # the masks
        of_x = found[0] + found[10] if needs[0] else None
        grads = (of_x, *found[1:10], *none, *found[11:20], *none)
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))

    def reference(self, *inputs):
        x, *both = self._split(inputs)
        found = []
        for own, reverse in zip(both, (False, True), strict=True):
            variant = Variant(*own[7:], *self.rates)
            found += reference(x, *own[:7], self.lengths, self.cell, reverse, variant)[: self.states]
        return tuple(found)

    @staticmethod
    def _split(inputs):
        inputs = [t if t is None else t.contiguous() for t in inputs]
        return inputs[0], inputs[1:13], inputs[13:]


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
    given = Direction(h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, variant)
    x, own = _checked(x, given, lengths, cell)
    return _run(_select(x, own, cell), x, own, lengths, cell, reverse, given.h0.dtype)


def recurrent_both(
    x: Tensor, ahead: Direction, back: Direction, *, lengths: Tensor | None = None, cell: str
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Both directions of a layer over the whole sequence, in one launch where the backend has one; the results of
    `recurrent` for `ahead` and, with reverse, for `back`.

    The directions have the same sizes, and variants with the same options.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    dtypes = ahead.h0.dtype, back.h0.dtype
    x, ahead = _checked(x, ahead, lengths, cell)
    x, back = _checked(x, back, lengths, cell)
    implementation = _select(x, ahead, cell)
    alike = ahead.h0.shape == back.h0.shape and ahead.variant[5:] == back.variant[5:]
    alike = alike and ahead.variant.names == back.variant.names and (ahead.w_hr is None) == (back.w_hr is None)
    if not (implementation.both and alike):
        return [
            _run(implementation, x, own, lengths, cell, reverse, dtype)
            for own, reverse, dtype in ((ahead, False, dtypes[0]), (back, True, dtypes[1]))
        ]
    inputs = (x, *ahead[:7], *ahead.variant[:5], *back[:7], *back.variant[:5])
    call = _Both(implementation.operators, lengths, cell, False, tuple(ahead.variant[5:]), _save(inputs))
    results = _autograd.run(call, *inputs)
    return [
        _as_given(results[first : first + call.states], cell, dtype)
        for first, dtype in zip((0, call.states), dtypes, strict=True)
    ]


def _checked(x: Tensor, own: Direction, lengths: Tensor | None, cell: str) -> tuple[Tensor, Direction]:
    """x and what belongs to a direction, valid and in the dtype that is computed in."""
    expect(cell in CELLS, "cell", f"one of {', '.join(CELLS)}", repr(cell))
    expect_tensor(x, "x")
    expect_tensor(own.h0, "h0")
    expect_floating(x, "x")
    variant = own.variant
    x, *tensors = _autocast.lower(x, *own[:7])
    _validate(x, *tensors, cell)
    names = () if variant is PLAIN else variant.names
    if names:
        _, peephole, norm = _autocast.lower(x, variant.peephole, variant.norm)
        variant = variant._replace(peephole=peephole, norm=norm)
        _validate_variant(variant, names, x, tensors[0], tensors[1], cell)
    if lengths is not None:
        _validate_lengths(lengths, x)
    return x, Direction(*tensors, variant if names else PLAIN)


def _select(x: Tensor, own: Direction, cell: str) -> dispatch.Implementation:
    names = () if own.variant is PLAIN else own.variant.names
    return dispatch.select(dispatch.Case("recurrent", x.device.type, x.dtype, frozenset((cell, *names))))


def _save(inputs) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _run(implementation, x: Tensor, own: Direction, lengths: Tensor | None, cell: str, reverse: bool, dtype):
    """One direction on its backend; `dtype`: that of h0 as it was given."""
    inputs = (x, *own[:7])
    if implementation.operators is None:
        results = reference(*inputs, lengths, cell, reverse, own.variant)
    else:
        tensors, rates = ((), ()) if own.variant is PLAIN else (own.variant[:5], own.variant[5:])
        call = _Recurrent(implementation.operators, lengths, cell, reverse, rates, _save((*inputs, *tensors)))
        results = _autograd.run(call, *inputs, *tensors)
    return _as_given(results, cell, dtype)


def _as_given(results, cell: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    y, h = results[:2]
    if cell == "gru" and dtype != y.dtype:
        y, h = y.to(dtype), h.to(dtype)
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
        if tensor.shape == shape and tensor.dtype == x.dtype and tensor.device == x.device:
            continue  # three calls less
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

    def _fake_forward(x, h0, c0, w_hr, cell, save, norm):
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

    def _fake_backward(x, h0, c0, w_ih, w_hh, w_hr, need_x, need_w, peephole, norm):
        def gradient(tensor, needed=True):
            return x.new_empty((0,)) if tensor is None or not needed else torch.empty_like(tensor)

        bias = x.new_empty(w_hh.shape[:1] if need_w else (0,))
        return (
            *(gradient(x, need_x), gradient(h0), gradient(c0)),
            *(gradient(w_ih, need_w), gradient(w_hh, need_w), bias, torch.empty_like(bias)),
            *(gradient(t, need_w) for t in (w_hr, peephole, norm)),
        )

    @torch.library.register_fake("fastnets::recurrent_forward")
    def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, cell, reverse, tf32, save, peephole=None, norm=None, *more):
        return _fake_forward(x, h0, c0, w_hr, cell, save, norm)

    @torch.library.register_fake("fastnets::recurrent_backward")
    def _(grad_y, grad_h, grad_c, x, h0, c0, w_ih, w_hh, w_hr, lengths, y, gates, cells, cell, reverse, tf32, *more):
        need_x, need_w, peephole, norm = (*more, None, None)[:4]
        return _fake_backward(x, h0, c0, w_ih, w_hh, w_hr, need_x, need_w, peephole, norm)

    @torch.library.register_fake("fastnets::recurrent_forward_both")
    def _(x, ahead, back, lengths, cell, tf32, save, *rates):
        return [t for own in (ahead, back) for t in _fake_forward(x, own[0], own[1], own[6], cell, save, own[8])]

    @torch.library.register_fake("fastnets::recurrent_backward_both")
    def _(x, ahead, back, of_ahead, of_back, lengths, cell, tf32, need_x, need_w, *rates):
        return [t for own in (ahead, back) for t in _fake_backward(x, *own[:4], own[6], need_x, need_w, *own[7:9])]

"""One recurrent layer in one direction over a whole sequence, in plain PyTorch.

Formulas: torch.nn.LSTM, torch.nn.GRU and torch.nn.RNN; the projection is that of Sak et al., "Long short-term memory
recurrent neural network architectures for large scale acoustic modeling" (2014). Those of an lstm's variants, and the
papers they are from, are in docs/lstm.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

__all__ = ["CELLS", "NORM_EPSILON", "Variant", "recurrent"]

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""The cells, in the order of the operators' `cell` argument."""

NORM_EPSILON = 1e-5
"""What layer norm adds to a variance."""


class Variant(NamedTuple):
    """What an lstm does beyond the plain one, the tensors first, in the order of the operators' arguments."""

    peephole: Tensor | None = None
    """[3 H]: weights of the cell state in the gates i and f (the state before the step) and o (the new one)."""
    norm: Tensor | None = None
    """[10 H]: layer norm's gains of W_ih x [4 H], of W_hh h [4 H] and of the cell state [H], and its bias there [H]."""
    keep_g: Tensor | None = None
    """Boolean [T, B, H]: the candidates g that recurrent dropout keeps."""
    hold_h: Tensor | None = None
    """Boolean [T, B, P]: where zoneout has h stay as it was before the step."""
    hold_c: Tensor | None = None
    """Boolean [T, B, H]: likewise c."""
    keep_scale: float = 1.0
    """Factor of the candidates that `keep_g` keeps."""
    zoneout_h: float = 0.0
    """Without `hold_h`: how much of h stays, the expectation of a random mask."""
    zoneout_c: float = 0.0
    """Without `hold_c`: likewise of c."""
    clip: float = 0.0
    """The new cell state's largest magnitude; 0: any."""

    @property
    def names(self) -> tuple[str, ...]:
        """The options in use, by fastnets.nn.LSTM's names."""
        used = {
            "peephole": self.peephole is not None,
            "layer_norm": self.norm is not None,
            "recurrent_dropout": self.keep_g is not None,
            "zoneout_h": self.hold_h is not None or self.zoneout_h > 0,
            "zoneout_c": self.hold_c is not None or self.zoneout_c > 0,
            "cell_clip": self.clip > 0,
        }
        return tuple(name for name, use in used.items() if use)


PLAIN = Variant()


def recurrent(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
    variant: Variant = PLAIN,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The whole sequence: outputs y[T, B, P], the last state h[B, P] and, for lstm, c[B, H].

    Args:
        x: [T, B, I]; h0: [B, P]; c0: [B, H], for lstm.
        w_ih: [G H, I], w_hh: [G H, P], b_ih and b_hh: [G H] or None, G = 4 (lstm: i, f, g, o), 3 (gru: r, z, n) or 1.
        w_hr: [P, H], lstm's projection of the output; None: P = H.
        lengths: [B], integers. Past a sequence's end its state stays and its outputs are zero.
        cell: one of CELLS.
        reverse: from each sequence's own end to its beginning.
        variant: of lstm.

    Half precision is computed in float32.
    """
    dtype = x.dtype
    if dtype in (torch.bfloat16, torch.float16):
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = map(_float, (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr))
        variant = variant._replace(peephole=_float(variant.peephole), norm=_float(variant.norm))
    steps, hidden = x.shape[0], w_hh.shape[0] // 4
    if variant.norm is None:
        gain_ih, gain_hh, *norm_c = [None] * 4
    else:
        gain_ih, gain_hh, *norm_c = variant.norm.split((4 * hidden, 4 * hidden, hidden, hidden))
    inputs = _product(x, w_ih, b_ih, gain_ih)
    outputs = [inputs] * steps
    h, c = h0, c0
    for t in reversed(range(steps)) if reverse else range(steps):
        from_h = _product(h, w_hh, b_hh, gain_hh)
        if cell == "lstm":
            new_h, new_c = _lstm_step(inputs[t] + from_h, c, variant, norm_c, t)
            new_h = new_h if w_hr is None else linear(new_h, w_hr)
            new_h = _hold(variant.hold_h, variant.zoneout_h, t, h, new_h)
            new_c = _hold(variant.hold_c, variant.zoneout_c, t, c, new_c)
        else:
            new_h, new_c = _step(cell, inputs[t], from_h, h), None
        if lengths is None:
            h, c, outputs[t] = new_h, new_c, new_h
        else:
            runs = (lengths > t).unsqueeze(1)
            outputs[t] = torch.where(runs, new_h, 0.0)
            h = torch.where(runs, new_h, h)
            c = None if c is None else torch.where(runs, new_c, c)
    y = torch.stack(outputs) if steps else x.new_zeros(0, *h0.shape)
    return y.to(dtype), h.to(dtype), None if c is None else c.to(dtype)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _normalised(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    """W x + b or, with layer norm, gain * norm(W x) + b."""
    if gain is None:
        return linear(x, weight, bias)
    product = gain * _normalised(linear(x, weight))
    return product if bias is None else product + bias


def _hold(mask: Tensor | None, rate: float, t: int, before: Tensor, now: Tensor) -> Tensor:
    """The state behind zoneout."""
    if mask is not None:
        return torch.where(mask[t], before, now)
    return now if rate == 0 else rate * before + (1 - rate) * now


def _lstm_step(gates: Tensor, c: Tensor, variant: Variant, norm_c: list[Tensor | None], t: int):
    """The next h, before its projection, and c, both before zoneout, from the gates before their activation."""
    i, f, g, o = gates.chunk(4, 1)
    if variant.peephole is not None:
        of_i, of_f, of_o = variant.peephole.chunk(3)
        i, f = i + of_i * c, f + of_f * c
    g = torch.tanh(g)
    if variant.keep_g is not None:
        g = torch.where(variant.keep_g[t], g * variant.keep_scale, 0.0)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * g
    if variant.clip > 0:
        c = c.clamp(-variant.clip, variant.clip)
    if variant.peephole is not None:
        o = o + of_o * c
    gain, bias = norm_c
    seen = c if gain is None else gain * _normalised(c) + bias
    return torch.sigmoid(o) * torch.tanh(seen), c


def _step(cell: str, from_x: Tensor, from_h: Tensor, h: Tensor) -> Tensor:
    """The next h of the other cells, from W_ih x + b_ih and W_hh h + b_hh."""
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, 1), from_h.chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return n + z * (h - n)
    if cell == "rnn_tanh":
        return torch.tanh(from_x + from_h)
    if cell == "rnn_relu":
        return torch.relu(from_x + from_h)
    raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")

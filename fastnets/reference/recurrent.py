"""One recurrent layer in one direction over a whole sequence, in plain PyTorch.

Formulas: torch.nn.LSTM, torch.nn.GRU and torch.nn.RNN; the projection is that of Sak et al., "Long short-term memory
recurrent neural network architectures for large scale acoustic modeling" (2014).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["CELLS", "recurrent"]

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""The cells, in the order of the operators' `cell` argument."""


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The whole sequence: outputs y[T, B, P], the last state h[B, P] and, for lstm, c[B, H].

    Args:
        x: [T, B, I]; h0: [B, P]; c0: [B, H], for lstm.
        w_ih: [G H, I], w_hh: [G H, P], b_ih and b_hh: [G H] or None, G = 4 (lstm: i, f, g, o), 3 (gru: r, z, n) or 1.
        w_hr: [P, H], lstm's projection of the output; None: P = H.
        lengths: [B], integers. Past a sequence's end its state stays and its outputs are zero.
        cell: one of CELLS.
        reverse: from each sequence's own end to its beginning.

    Half precision is computed in float32.
    """
    dtype = x.dtype
    if dtype in (torch.bfloat16, torch.float16):
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = (
            t if t is None else t.float() for t in (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
        )
    steps = x.shape[0]
    inputs = linear(x, w_ih, b_ih)
    outputs = [inputs] * steps
    h, c = h0, c0
    for t in reversed(range(steps)) if reverse else range(steps):
        new_h, new_c = _step(cell, inputs[t], linear(h, w_hh, b_hh), h, c)
        if w_hr is not None:
            new_h = linear(new_h, w_hr)
        if lengths is None:
            h, c, outputs[t] = new_h, new_c, new_h
        else:
            runs = (lengths > t).unsqueeze(1)
            outputs[t] = torch.where(runs, new_h, 0.0)
            h = torch.where(runs, new_h, h)
            c = None if c is None else torch.where(runs, new_c, c)
    y = torch.stack(outputs) if steps else x.new_zeros(0, *h0.shape)
    return y.to(dtype), h.to(dtype), None if c is None else c.to(dtype)


def _step(cell: str, from_x: Tensor, from_h: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The next h and c, from W_ih x + b_ih and W_hh h + b_hh."""
    if cell == "lstm":
        i, f, g, o = (from_x + from_h).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, 1), from_h.chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return n + z * (h - n), None
    if cell == "rnn_tanh":
        return torch.tanh(from_x + from_h), None
    if cell == "rnn_relu":
        return torch.relu(from_x + from_h), None
    raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")

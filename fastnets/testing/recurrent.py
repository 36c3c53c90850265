"""The operator table's recurrent cases: one layer, one direction."""

import torch
from torch import Tensor

from ..ops.recurrent import GATES, recurrent
from . import Case

_PEERS = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}


def _peer(cell: str, reverse: bool):
    """PyTorch's own layer; a reversed one runs on the flipped sequence."""

    def run(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths):
        weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
        states = h0.unsqueeze(0) if c0 is None else [h0.unsqueeze(0), c0.unsqueeze(0)]
        x = x.flip(0) if reverse else x
        y, *last = _PEERS[cell](x, states, weights, b_ih is not None, 1, 0.0, x.requires_grad, False, False)
        return y.flip(0) if reverse else y, *(state[0] for state in last)

    return run


def _case(
    cell: str,
    steps: int,
    batch: int,
    features: int,
    hidden: int,
    *,
    bias: bool = True,
    reverse: bool = False,
    lengths: str = "",
    proj: int = 0,
    **more,
) -> Case:
    gates, outputs = GATES[cell] * hidden, proj or hidden

    def inputs(generator: torch.Generator) -> dict[str, Tensor | None]:
        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(size, generator=generator, dtype=torch.float64)

        scale = hidden**-0.5
        drawn = {
            "x": draw(steps, batch, features),
            "h0": draw(batch, outputs),
            "c0": draw(batch, hidden) if cell == "lstm" else None,
            "w_ih": draw(gates, features, scale=scale),
            "w_hh": draw(gates, outputs, scale=scale),
            "b_ih": draw(gates, scale=scale) if bias else None,
            "b_hh": draw(gates, scale=scale) if bias else None,
            "w_hr": draw(proj, hidden, scale=scale) if proj else None,
            "lengths": None,
        }
        if lengths:
            drawn["lengths"] = torch.randint(0, steps + 1, (batch,), generator=generator)
        if lengths == "sorted":
            drawn["lengths"] = drawn["lengths"].sort(descending=True).values
        return drawn

    options = (
        "" if bias else "no bias",
        "reverse" if reverse else "",
        f"{lengths} lengths" if lengths else "",
        f"projected to {proj}" if proj else "",
    )
    weights = gates * (features + outputs) + proj * hidden
    return Case(
        op="recurrent",
        name=", ".join([f"{cell} T{steps} B{batch} I{features} H{hidden}", *filter(None, options)]),
        inputs=inputs,
        function=lambda **drawn: recurrent(**drawn, cell=cell, reverse=reverse),
        peer=None if lengths or not steps else _peer(cell, reverse),
        flops=2.0 * steps * batch * weights,
        elements=float(steps * batch * (features + outputs) + weights),
        **more,
    )


_SIZES = [
    (5, 7, 1, 1),  # a single weight: its gradient's rounding beside PyTorch's is luck, and these numbers have it
    (1, 1, 3, 24),
    (2, 3, 4, 5),
    (7, 8, 19, 17),
    (37, 3, 5, 17),
    (7, 1, 10, 100),
    (1, 33, 7, 100),
    (7, 33, 3, 64),
]

CASES = [
    *(_case(cell, *sizes) for cell in GATES for sizes in _SIZES),
    *(_case(cell, 7, 8, 19, 17, reverse=True, bias=False) for cell in GATES),
    *(_case(cell, 7, 9, 6, 20, lengths="sorted") for cell in GATES),
    *(_case(cell, 7, 9, 6, 20, lengths="unsorted", reverse=True) for cell in GATES),
    _case("lstm", 7, 8, 19, 17, proj=5),
    _case("lstm", 7, 8, 19, 100, proj=17, reverse=True, bias=False),
    _case("lstm", 7, 33, 3, 20, proj=1, reverse=True, lengths="unsorted"),
    _case("lstm", 0, 3, 4, 5),
    *(_case(cell, 3, 0, 4, 5) for cell in GATES),
    # More rows than one product over many steps covers.
    *(_case(cell, 37, 33, 64, 64, quick=False) for cell in GATES),
    _case("gru", 50, 33, 5, 7, lengths="unsorted", quick=False),
    _case("lstm", 50, 33, 5, 7, proj=3, reverse=True, lengths="unsorted", quick=False),
    _case("lstm", 100, 32, 64, 64, quick=False, benchmark=(torch.float32, torch.bfloat16)),
    _case("lstm", 128, 16, 256, 256, verify=False, benchmark=(torch.float32,)),
    _case("lstm", 128, 1, 256, 256, verify=False, benchmark=(torch.float32,)),
    _case("lstm", 64, 64, 512, 512, verify=False, benchmark=(torch.float32,)),
    _case("gru", 128, 16, 256, 256, verify=False, benchmark=(torch.float32,)),
    _case("rnn_tanh", 128, 16, 256, 256, verify=False, benchmark=(torch.float32,)),
]

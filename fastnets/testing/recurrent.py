"""The operator table's recurrent cases: one layer, one direction."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..ops.recurrent import GATES, recurrent
from ..reference.recurrent import Variant
from . import Case

_PEERS = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}


def _peer(cell: str, reverse: bool):
    """PyTorch's own layer; a reversed one runs on the flipped sequence, sequences of several lengths one by one."""

    def run(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths):
        weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
        states = [h0] if c0 is None else [h0, c0]
        if lengths is None:
            return whole(x, states, weights, b_ih is not None)
        results = []
        for b, length in enumerate(lengths.tolist()):
            own = [state[b : b + 1] for state in states]
            if length == 0:
                results.append((x.new_zeros(x.shape[0], 1, h0.shape[1]), *own))
                continue
            y, *last = whole(x[:length, b : b + 1], own, weights, b_ih is not None)
            results.append((pad(y, (0, 0, 0, 0, 0, x.shape[0] - length)), *last))
        y, *last = zip(*results, strict=True)
        return torch.cat(y, 1), *(torch.cat(state) for state in last)

    def whole(x, states, weights, bias):
        x = x.flip(0) if reverse else x
        states = [state.unsqueeze(0) for state in states]
        states = states if cell == "lstm" else states[0]
        y, *last = _PEERS[cell](x, states, weights, bias, 1, 0.0, x.requires_grad, False, False)
        return y.flip(0) if reverse else y, *(state[0] for state in last)

    return run


def _cell_by_cell(function, reverse: bool):
    """`function` a step at a time, as PyTorch runs a cell that it has no layer of: each state a tensor of the dtype."""

    def run(*, x, h0, c0, lengths, **more):
        states, outputs = (h0, c0), [x] * x.shape[0]
        for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
            own = {name: tensor[t : t + 1] if name in _MASKS else tensor for name, tensor in more.items()}
            runs = None if lengths is None else (lengths > t).long()
            outputs[t], *states = function(x=x[t : t + 1], h0=states[0], c0=states[1], lengths=runs, **own)
        return torch.cat(outputs), *states

    return run


def _on_the_same_side(reverse: bool):
    """A relu cell whose units are on where they are in a run's y."""

    def as_found(found: dict[str, Tensor]):
        on = found["output 0"] > 0

        def run(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths):
            h, outputs = h0, [None] * x.shape[0]
            for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
                new = torch.where(on[t], linear(x[t], w_ih, b_ih) + linear(h, w_hh, b_hh), 0.0)
                runs = torch.ones_like(h0[:, :1], dtype=torch.bool) if lengths is None else (lengths > t).unsqueeze(1)
                outputs[t], h = torch.where(runs, new, 0.0), torch.where(runs, new, h)
            return torch.stack(outputs), h

        return run

    return as_found


_MASKS = ("keep_g", "hold_h", "hold_c")
_TENSORS = ("peephole", "norm", *_MASKS)
# Option -> the tensors of a Variant with their columns (multiples of H; of masks H or P), and its numbers.
_VARIANT = {
    "peephole": ({"peephole": 3}, {}),
    "layer norm": ({"norm": 10}, {}),
    "recurrent dropout": ({"keep_g": "h"}, {"keep_scale": 2.5}),
    "zoneout": ({"hold_h": "p", "hold_c": "h"}, {}),
    "expected zoneout": ({}, {"zoneout_h": 0.1, "zoneout_c": 0.3}),
    # A state within rounding of the bound has one gradient or the other: a bound that is passed, but by few.
    "cell clip": ({}, {"clip": 1.2}),
}
_EVERY = "peephole, layer norm, recurrent dropout, zoneout, cell clip"
_ELEMENTWISE = "peephole, recurrent dropout, zoneout, cell clip"


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
    variant: str = "",
    **more,
) -> Case:
    """`variant`: of lstm, from the names in `_VARIANT`, with commas."""
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
        if cell.startswith("rnn_"):
            # As torch's initial ones. In 37 steps a weight above 1 outgrows every dtype, and under one of -3 tanh makes
            # the gradients' rounding a hundred times the usual, in one way of computing them or in the other.
            drawn["w_hh"] = scale * (2 * torch.rand(gates, outputs, generator=generator, dtype=torch.float64) - 1)
        if lengths:
            drawn["lengths"] = torch.randint(0, steps + 1, (batch,), generator=generator)
        if lengths == "sorted":
            drawn["lengths"] = drawn["lengths"].sort(descending=True).values
        columns = {"h": hidden, "p": outputs}
        for name in named:
            for tensor, units in _VARIANT[name][0].items():
                if tensor in _MASKS:
                    drawn[tensor] = torch.rand(steps, batch, columns[units], generator=generator) < 0.4
                else:
                    drawn[tensor] = draw(units * hidden)
        return drawn

    named = variant.split(", ") if variant else []
    rates = {key: value for name in named for key, value in _VARIANT[name][1].items()}

    def function(**drawn):
        tensors = {name: drawn.pop(name) for name in _TENSORS if name in drawn}
        return recurrent(**drawn, cell=cell, reverse=reverse, variant=Variant(**tensors, **rates))

    options = (
        "" if bias else "no bias",
        "reverse" if reverse else "",
        f"{lengths} lengths" if lengths else "",
        f"projected to {proj}" if proj else "",
        variant,
    )
    weights = gates * (features + outputs) + proj * hidden
    return Case(
        op="recurrent",
        name=", ".join([f"{cell} T{steps} B{batch} I{features} H{hidden}", *filter(None, options)]),
        inputs=inputs,
        function=function,
        peer=(_cell_by_cell(function, reverse) if variant else _peer(cell, reverse)) if steps else None,
        as_found=_on_the_same_side(reverse) if cell == "rnn_relu" and steps else None,
        flops=2.0 * steps * batch * weights,
        elements=float(steps * batch * (features + outputs) + weights),
        **{"draws": 16 if hidden == 1 else 1, **more},  # a single weight's gradient is a single sum
    )


_SIZES = [
    (7, 8, 1, 1),
    (1, 1, 3, 24),
    (2, 3, 4, 5),
    (7, 8, 19, 17),
    (37, 3, 5, 17),
    (7, 1, 10, 100),
    (1, 33, 7, 100),
    (7, 33, 3, 64),
]

# T, B, H: the sizes at which persistent kernels differ. Large ones are checked where a simulated GPU can do it in time.
_GRID = [
    *itertools.product((1, 2, 37), (1, 3, 8, 64), (1, 17, 64)),
    *((steps, batch, hidden) for hidden in (200, 256) for steps, batch in ((1, 64), (2, 8), (2, 3), (37, 1))),
    *((steps, batch, 1000) for steps, batch in ((1, 8), (2, 1), (2, 3))),
]
_OPTIONS = [
    {},
    {"reverse": True},
    {"lengths": "sorted"},
    {"bias": False},
    {"lengths": "unsorted", "reverse": True},
]


def _grid() -> Iterator[Case]:
    """Every cell at every size, each with the next of the options; lstm projected at every third."""
    for place, (cell, (steps, batch, hidden)) in enumerate(itertools.product(GATES, _GRID)):
        options = _OPTIONS[place % len(_OPTIONS)]
        if cell == "lstm" and hidden > 1 and place % 3 == 0:
            options = {**options, "proj": (hidden + 2) // 3}
        yield _case(cell, steps, batch, 6, hidden, **options, quick=False, suite=False)


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
    *(_case("lstm", 7, 8, 19, 17, variant=name) for name in _VARIANT),
    *(
        _case("lstm", 7, 9, 6, 20, reverse=reverse, lengths="unsorted", proj=proj, variant=every)
        for reverse, proj, every in [
            (False, 0, _EVERY),
            (True, 5, _EVERY),
            (True, 0, _ELEMENTWISE),
            (False, 5, _ELEMENTWISE),
        ]
    ),
    _case("lstm", 1, 5, 3, 24, variant=_EVERY),
    _case("lstm", 3, 2, 4, 100, bias=False, variant=_EVERY),
    _case("lstm", 40, 33, 3, 13, lengths="unsorted", variant=_EVERY),
    _case("lstm", 0, 3, 4, 5, variant=_EVERY),
    _case("lstm", 3, 0, 4, 5, variant=_EVERY),
    *_grid(),
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

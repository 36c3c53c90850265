"""The recurrent layers' Triton kernels under the interpreter: each cell, persistent and step by step."""

import pytest
import torch
from test_triton import check, interpreted

import fastnets
from fastnets.testing import full_precision
from fastnets.testing import recurrent as table

pytestmark = interpreted

CASES = (
    "lstm T7 B8 I19 H17, no bias, reverse",
    "gru T7 B8 I19 H17",
    "rnn_relu T7 B9 I6 H20, sorted lengths",
    "rnn_tanh T2 B3 I4 H5",
    "gru T7 B9 I6 H20, reverse, unsorted lengths",
    "lstm T7 B33 I3 H20, reverse, unsorted lengths, projected to 1",
    "lstm T0 B3 I4 H5",
    "gru T3 B0 I4 H5",
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("widest", [64, 0], ids=["persistent", "steps"])
def test_recurrent(name, widest, monkeypatch):
    from fastnets.kernels import recurrent

    monkeypatch.setattr(recurrent, "_PERSISTENT", {False: widest, True: widest})
    (case,) = (case for case in table.CASES if case.name == name)
    check(case, torch.float32 if CASES.index(name) % 2 else torch.bfloat16)


def test_lengths_that_lie_are_harmless():
    x, h, w = torch.randn(3, 2, 4), torch.randn(2, 4), torch.randn(4, 4)
    operator = torch.ops.fastnets_triton.recurrent_forward
    for lengths in ([-1, 9], [3, 3]):
        y = operator(x, h, None, w, w, None, None, None, torch.tensor(lengths), 2, False, False, False)[0]
        assert torch.isfinite(y).all()


def test_a_layer_in_a_graph():
    layer = fastnets.nn.GRU(4, 6)
    x = torch.randn(3, 2, 4, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with fastnets.backend("triton"), full_precision():
        ours = compiled(x)[0]
    theirs = layer(x)[0]
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(out.square().sum(), (x, *layer.parameters())) for out in (ours, theirs)]
    torch.testing.assert_close(*grads)

"""The recurrent layers' Triton kernels under the interpreter: each cell and option, persistent and step by step."""

import pytest
import torch
from test_triton import check, interpreted

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
    "lstm T7 B8 I19 H17, peephole",
    "lstm T7 B8 I19 H17, expected zoneout",
    "lstm T7 B9 I6 H20, reverse, unsorted lengths, projected to 5, " + table._EVERY,
    "lstm T7 B9 I6 H20, unsorted lengths, projected to 5, " + table._ELEMENTWISE,
    "lstm T0 B3 I4 H5, " + table._EVERY,
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

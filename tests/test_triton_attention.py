"""Attention's Triton kernels under the interpreter: each option once, the rest of the table is `verify`'s."""

import pytest
import torch
from test_triton import check, interpreted

import fastnets
from fastnets import testing
from fastnets.ops.attention import attention
from fastnets.testing import attention as table

pytestmark = interpreted

CASES = (
    "L65x37 D80, Dv 1",
    "L65x37 causal, bottom right, empty rows",
    "L200x130 window (1, 1), empty rows",
    "Lk 0",
    "boolean mask, empty rows",
    "bias [H, 1, Lk]",
    "ALiBi, causal, window, soft cap, grouped",
    "log-sum-exp, bias, grouped",
    "weights, dropout, causal, grouped",
    "sequences, causal, window, dropout",
    "L1x200 D64",
)


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    (case,) = (case for case in table.CASES if case.name == name)
    check(case, torch.bfloat16 if CASES.index(name) % 5 else torch.float32)  # whose tiles are smaller


@pytest.mark.parametrize("keys", [16, 32, 64, 128])
def test_every_tile_drops_the_same_weights(keys, monkeypatch):
    from fastnets.kernels import attention as forward
    from fastnets.kernels import attention_backward as backward

    for module, name in ((forward, "_TILES"), (backward, "_TILES_KEYS"), (backward, "_TILES_QUERIES")):
        monkeypatch.setattr(module, name, {8: {4: {64: ((64, keys, 4, 1),) * 2}}})
    case = testing.Case(
        op="attention",
        name="dropout",
        inputs=lambda generator: {
            name: torch.randn(1, 2, 130, 8, generator=generator, dtype=torch.float64) for name in "qkv"
        },
        function=lambda q, k, v: (torch.manual_seed(0), attention(q, k, v, dropout=0.4, right=0))[1],
    )
    check(case, torch.float32)


def test_a_mask_may_lie_anywhere():
    q, k, v = (torch.randn(2, 2, n, 8) for n in (5, 7, 7))
    mask = torch.randn(7, 2, 5, 3).permute(3, 1, 2, 0)[1:]  # strides of no order
    mask.requires_grad_()
    with fastnets.backend("triton"):
        ours = fastnets.functional.scaled_dot_product_attention(q, k, v, mask)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, theirs)
    grads = (torch.autograd.grad(out.square().sum(), mask)[0] for out in (ours, theirs))
    torch.testing.assert_close(*grads)


def test_bad_sequence_bounds_stay_within_the_tensors():
    q = torch.randn(1, 2, 10, 8)
    seed = None
    for starts in ([0, 20, 5], [-3, 4, 10], [0, 0, 99]):
        starts = torch.tensor(starts)
        torch.ops.fastnets_triton.attention_forward(
            q, q, q, None, None, seed, starts, starts, 1.0, 0.0, None, None, None, 0.0, False
        )

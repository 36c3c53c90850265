"""Convolution's Triton kernels under the interpreter: each kind once, the rest of the table is `verify`'s."""

import pytest
import torch
from test_triton import check, interpreted

import fastnets
from fastnets.testing import conv as table
from fastnets.testing import full_precision, tolerances

pytestmark = interpreted

CASES = (
    "2x5x9x7 -> 6, 3x3, channels last",
    "2x12x10x10 -> 18, 3x3, 3 groups",
    "2x17x3x12x9 -> 20, 1x3x3",
    "2x8x14x9 -> 40, 2x5, mixed, channels last",
    "2x13x9x9 -> 39, 3x3, depthwise times 3",
    "2x33x50, 4, depthwise, channels last",
    "1x4x9x6x5 -> 6, 2x3x1, stride 2",
    "2x9x8x7 -> 35, 3x3, tanh, residual, channels last",
    "2x20x6x5, transposed -> 36, 4x3, mixed, silu",
    "2x12x8x9, transposed, 4x4, depthwise, channels last",
    "0x3x8x8 -> 4, 3x3",
)


@pytest.mark.parametrize("name", CASES)
def test_conv(name):
    (case,) = (case for case in table.CASES if case.name == name)
    check(case, torch.float32 if CASES.index(name) % 2 else torch.bfloat16)


def test_the_pixels_of_a_weight_gradient_are_divided(monkeypatch):
    from fastnets.kernels import conv

    (case,) = (case for case in table.CASES if case.name == "2x9x8x7 -> 35, 3x3, relu, residual")
    monkeypatch.setattr(conv, "processors", lambda like: 40)
    monkeypatch.setattr(conv, "_TILES", {8: {4: ((16, 32, 8, 4, 1), (16, 64, 8, 4, 1))}})
    check(case, torch.float32)


def test_a_weight_of_any_strides():
    x, weight = torch.randn(2, 6, 7, 5), torch.randn(3, 3, 6, 8).permute(3, 2, 1, 0).requires_grad_()
    with fastnets.backend("triton"), full_precision():
        ours = fastnets.functional.conv2d(x, weight, padding=1)
    theirs = torch.nn.functional.conv2d(x, weight, padding=1)
    exact = weight.detach().double().requires_grad_()
    truth = torch.nn.functional.conv2d(x.double(), exact, padding=1)
    results = [(out, *torch.autograd.grad(out.square().sum(), weight)) for out in (ours, theirs)]
    truths = (truth, *torch.autograd.grad(truth.square().sum(), exact))
    for mine, measure, value in zip(*results, truths, strict=True):
        _, largest = tolerances(measure - value, value, torch.float32)
        assert (mine - value).abs().max() <= largest

"""Convolutions of any shape and options, drawn by hypothesis."""

import contextlib
import math

import pytest
import torch
from convolutions import FLOATING, gradients, innermost
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnets import functional
from fastnets.reference.conv import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@st.composite
def calls(draw):
    """A function's name, the shapes of input, weight and bias, and options, most of them valid."""
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups, ins, outs = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 20))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    batch = draw(st.integers(0, 3))
    options = {"stride": each(1, 3), "padding": each(0, 3), "dilation": each(1, 3), "groups": groups}
    if transposed:
        options["output_padding"] = each(0, 1)
        weight = (ins * groups, outs, *each(1, 4))
    else:
        weight = (outs * groups, ins, *each(1, 4))
    name = f"conv{'_transpose' if transposed else ''}{dims}d"
    return name, (batch, ins * groups, *each(1, 9)), weight, outs * groups, options


@st.composite
def larger_calls(draw):
    """As calls(), of two dimensions: large enough for kernels that want whole vectors, many rows or few channels."""
    channels = st.one_of(st.integers(1, 4), st.integers(5, 40))
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (5, 5), (7, 7), (5, 3), (1, 1)]))
    step, ins = draw(st.integers(1, 3)), draw(channels)
    options = {"stride": step, "padding": draw(st.integers(0, 3)), "dilation": draw(st.sampled_from([1, 1, 2]))}
    x = draw(st.integers(1, 2)), ins, draw(st.integers(8, 48)), draw(st.integers(8, 90))
    if draw(st.booleans()):
        outs = ins * draw(st.integers(1, 2))
        return "conv2d", x, (outs, 1, *kernel), outs, {**options, "groups": ins}
    outs = draw(channels)
    return "conv2d", x, (outs, ins, *kernel), outs, options


@settings(max_examples=400, deadline=None)
@given(call=larger_calls(), data=st.data())
def test_any_larger_shape(call, data):
    depth = math.prod(call[2][1:])
    check(call, data, weight_scale=depth**-0.5)  # sums of about 1: an activation leaves no larger error than they have


@settings(max_examples=150, deadline=None)
@given(call=calls(), data=st.data())
def test_any_shape_and_option(call, data):
    check(call, data)


def check(call, data, weight_scale=1.0):
    name, x_shape, weight_shape, channels, options = call
    dtype = data.draw(st.sampled_from(FLOATING))
    x, weight, bias = torch.randn(x_shape), weight_scale * torch.randn(weight_shape), torch.randn(channels)
    x, weight, bias = (t.to(dtype).requires_grad_() for t in (x, weight, bias))
    if data.draw(st.booleans()):
        x = innermost(x)
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)))
    try:
        y = getattr(functional, name)(x, weight, bias, **options, activation=activation)
    except ValueError:
        # In float64: oneDNN's own float32 convolution is not safe on every shape.
        # What it takes that ours refuses is empty.
        with contextlib.suppress(RuntimeError):
            stock = getattr(torch.nn.functional, name)(x.double(), weight.double(), bias.double(), **options)
            assert stock.numel() == 0
        return
    if y.numel() == 0:
        return
    stock = ACTIVATIONS[activation](
        getattr(torch.nn.functional, name)(x.double(), weight.double(), bias.double(), **options)
    )
    leaves = [x, weight, bias]
    expected = [stock, *gradients(stock, leaves)]
    # Sums of n products lose a few epsilons of their largest term; 16 bits round the intermediate gradient as well.
    size = max(16, y.numel() // channels, weight[0].numel())
    tolerance = torch.finfo(dtype).eps * 4 * size**0.5
    for found, true in zip([y, *gradients(y, leaves)], expected, strict=True):
        scale = max(1.0, true.abs().max().item())
        assert found.shape == true.shape
        assert (found.double() - true.double()).abs().max().item() <= tolerance * scale

"""The softmax family beyond the operator table: PyTorch's own samples, double backward, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import op_db

import fastnets
from fastnets.functional import softmax

SOFTMAX = [op for op in op_db if op.name == "softmax"]


@pytest.mark.parametrize("op", SOFTMAX, ids=lambda op: op.variant_test_name or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_samples_of_torch(op, dtype):
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        ours = softmax(sample.input, *sample.args, **sample.kwargs)
        theirs = torch.softmax(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, theirs)
        weight = torch.randn_like(ours)
        (mine,) = torch.autograd.grad(ours, sample.input, weight)
        (stock,) = torch.autograd.grad(theirs, sample.input, weight)
        # Both round differences of products to dtype: an epsilon of what was subtracted.
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=2 * torch.finfo(dtype).eps)
        count += 1
    assert count > 0


def test_gradients_of_gradients():
    x = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(7, 1, dtype=torch.float64, requires_grad=True)

    def scaled(x, mask):
        return softmax(x, 1, scale=0.7, mask=mask)

    assert torch.autograd.gradcheck(scaled, (x, mask))
    assert torch.autograd.gradgradcheck(scaled, (x, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, grad = torch.randn(4, 5, 6, dtype=dtype), torch.randn(4, 5, 6, dtype=dtype)
    mask = torch.rand(5, 1).lt(0.5).expand(4, 5, 6)
    torch.library.opcheck(torch.ops.fastnets.softmax_forward, (x, None, 1, 1.0))
    torch.library.opcheck(torch.ops.fastnets.softmax_forward, (x, mask, 2, 0.5))
    torch.library.opcheck(torch.ops.fastnets.softmax_backward, (grad, x.softmax(0), 0, 2.0))


def test_empty_rows_give_zeros_and_zero_gradients():
    x = torch.randn(2, 5, requires_grad=True)
    y = softmax(x, -1, mask=torch.tensor([[False], [True]]))
    assert y[0].eq(0).all()
    assert y[1].sum().isclose(torch.tensor(1.0))
    y.square().sum().backward()
    assert x.grad[0].eq(0).all()
    assert x.grad.isfinite().all()


def test_nan_and_infinities_follow_torch():
    x = torch.tensor([[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf, 1.0, 2.0], [1e30, -1e30, 0.0]])
    torch.testing.assert_close(softmax(x, -1), torch.softmax(x, -1), equal_nan=True)


shapes = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, data=st.data())
def test_any_shape_and_mask(shape, data):
    torch.manual_seed(data.draw(st.integers(0, 1 << 20)))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    mask_shape = tuple(data.draw(st.sampled_from(sorted({1, size}))) for size in shape)
    x = torch.randn(shape).to(dtype).movedim(0, -1).movedim(-1, 0)
    kind = data.draw(st.sampled_from(["none", "boolean", "additive"]))
    mask = {"none": None, "boolean": torch.rand(mask_shape) < 0.6, "additive": torch.randn(mask_shape).to(dtype)}[kind]
    exact = mask.double() if kind == "additive" else mask
    with fastnets.backend("reference"):
        expected = softmax(x.double(), dim, scale=0.5, mask=exact)
    got = softmax(x, dim, scale=0.5, mask=mask)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "input: expected a Tensor, got list", lambda: ([1.0], 0)),
        (TypeError, "input: expected float32", lambda: (torch.ones(3, dtype=torch.int64), 0)),
        (IndexError, "dim: expected a value in \\[-2, 1\\], got 2", lambda: (torch.ones(3, 3), 2)),
        (
            ValueError,
            "mask: expected a shape that broadcasts to \\(3, 4\\)",
            lambda: (torch.ones(3, 4), 1, torch.ones(3)),
        ),
        (TypeError, "mask: expected torch.float32 like input", lambda: (torch.ones(3), 0, torch.ones(3).double())),
        (TypeError, "mask: expected a Tensor", lambda: (torch.ones(3), 0, 1.0)),
    ],
)
def test_errors_name_the_argument(error, words, arguments):
    input, dim, *mask = arguments()
    with pytest.raises(error, match=words):
        softmax(input, dim, mask=mask[0] if mask else None)


def test_transforms_of_torch_func():
    x, mask = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def loss(function):
        return lambda x, mask: function(x, -1, mask).square().sum()

    ours = loss(lambda x, dim, mask: softmax(x, dim, mask=mask))
    stock = loss(lambda x, dim, mask: torch.softmax(x + mask, dim))
    for transform in (
        lambda f: torch.func.vmap(f, in_dims=(0, None)),
        lambda f: torch.func.grad(f, argnums=(0, 1)),
        lambda f: torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), in_dims=(0, None)),
        lambda f: torch.func.jacrev(torch.func.grad(f)),
    ):
        torch.testing.assert_close(transform(ours)(x, mask), transform(stock)(x, mask))


@pytest.mark.parametrize("columns", [16, 37, 1001])
def test_results_past_the_caches(columns):
    """Results of more than 4 MiB of 16 in all are streamed, from the first aligned vector of each row."""
    x = torch.randn((10 << 20) // 4 // columns, columns, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with fastnets.backend("cpu"):
        y = softmax(x, -1)
        found = torch.autograd.grad(y, x, grad)
    stock = torch.softmax(x, -1)
    torch.testing.assert_close(y, stock)
    torch.testing.assert_close(found, torch.autograd.grad(stock, x, grad), rtol=1e-5, atol=1e-6)

"""The CUDA convolutions on the SIMT device, beyond the operator table: shapes, tiles, schedules, counters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnets
from fastnets import dispatch, functional, testing
from fastnets.reference.conv import ACTIVATIONS
from fastnets.testing.conv import conv_case

pytestmark = pytest.mark.skipif(dispatch.why_missing("simt") is not None, reason=str(dispatch.why_missing("simt")))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def cases(draw, dtype):
    """Any convolution small enough for the SIMT device.

    In float32 every sum has at least 8 terms: three TF32 products are off by up to 6 eps each, where PyTorch's one
    product is off by half of one, and the rule's floor is the eps of the largest result.
    """
    few = [] if dtype == torch.float32 else [1, 2, 3, 4]
    dims = draw(st.integers(1, 3))

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5, 24]))
    per_group = [draw(st.sampled_from([*few, 8, 9, 16, 40, 70])) for _ in range(2)]
    if groups > 1:
        per_group = [min(n, 9 if groups < 24 else 1) for n in per_group]
    kernel, stride, dilation = each(1, 4 if dims < 3 else 3), each(1, 3), each(1, 3)
    padding = tuple(draw(st.integers(0, d * (k - 1) + 1)) for d, k in zip(dilation, kernel, strict=True))
    extra = tuple(draw(st.integers(0, (24, 9, 4)[dims - 1])) for _ in range(dims))
    least = (d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True))
    if transposed:  # size and padding such that something is left
        least = ((2 * p - d * (k - 1)) // s + 2 for d, k, p, s in zip(dilation, kernel, padding, stride, strict=True))
    size = tuple(max(1, n) + more for n, more in zip(least, extra, strict=True))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        limits = zip(stride, dilation, strict=True)
        options["output_padding"] = tuple(draw(st.integers(0, max(pair) - 1)) for pair in limits)
    batches = [1, 2, 3, 0] if dtype != torch.float32 else [8, 0]
    x = (draw(st.sampled_from(batches)), groups * per_group[0], *size)
    weight = (x[1], per_group[1], *kernel) if transposed else (groups * per_group[1], per_group[0], *kernel)
    return conv_case(
        f"{x} {weight} {options}",
        x,
        weight,
        transposed=transposed,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        channels_last=draw(st.booleans()),
        **options,
    )


@settings(max_examples=12, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_shape(data, dtype):
    case = data.draw(cases(dtype))
    outcome = testing.check(case, dtype, "simt")
    assert outcome.passed, f"{outcome.where}: error {outcome.error:.3g}, tolerance {outcome.tolerance:.3g}"


# Enough pixels for the tiles of 128 rows: 133 of them.
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "tile"), [(5, (128, 32)), (70, (128, 128))])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tiles_of_many_pixels(device, dtype, channels, tile, channels_last):
    x = torch.randint(-3, 4, (1, 4, 130, 130)).to(dtype)
    weight = torch.randint(-1, 2, (channels, 4, 1, 3)).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with fastnets.backend("simt"), testing.full_precision():
        y = functional.conv2d(x, weight, padding=(0, 1))
    assert y.equal(torch.nn.functional.conv2d(x.float(), weight.float(), padding=(0, 1)).to(dtype))
    # Every block multiplies one stage of the depth: four mma, for float32 times three.
    products = 3 if dtype == torch.float32 else 1
    assert device.counters()["conv_forward"]["mma"] == 133 * (tile[0] // 16) * (tile[1] // 8) * 4 * products


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_of_the_depth_in_every_schedule(device, seed, channels_last):
    device.set_seed(seed)
    x, weight = torch.randn(2, 120, 6, 6), torch.randn(8, 120, 3, 3)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_(), weight.requires_grad_()
    with fastnets.backend("simt"), testing.full_precision():
        y = functional.conv2d(x, weight, padding=1)
        grads = torch.autograd.grad(y, (x, weight), grad := torch.randn(y.shape))
    stock = torch.nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(y, stock, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads, torch.autograd.grad(stock, (x, weight), grad), rtol=1e-4, atol=1e-4)
    assert device.counters()["conv_gather_shares"]["launches"] == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_tf32_where_the_switch_allows_it(device, transposed):
    x, weight = torch.randn(2, 32, 9, 9), torch.randn(32, 32, 3, 3)
    conv = functional.conv_transpose2d if transposed else functional.conv2d
    stock = getattr(torch.nn.functional, conv.__name__)
    rounded = [((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double() for t in (x, weight)]

    def products():
        return device.counters()["conv_grad_input" if transposed else "conv_forward"]["mma"]

    with fastnets.backend("simt"), testing.full_precision():
        exact = conv(x, weight)
        before = products()
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        y = conv(x, weight)
    assert products() - before == before // 3
    torch.testing.assert_close(exact.double(), stock(x.double(), weight.double()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(y.double(), stock(*rounded), rtol=1e-5, atol=1e-4)
    assert (y - exact).abs().max() > 1e-3


PRODUCTS = ("conv_forward", "conv_grad_input", "conv_grad_weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_no_bank_conflicts_and_whole_sectors(device, dtype, channels_last):
    x, weight = torch.randn(2, 64, 8, 8, dtype=dtype), torch.randn(64, 64, 3, 3, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_(), weight.requires_grad_()
    with fastnets.backend("simt"):
        functional.conv2d(x, weight, padding=1).sum().backward()
    found = device.counters()
    assert found["conv_arrange"]["launches"] == (2 if channels_last else 6)
    del found["conv_arrange"]  # of weights, with few taps: whole sectors cost conflicts
    for name, counters in found.items():
        assert counters["shared_load_conflicts"] == counters["shared_store_conflicts"] == 0, name
    for name in PRODUCTS:
        assert found[name]["global_load_sectors"] * 32 <= found[name]["global_load_bytes"], name
        assert found[name]["global_store_sectors"] * 32 == found[name]["global_store_bytes"], name


def test_too_large_a_dimension_is_an_error():
    x, weight = torch.zeros(1, 1, 3), torch.zeros(1, 1, 2)
    with fastnets.backend("simt"), pytest.raises(ValueError, match=r"fewer than 2\^29 positions along a dimension"):
        functional.conv1d(x, weight, padding=2**28, dilation=2**29, stride=2**30)

"""CUDA attention's gradients on the SIMT device: what the operator table does not show."""

import pytest
import torch

import fastnets
from fastnets import dispatch, testing
from fastnets.ops.attention import attention
from fastnets.testing.attention import _case, _ours

pytestmark = pytest.mark.skipif(dispatch.why_missing("simt") is not None, reason=str(dispatch.why_missing("simt")))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("attention_row_terms", "attention_grad_kv", "attention_grad_q", "attention_grad_mask")


def draw(lq=65, lk=65, d=64, dv=64, heads=2, kv_heads=2, mask=None, dtype=torch.bfloat16):
    shapes = [(1, heads, lq, d), (1, kv_heads, lk, d), (1, kv_heads, lk, dv)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes + ([mask] if mask else [])]


def gradients(inputs, backend="simt", **options):
    """Of everything that attention returns, in q, k, v and the mask."""
    torch.manual_seed(0)
    q, k, v, *mask = inputs
    with fastnets.backend(backend):
        found = testing.flatten(attention(q, k, v, mask=mask[0] if mask else None, **options))
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in found]
        return torch.autograd.grad(found, inputs, grads)


def assert_passes(case, dtype):
    outcome = testing.check(case, dtype, "simt")
    assert outcome.passed, f"{outcome.where}: error {outcome.error:.3g}, tolerance {outcome.tolerance:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 40, 64, 80, 96, 128, 192, 256])
def test_head_dimensions(dtype, width):
    """Both kernels of every width; the other head's is another, the lengths end within tiles of 16, 32 and 64."""
    assert_passes(_case("", (1, 2, 1, 81, 49, width, 264 - width), is_causal=True), dtype)
    assert_passes(_ours("", (1, 1, 1, 33, 81, width, width), (1, 1, 33, 81), softcap=2.0, return_lse=True), dtype)


@pytest.mark.parametrize("length", [1, 17, 127, 129])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(length, dtype):
    assert_passes(_case("", (1, 2, 2, length, length, 32, 32), is_causal=True), dtype)
    assert_passes(_case("", (1, 1, 1, length, 130 - length, 32, 32)), dtype)


@pytest.mark.parametrize("mask", [(2, 70), (70, 1), (1, 1, 1, 70), (1, 4, 70, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(mask, dtype):
    lq = 2 if mask == (2, 70) else 70
    assert_passes(_ours("", (1, 4, 2, lq, 70, 16, 16), mask, window_size=(30, 20), return_lse=True), dtype)


def test_tf32():
    inputs = draw(dtype=torch.float32)
    true = gradients(inputs, "reference")
    former = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rounded = gradients(inputs)
    finally:
        torch.backends.cuda.matmul.fp32_precision = former
    for ours, exact, truth in zip(rounded, gradients(inputs), true, strict=True):
        assert (exact - truth).abs().max() < 5e-6
        assert 5e-5 < (ours - truth).abs().max() < 1e-2


@pytest.mark.parametrize("options", [{}, {"right": 0, "dropout": 0.3, "softcap": 3.0}], ids=["plain", "general"])
@pytest.mark.parametrize("mask", [None, (1, 1, 1, 70), (1, 4, 70, 70)], ids=str)
def test_every_schedule_gives_the_same_bits(device, mask, options):
    inputs = draw(lq=70, lk=70, heads=4, mask=mask)
    first = gradients(inputs, **options)
    for seed in (1, 2):
        device.set_seed(seed)
        for ours, expected in zip(gradients(inputs, **options), first, strict=True):
            assert ours.equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 64, 128, 256])
def test_no_bank_conflicts(device, width, dtype):
    gradients(draw(d=width, dv=width, dtype=dtype), right=0)
    gradients(draw(d=width, dv=width, mask=(65, 65), dtype=dtype), dropout=0.5)
    gradients(draw(d=width, dv=width, mask=(1, 65), dtype=dtype))
    gradients(draw(d=width, dv=width, mask=(65, 1), dtype=dtype), return_lse=True)
    found = {name: device.counters()[name] for name in KERNELS}
    assert sum(counters["shared_load_requests"] for counters in found.values()) > 0
    for counters in found.values():
        assert counters["shared_load_conflicts"] == counters["shared_store_conflicts"] == 0


def test_tiles_that_nobody_sees_are_left_out(device):
    """16 own rows by 64 of the other side's, 16 products of 16 x 8 x 16 an operand's tile: 4 for k and v, 3 for q."""
    length, left = 256, 63
    gradients(draw(lq=length, lk=length), left=left, right=0)
    for kernel, products in (("attention_grad_kv", 4), ("attention_grad_q", 3)):
        tiles = 0
        for own in range(0, length, 16):
            first, last = (own, own + 15 + left) if kernel == "attention_grad_kv" else (own - left, own + 15)
            tiles += min(last, length - 1) // 64 - max(first, 0) // 64 + 1
        assert device.counters()[kernel]["mma"] == 2 * tiles * products * 32
        assert tiles < length // 16 * (length // 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_a_launch_that_does_not_fit_raises(device, dtype, width):
    inputs = draw(d=width, dv=width, mask=(65, 65), dtype=dtype)
    device.set_shared_limit(99 << 10)  # of 8.6, 8.9 and 12.0
    gradients(inputs)
    with fastnets.backend("simt"):
        out = attention(*inputs[:3], mask=inputs[3])
    device.set_shared_limit(40 << 10)
    with pytest.raises(RuntimeError, match="shared memory"):
        torch.autograd.grad(out.sum(), inputs)


def test_sequences_that_reach_beyond_the_rows_are_cut():
    q, k, v = (t.detach().float() for t in draw(lq=5, lk=7))
    starts = [torch.tensor(values) for values in ([0, 2, 5], [0, 3, 7], [-4, 2, 99], [0, 3, 1 << 40])]
    rest = (0.3, 0.0, None, None, 0, 0.0, False)
    library = torch.ops.fastnets_simt
    out, lse = library.attention_forward(q, k, v, None, None, None, *starts[:2], *rest)

    def run(starts):
        extra = (None, None, None, *starts, *rest, False, True)
        return library.attention_backward(torch.ones_like(out), None, None, q, k, v, out, lse, *extra)[:3]

    for ours, right in zip(run(starts[2:]), run(starts[:2]), strict=True):
        assert ours.equal(right)

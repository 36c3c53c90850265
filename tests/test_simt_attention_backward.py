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
ADDING = ("attention_row_terms", "attention_grad_kv", "attention_round_q")


def draw(lq=65, lk=65, d=64, dv=64, heads=2, kv_heads=2, mask=None, dtype=torch.bfloat16):
    shapes = [(1, heads, lq, d), (1, kv_heads, lk, d), (1, kv_heads, lk, dv)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes + ([mask] if mask else [])]


def gradients(inputs, backend="simt", deterministic=True, **options):
    """Of everything that attention returns, in q, k, v and the mask."""
    torch.manual_seed(0)
    q, k, v, *mask = inputs
    with fastnets.backend(backend), testing.deterministic(deterministic):
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


@pytest.mark.parametrize("options", [{}, {"right": 0, "dropout": 0.3}], ids=["plain", "general"])
def test_where_bits_may_differ_keys_add_to_queries(device, options):
    inputs = draw(lq=70, lk=150, heads=4, mask=(70, 150))
    exact = gradients(inputs, **options)
    assert device.counters().keys() >= set(KERNELS)
    device.reset_counters()
    for seed in (0, 1):
        device.set_seed(seed)
        found = gradients(inputs, deterministic=False, **options)
        for ours, expected, name in zip(found, exact, ("q", "k", "v", "mask"), strict=True):
            if name == "q":
                torch.testing.assert_close(ours, expected)
            else:
                assert ours.equal(expected)
    assert device.counters().keys() >= set(ADDING)
    assert "attention_grad_q" not in device.counters()


@pytest.mark.parametrize("lq", [300, 2100])
def test_keys_add_unless_that_leaves_multiprocessors_idle(device, lq):
    """One block of keys for the device's 16 multiprocessors: for 3 blocks of queries, not for 17."""
    gradients(draw(lq=lq, lk=70, heads=1, kv_heads=1), deterministic=False)
    assert ("attention_round_q" in device.counters()) == (lq == 300)
    assert ("attention_grad_q" in device.counters()) == (lq == 2100)


def test_sequences_of_few_keys_keep_a_kernel_of_their_own(device):
    """Whose rows a tile holds whole: what the softmax subtracts comes from the weights, in both ways."""
    q, k, v = draw(lq=100, lk=150)
    starts_q, starts_k = torch.tensor([0, 7, 60, 100]), torch.tensor([0, 64, 65, 150])
    exact = gradients([q, k, v], starts_q=starts_q, starts_k=starts_k)
    device.reset_counters()
    found = gradients([q, k, v], starts_q=starts_q, starts_k=starts_k, deterministic=False)
    assert device.counters().keys() >= {"attention_grad_q", *ADDING}
    assert found[0][:, :, :60].equal(exact[0][:, :, :60])
    torch.testing.assert_close(found[0], exact[0])
    assert all(ours.equal(expected) for ours, expected in zip(found[1:], exact[1:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 64, 128, 256])
def test_no_bank_conflicts(device, width, dtype):
    gradients(draw(lk=150, d=width, dv=width, dtype=dtype), deterministic=False, right=0)
    assert device.counters()["attention_round_q"]["launches"] == 1
    gradients(draw(d=width, dv=width, dtype=dtype), right=0)
    gradients(draw(d=width, dv=width, mask=(65, 65), dtype=dtype), dropout=0.5)
    gradients(draw(d=width, dv=width, mask=(1, 65), dtype=dtype))
    gradients(draw(d=width, dv=width, mask=(65, 1), dtype=dtype), return_lse=True)
    found = {name: device.counters()[name] for name in KERNELS}
    assert sum(counters["shared_load_requests"] for counters in found.values()) > 0
    for counters in found.values():
        assert counters["shared_load_conflicts"] == counters["shared_store_conflicts"] == 0


def test_tiles_that_nobody_sees_are_left_out(device):
    """16 keys by 32 queries, 16 queries by 64 keys; 16 products of 16 x 8 x 16 for 16 by 32: 4 for k and v, 3 for q."""
    length, left = 256, 63
    gradients(draw(lq=length, lk=length), left=left, right=0)
    for kernel, streamed, products in (("attention_grad_kv", 32, 4), ("attention_grad_q", 64, 3)):
        tiles = 0
        for own in range(0, length, 16):
            first, last = (own, own + 15 + left) if kernel == "attention_grad_kv" else (own - left, own + 15)
            tiles += min(last, length - 1) // streamed - max(first, 0) // streamed + 1
        assert device.counters()[kernel]["mma"] == 2 * tiles * products * streamed // 2
        assert tiles < length // 16 * (length // streamed)


def test_what_adding_costs(device):
    """Five products of 64 x 64 x 64 instead of seven; q's gradient once for every block of keys, in whole sectors."""
    length, width, heads = 256, 64, 2
    inputs = draw(lq=length, lk=length, d=width, heads=heads)
    for deterministic, products in ((True, 7), (False, 5)):
        device.reset_counters()
        gradients(inputs, deterministic=deterministic)
        counters = device.counters()
        assert sum(counters[k]["mma"] for k in counters) - counters["attention_forward"]["mma"] == (
            heads * (length // 64) ** 2 * products * 128
        )
    assert counters["attention_grad_kv"]["atomic_sectors"] * 32 == heads * length // 128 * length * width * 4


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

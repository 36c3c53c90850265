"""CUDA attention on the SIMT device: what the operator table does not show. Values in all options are its matter."""

import pytest
import torch

import fastnets
from fastnets import dispatch
from fastnets.ops.attention import attention

pytestmark = pytest.mark.skipif(dispatch.why_missing("simt") is not None, reason=str(dispatch.why_missing("simt")))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(batch=1, heads=2, kv_heads=2, lq=65, lk=65, d=64, dv=64, dtype=torch.bfloat16):
    shapes = (batch, heads, lq, d), (batch, kv_heads, lk, d), (batch, kv_heads, lk, dv)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def simt(*inputs, **options):
    with fastnets.backend("simt"):
        return attention(*inputs, **options)


def total(device, name):
    return sum(counters[name] for counters in device.counters().values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 40, 64, 96, 128, 192, 256])
def test_no_bank_conflicts(device, width, dtype):
    bias = torch.randn(65)
    simt(*draw(heads=1, kv_heads=1, d=width, dv=width, dtype=dtype), right=0, return_weights=True)
    simt(*draw(heads=1, kv_heads=1, d=width, dv=width, dtype=dtype), mask=bias, dropout=0.5)
    simt(*draw(heads=1, kv_heads=1, lq=1, d=width, dv=width, dtype=dtype))
    assert total(device, "shared_load_requests") > 0
    assert total(device, "shared_load_conflicts") == total(device, "shared_store_conflicts") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_is_moved_once(device, dtype):
    """One tile of queries: q, k and v are read once, in whole sectors; out is written so, and lse."""
    q, k, v = draw(heads=1, kv_heads=1, lq=128, lk=96, dtype=dtype)
    out, lse = simt(q, k, v, return_lse=True)
    counters = device.counters()["attention_forward"]
    assert counters["global_load_bytes"] == sum(t.nbytes for t in (q, k, v))
    assert counters["global_load_sectors"] * 32 == counters["global_load_bytes"]
    assert counters["global_store_bytes"] == out.nbytes + lse.nbytes
    assert counters["global_store_sectors"] * 32 == counters["global_store_bytes"]


@pytest.mark.parametrize(
    ("options", "seen"),
    [({"right": 0}, range(4)), ({"left": 63, "right": 0}, range(2)), ({"left": 0, "right": 63}, range(2))],
    ids=["causal", "window", "window ahead"],
)
def test_tiles_that_nobody_sees_are_left_out(device, options, seen):
    """A warp computes what its 32 queries see of tiles of 64 keys; 64 products of 16 x 8 x 16 each way a tile."""
    length, rows, keys, products = 256, 32, 64, 128
    simt(*draw(heads=16, kv_heads=16, lq=length, lk=length), **options)
    tiles = 0
    for first in range(0, length, rows):
        low = max(first - options.get("left", length), 0)
        high = min(first + rows - 1 + options["right"], length - 1)
        tiles += high // keys - low // keys + 1
    assert device.counters()["attention_forward"]["mma"] == 16 * tiles * products
    assert tiles < length // rows * (length // keys)


def test_the_keys_of_few_queries_are_divided(device):
    q, k, v = draw(heads=8, lq=1, lk=2000)
    options = {"return_lse": True, "softcap": 3.0}
    found = simt(q, k, v, **options)
    counters = device.counters()
    assert counters["attention_combine"]["launches"] == 1
    # Four query heads share a tile: k and v are read once, q by each of seven divisions.
    assert counters["attention_forward"]["global_load_bytes"] == 7 * q.nbytes + k.nbytes + v.nbytes
    true = attention(*(t.double() for t in (q, k, v)), **options)
    for ours, exact in zip(found, true, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment_change_no_bit(dtype):
    q, k, v = draw(lq=37, lk=65, d=40, dv=24, dtype=dtype)
    expected = simt(q, k, v, right=0)

    def moved(t, pitch, shift):
        batch, heads, length, width = t.shape
        memory = torch.full((batch * heads * length * pitch + shift + width,), float("nan"), dtype=dtype)
        strides = (heads * length * pitch, pitch, heads * pitch, 1)
        return memory[shift:].as_strided(t.shape, strides).copy_(t)

    for pitch, shift in ((48, 0), (44, 4), (42, 2), (41, 1), (43, 0)):
        assert simt(*(moved(t, pitch, shift) for t in (q, k, v)), right=0).equal(expected)


def test_dropout_takes_the_same_weights_on_every_backend():
    q, k, v = draw(heads=4, lq=70, lk=150, dtype=torch.float32)
    dropped = []
    for backend in ("reference", "cpu", "simt"):
        torch.manual_seed(3)
        with fastnets.backend(backend):
            dropped.append(attention(q, k, v, dropout=0.4, return_weights=True)[1] == 0)
    assert 0.35 < dropped[0].float().mean() < 0.45
    assert dropped[0].equal(dropped[1])
    assert dropped[0].equal(dropped[2])


@pytest.mark.parametrize("lq", [1, 130])
def test_every_schedule_gives_the_same_bits(device, lq):
    q, k, v = draw(lq=lq, lk=300)

    def run(seed):
        device.set_seed(seed)
        torch.manual_seed(0)
        return simt(q, k, v, right=0, offset=None, dropout=0.3, return_lse=True)

    first = run(0)
    for seed in (1, 2, 3):
        for ours, expected in zip(run(seed), first, strict=True):
            assert ours.equal(expected)


def test_tf32_where_the_switch_allows_it():
    q, k, v = draw(dtype=torch.float32)
    true = attention(q.double(), k.double(), v.double())
    exact = (simt(q, k, v) - true).abs().max()
    former = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rounded = (simt(q, k, v) - true).abs().max()
        half = simt(*(t.bfloat16() for t in (q, k, v)))
    finally:
        torch.backends.cuda.matmul.fp32_precision = former
    assert exact < 2e-6
    assert 1e-5 < rounded < 1e-2
    assert half.equal(simt(*(t.bfloat16() for t in (q, k, v))))


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_launch_that_does_not_fit_raises(device, dtype, width):
    inputs = draw(d=width, dv=width, dtype=dtype)
    device.set_shared_limit(99 << 10)  # of 8.6, 8.9 and 12.0
    simt(*inputs, return_weights=True)
    device.set_shared_limit(40 << 10)
    with pytest.raises(RuntimeError, match="shared memory"):
        simt(*inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_spoils_its_own_row_alone(dtype, value):
    q, k, v = draw(lq=70, lk=70, dtype=dtype)
    expected = simt(q, k, v)
    q[0, 1, 3, 2] = value
    found = simt(q, k, v)
    assert found[0, 1, 3].isnan().all()
    found[0, 1, 3] = expected[0, 1, 3]
    assert found.equal(expected)


def test_too_wide_heads_are_objected_to():
    with pytest.raises(NotImplementedError, match="up to 256, not 264"):
        simt(*draw(d=264, dv=8))


def test_sequences_that_reach_beyond_the_rows_are_cut():
    """A GPU's operator cannot look at cu_seqlens; its kernels keep within the tensors."""
    q, k, v = (t.float() for t in draw(lq=5, lk=7))
    starts = [torch.tensor(values) for values in ([0, 2, 5], [0, 3, 7], [-4, 2, 99], [0, 3, 1 << 40])]
    run = torch.ops.fastnets_simt.attention_forward
    rest = (0.3, 0.0, None, None, 0, 0.0, False)
    expected = run(q, k, v, None, None, None, *starts[:2], *rest)
    for ours, right in zip(run(q, k, v, None, None, None, *starts[2:], *rest), expected, strict=True):
        assert ours.equal(right)

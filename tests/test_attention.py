"""The attention family beyond the operator table: torch's samples, derivatives, dropout, bad input, memory."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.common_methods_invocations import op_db

from fastnets import dispatch, testing
from fastnets.functional import scaled_dot_product_attention, varlen_attention
from fastnets.ops.attention import attention
from fastnets.reference.philox import philox

cpu_only = pytest.mark.skipif(
    dispatch.why_missing("cpu") is not None, reason=f"no cpu backend: {dispatch.why_missing('cpu')}"
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SAMPLES = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def _qkv(*sizes, dtype=torch.float32, grad=False, seed=0):
    """Tensors of sizes (B, Hq, Hkv, Lq, Lk, D)."""
    batch, heads, kv_heads, lq, lk, width = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, lq, width), (batch, kv_heads, lk, width), (batch, kv_heads, lk, width)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes]


def _outcome(function, sample, dtype):
    """The output and its gradients, of a sample rounded to the parameter's dtype and computed in `dtype`."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in (sample.input, *sample.args)]
    options = {n: t.detach().to(dtype) if isinstance(t, torch.Tensor) else t for n, t in sample.kwargs.items()}
    out = function(*inputs, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(sample.input.dtype).to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_samples(dtype):
    for sample in SAMPLES.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.kwargs["dropout_p"]:
            ours = scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
            assert ours.shape == F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs).shape
            continue
        results = _outcome(scaled_dot_product_attention, sample, dtype)
        stock = _outcome(F.scaled_dot_product_attention, sample, dtype)
        exact = _outcome(F.scaled_dot_product_attention, sample, torch.float64)
        for ours, theirs, truth in zip(results, stock, exact, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(ours, theirs)
                continue
            rms, largest = testing.tolerances(theirs.double() - truth, truth, dtype)
            error = ours.double() - truth
            assert error.square().mean().sqrt() <= rms
            assert error.abs().max() <= largest
    assert SAMPLES.error_inputs_func is None  # torch lists none for this operator


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 8), (7, 8), (7, 9)],
        [(3, 5, 8), (3, 7, 8), (3, 7, 9)],
        [(3, 5, 8), (7, 8), (1, 7, 9)],
        [(1, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 9)],
        [(2, 4, 5, 8), (2, 1, 7, 8), (4, 7, 9)],
        [(2, 1, 3, 5, 8), (4, 3, 7, 8), (2, 4, 1, 7, 9)],
        [(0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 9)],
    ],
)
@pytest.mark.parametrize("mask", [False, True])
def test_broadcasts_as_torch(shapes, mask):
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    bias = torch.randn(5, 7, dtype=torch.float64, requires_grad=True) if mask else None
    leaves = [t for t in (q, k, v, bias) if t is not None]
    ours = scaled_dot_product_attention(q, k, v, bias)
    theirs = F.scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, grad),
        torch.autograd.grad(theirs, leaves, grad, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_key_and_value_with_head_counts_of_their_own():
    q, k, v = torch.randn(2, 8, 5, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 4, 7, 4)
    ours = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@pytest.mark.parametrize(("lq", "lk"), [(5, 5), (3, 7)])
def test_causal_biases(lq, lk):
    q, k, v = _qkv(2, 3, 3, lq, lk, 8)
    for bias in (causal_upper_left(lq, lk), causal_lower_right(lq, lk)):
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, bias)
        )


@pytest.mark.parametrize("offset", [0, None, 3])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_the_options_mean_what_they_say(offset, softcap):
    """Window, ALiBi, soft cap and grouped heads by their formulas, score by score."""
    q, k, v = _qkv(1, 2, 1, 5, 9, 4, dtype=torch.float64)
    slopes, left, right = torch.tensor([0.5, 0.1]), 3, 1
    shift = 9 - 5 if offset is None else offset
    expected = torch.zeros(1, 2, 5, 4, dtype=torch.float64)
    for head in range(2):
        for i in range(5):
            seen = [j for j in range(9) if i + shift - left <= j <= i + shift + right]
            if not seen:
                continue
            scores = torch.stack([q[0, head, i] @ k[0, 0, j] for j in seen]) / 2.0
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            distances = torch.tensor([abs(i + shift - j) for j in seen])
            expected[0, head, i] = (scores - slopes[head].double() * distances).softmax(0) @ v[0, 0, seen]
    options = {"left": left, "right": right, "offset": offset, "softcap": softcap, "alibi_slopes": slopes}
    torch.testing.assert_close(attention(q, k, v, **options), expected)


def test_varlen_equals_one_sequence_after_the_other():
    starts_q, starts_k = torch.tensor([0, 5, 5, 75]), torch.tensor([0, 9, 12, 80], dtype=torch.int32)
    q, k, v = torch.randn(75, 4, 8), torch.randn(80, 2, 8), torch.randn(80, 2, 8)
    slopes = torch.rand(3, 4)
    options = {"window_size": (20, 1), "softcap": 2.0}
    out, lse = varlen_attention(q, k, v, starts_q, starts_k, alibi_slopes=slopes, return_lse=True, **options)
    for n in range(3):
        rows, keys = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
        one, one_lse = attention(
            *(t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys])),
            alibi_slopes=slopes[n],
            offset=None,
            left=20,
            right=1,
            softcap=2.0,
            return_lse=True,
        )
        torch.testing.assert_close(out[rows].transpose(0, 1), one[0])
        torch.testing.assert_close(lse[:, rows], one_lse[0])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low):
    q, k, v = _qkv(1, 2, 2, 5, 5, 8)
    bias = torch.randn(5, 5)
    with torch.autocast("cpu", low):
        ours, theirs = scaled_dot_product_attention(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, bias)
    assert ours.dtype == theirs.dtype == low
    eps = torch.finfo(low).eps
    torch.testing.assert_close(ours, theirs, atol=eps, rtol=2 * eps)


# ---- derivatives -----------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "causal": {"right": 0},
    "window, bottom right": {"left": 2, "right": 1, "offset": None},
    "soft cap": {"softcap": 1.5},
    "ALiBi": {"alibi_slopes": torch.tensor([0.5, 0.25])},
    "all": {"left": 3, "right": 1, "softcap": 1.5, "alibi_slopes": torch.tensor([0.5, 0.25]), "dropout": 0.3},
}


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=cpu_only)])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name, backend):
    q, k, v = _qkv(1, 2, 1, 3, 4, 3, dtype=torch.float64, grad=True)
    bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    slopes = OPTIONS[name].get("alibi_slopes")

    def function(q, k, v, bias):
        torch.manual_seed(0)
        options = {**OPTIONS[name], "alibi_slopes": slopes}
        return attention(q, k, v, mask=bias, return_lse=True, return_weights=True, **options)

    with dispatch.backend(backend):
        assert torch.autograd.gradcheck(function, (q, k, v, bias))
        assert torch.autograd.gradgradcheck(function, (q, k, v, bias))


def test_empty_rows_have_no_gradient():
    q, k, v = _qkv(1, 1, 1, 3, 4, 8, grad=True)
    mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    out, lse, weights = attention(q, k, v, mask=mask, return_lse=True, return_weights=True)
    assert lse[0, 0, 1] == -math.inf
    assert not out[0, 0, 1].any()
    assert not weights[0, 0, 1].any()
    grads = torch.autograd.grad(out.sum() + weights.sum() + lse[..., [0, 2]].sum(), (q, k, v))
    assert not grads[0][0, 0, 1].any()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_input_stays_in_its_rows(value):
    q, k, v = _qkv(1, 1, 1, 70, 70, 8)
    q[0, 0, 3, 2] = value
    ours, theirs = scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert ours[0, 0, 3].isnan().all() == theirs[0, 0, 3].isnan().all()
    rows = torch.arange(70) != 3
    torch.testing.assert_close(ours[0, 0, rows], theirs[0, 0, rows])


def test_deterministic():
    def run():
        q, k, v = _qkv(2, 4, 2, 130, 130, 16, grad=True)
        bias = torch.ones(130, 130, requires_grad=True)
        return torch.autograd.grad(attention(q, k, v, mask=bias).sum(), (q, k, v, bias))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_keys_of_a_head(threads):
    former = torch.get_num_threads()
    q, k, v = _qkv(1, 1, 1, 300, 300, 8, dtype=torch.float64, grad=True)
    torch.set_num_threads(threads)
    try:
        ours = scaled_dot_product_attention(q, k, v, is_causal=True)
        grads = torch.autograd.grad(ours.square().sum(), (q, k, v))
    finally:
        torch.set_num_threads(former)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads, torch.autograd.grad(theirs.square().sum(), (q, k, v)))


# ---- dropout ---------------------------------------------------------------------------------------------------


def test_philox_known_answers():
    """From Random123's kat_vectors."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    full = 0xFFFFFFFF
    for words, answer in (
        ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        numbers = [torch.tensor(word) for word in words]
        assert tuple(x.item() for x in philox(tuple(numbers[:4]), (numbers[4], numbers[5]))) == answer


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_its_share(p):
    q, k, v = _qkv(4, 4, 4, 128, 200, 8)
    _, weights = attention(q, k, v, dropout=p, return_weights=True)
    _, kept = attention(q, k, v, return_weights=True)
    dropped = weights == 0
    count = dropped.numel()
    assert abs(dropped.sum().item() - p * count) <= 5 * math.sqrt(p * (1 - p) * count)
    torch.testing.assert_close(weights, torch.where(dropped, 0.0, kept / (1 - p) if p < 1 else 0.0))
    # Independent along every dimension: neighbours are dropped together as often as chance has it.
    for dim in range(4):
        a, b = dropped.narrow(dim, 0, dropped.size(dim) - 1), dropped.narrow(dim, 1, dropped.size(dim) - 1)
        both = (a & b).sum().item()
        assert abs(both - p * p * a.numel()) <= 6 * math.sqrt(p * p * (1 - p * p) * a.numel())


def test_dropout_follows_the_seed():
    q, k, v = _qkv(2, 2, 2, 10, 10, 8)

    def run(seed):
        torch.manual_seed(seed)
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))
    torch.manual_seed(1)
    assert not torch.equal(first, (run(1), scaled_dot_product_attention(q, k, v, dropout_p=0.5))[1])


# ---- the operators under torch's machinery -----------------------------------------------------------------------


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in _qkv(2, 4, 2, 5, 9, 8, dtype=dtype))
    mask, seed = torch.randn(1, 4, 1, 9), torch.tensor([3, 4])
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    slopes = torch.rand(4, dtype=compute).expand(2, 4)
    options = (0.3, 2.0, 3, None, None, 0.2, False)
    operators = torch.ops.fastnets
    utilities = ("test_schema", "test_faketensor")
    inputs = (q, k, v, mask, slopes, seed, None, None, *options)
    out, lse = operators.attention_forward(*inputs)
    torch.library.opcheck(operators.attention_forward, inputs, test_utils=utilities)
    torch.library.opcheck(operators.attention_weights, (q, k, lse, mask, slopes, seed, *options), test_utils=utilities)
    for bias in (True, False):
        backward = (torch.randn_like(out), None, None, q, k, v, out, lse, *inputs[3:], bias, False)
        torch.library.opcheck(operators.attention_backward, backward, test_utils=utilities)
    starts = torch.tensor([0, 4, 5]), torch.tensor([0, 2, 9])
    packed = (*(t[:1] for t in (q, k, v)), None, slopes, seed, *starts, *options)
    torch.library.opcheck(operators.attention_forward, packed, test_utils=utilities)


def test_compile():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, bias, slopes):
        out, lse = scaled_dot_product_attention(
            q, q, q, bias, 0.2, window_size=(4, None), softcap=2.0, alibi_slopes=slopes, return_lse=True
        )
        return out.sum() + lse.sum()

    q = torch.randn(2, 2, 9, 8, requires_grad=True)
    bias, slopes = torch.randn(9, 9, requires_grad=True), torch.rand(2)
    torch.manual_seed(5)
    compiled = step(q, bias, slopes)
    torch.manual_seed(5)
    eager = step._torchdynamo_orig_callable(q, bias, slopes)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, (q, bias)), torch.autograd.grad(eager, (q, bias)), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_dynamic_lengths():
    step = torch.compile(
        lambda q, k: scaled_dot_product_attention(q, k, k, is_causal=True),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for length in (5, 9, 33):
        q, k = torch.randn(2, 2, length, 8), torch.randn(2, 2, length + 3, 8)
        torch.testing.assert_close(step(q, k), scaled_dot_product_attention(q, k, k, is_causal=True))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, mask):
            return scaled_dot_product_attention(q, k, k, mask)

    q, k, mask = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.rand(5, 7) < 0.5
    exported = torch.export.export(Model(), (q, k, mask)).module()
    torch.testing.assert_close(exported(q, k, mask), Model()(q, k, mask))


# ---- bad input ---------------------------------------------------------------------------------------------------

_Q = torch.zeros(2, 4, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((_Q, _Q, None), {}, TypeError, "value: expected a Tensor"),
        ((_Q.int(), _Q.int(), _Q.int()), {}, TypeError, "query: expected float32"),
        ((_Q, _Q.double(), _Q), {}, TypeError, "key: expected torch.float32"),
        ((_Q, _Q, _Q.to("meta")), {}, ValueError, "value: expected device"),
        ((_Q[0, 0, 0], _Q, _Q), {}, ValueError, "query: expected at least 2 dimensions"),
        ((_Q, _Q[..., :7], _Q), {}, ValueError, "key: expected a last dimension of 8"),
        ((_Q, _Q[:, :, :4], _Q), {}, ValueError, "value: expected shape"),
        ((_Q, _Q[:, :3], _Q[:, :3]), {}, ValueError, "query, key, value: expected batch dimensions"),
        ((_Q, _Q[:, :3], _Q[:, :3]), {"enable_gqa": True}, ValueError, "key: expected a number of heads"),
        ((_Q, _Q[:, :0], _Q[:, :0]), {"enable_gqa": True}, ValueError, "key: expected a number of heads"),
        ((_Q[0, 0], _Q[0, 0], _Q[0, 0]), {"enable_gqa": True}, ValueError, "query: expected at least 3"),
        ((_Q, _Q, _Q, torch.zeros(4, 5)), {}, ValueError, "attn_mask: expected a shape"),
        ((_Q, _Q, _Q, torch.zeros(1, 2, 4, 5, 5)), {}, ValueError, "attn_mask: expected a shape"),
        ((_Q, _Q, _Q, torch.zeros(5, 5).int()), {}, TypeError, "attn_mask: expected bool"),
        ((_Q, _Q, _Q, torch.zeros(5, 5)), {"is_causal": True}, ValueError, "attn_mask: expected None"),
        ((_Q, _Q, _Q, causal_lower_right(4, 5)), {}, ValueError, "attn_mask: expected a causal bias"),
        ((_Q, _Q, _Q), {"dropout_p": 1.5}, ValueError, "dropout_p: expected"),
        ((_Q, _Q, _Q), {"dropout_p": math.nan}, ValueError, "dropout_p: expected"),
        ((_Q, _Q, _Q), {"softcap": -1.0}, ValueError, "softcap: expected"),
        ((_Q, _Q, _Q), {"window_size": 3}, TypeError, "window_size: expected"),
        ((_Q, _Q, _Q), {"window_size": (1, 2, 3)}, ValueError, "window_size: expected"),
        ((_Q, _Q, _Q), {"window_size": (-2, 0)}, ValueError, "window_size: expected"),
        ((_Q, _Q, _Q), {"window_size": (1.5, 0)}, TypeError, "window_size: expected"),
        ((_Q, _Q, _Q), {"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes: expected shape"),
        ((_Q, _Q, _Q), {"alibi_slopes": torch.zeros(4).int()}, TypeError, "alibi_slopes: expected float32"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*arguments, **options)


@pytest.mark.parametrize(
    ("starts", "error", "message"),
    [
        (torch.tensor([0, 3, 2, 5]), ValueError, "cu_seqlens_q: expected ascending"),
        (torch.tensor([1, 5]), ValueError, "cu_seqlens_q: expected ascending"),
        (torch.tensor([0, 6]), ValueError, "cu_seqlens_q: expected ascending"),
        (torch.tensor([0, 4]), ValueError, "cu_seqlens_q: expected ascending"),
        (torch.tensor([0.0, 5.0]), TypeError, "cu_seqlens_q: expected int32"),
        (torch.tensor(0), ValueError, "cu_seqlens_q: expected one dimension"),
        (torch.tensor([0, 2, 5]), ValueError, "cu_seqlens_k: expected shape"),
        ([0, 5], TypeError, "cu_seqlens_q: expected a Tensor"),
    ],
)
def test_bad_sequences(starts, error, message):
    x = torch.zeros(5, 2, 4)
    with pytest.raises(error, match=message):
        varlen_attention(x, x, x, starts, torch.tensor([0, 5]))


@cpu_only
def test_the_operator_guards_its_memory():
    """A compiled graph cannot look at the values of cu_seqlens: the operator does."""
    x = torch.zeros(1, 2, 5, 4)
    starts = torch.tensor([0, 9])
    with pytest.raises(RuntimeError, match="starts_q must ascend"):
        torch.ops.fastnets.attention_forward(
            x, x, x, None, None, None, *[starts] * 2, 1.0, 0.0, None, None, 0, 0.0, False
        )


_size = st.integers(0, 5)
_length = st.sampled_from([0, 1, 2, 7, 63, 64, 65, 130])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_input_gives_the_reference_or_an_error(data):
    """Valid and invalid shapes and options: the CPU kernels agree with the reference, or both raise the same."""
    draw = data.draw
    heads = draw(_size)
    kv_heads = draw(st.sampled_from([heads, 1, 2, 3]))
    lq, lk, width = draw(_length), draw(_length), draw(st.integers(0, 20))
    q = torch.randn(draw(st.integers(0, 2)), heads, lq, width, dtype=torch.float64)
    k = torch.randn(q.size(0), kv_heads, lk, draw(st.sampled_from([width, width, width, 3])), dtype=torch.float64)
    v = torch.randn(q.size(0), kv_heads, lk, draw(st.integers(0, 20)), dtype=torch.float64)
    mask = None
    if draw(st.booleans()):
        full = (q.size(0), heads, lq, lk)
        shape = [draw(st.sampled_from([1, size, size, 2])) for size in full][draw(st.integers(0, 4)) :]
        mask = torch.randn(shape, dtype=torch.float64)
        mask = mask > -0.5 if draw(st.booleans()) else mask
    if draw(st.booleans()):
        q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
    bound = st.sampled_from([None, 0, 1, 10, 2**40])
    options = {
        "mask": mask,
        "left": draw(bound),
        "right": draw(bound),
        "offset": draw(st.sampled_from([0, None, 3, -3, 2**40])),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "dropout": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "alibi_slopes": draw(st.sampled_from([None, torch.ones(heads)])),
        "return_lse": True,
        "return_weights": True,
    }
    if options["offset"] == 2**40:  # a bias of 1e12 would leave float64 scores three digits behind the point
        options["alibi_slopes"] = None
    leaves = [t for t in (q, k, v, mask) if t is not None and t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    found = []
    for backend in ("reference", dispatch.ORDER["cpu"][0]) if dispatch.why_missing("cpu") is None else ("reference",):
        torch.manual_seed(0)
        try:
            with dispatch.backend(backend):
                outputs = attention(q, k, v, **options)
                finite = sum(out.masked_fill(out == -math.inf, 0.0).sum() for out in outputs)
                grads = torch.autograd.grad(finite, leaves, allow_unused=True)
        except (ValueError, TypeError) as error:
            found.append(str(error))
        else:
            grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
            found.append([*outputs, *grads])
    if isinstance(found[0], str):
        assert len(set(found)) == 1
        assert ": expected " in found[0]
        return
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-9, rtol=1e-7)


# ---- instruction sets and memory ---------------------------------------------------------------------------------


@cpu_only
def test_memory_is_linear_in_the_length():
    """Scores of 16384 x 16384 would take 1 GB; the process must not grow by a tenth of it, backwards included."""
    code = """if True:
        import resource, torch
        from fastnets.ops.attention import attention
        def run(length):
            q = torch.randn(1, 1, length, 8, requires_grad=True)
            bias = torch.zeros(length, requires_grad=True)
            attention(q, q, q, mask=bias, left=100, right=100, return_lse=True)[0].sum().backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = run(256)
        print(run(16384) - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * 1024  # kilobytes


def test_a_mask_that_is_the_same_for_all_keys_has_the_gradient_of_lse():
    q, k, v = (torch.randn(1, 2, 37, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 1, 1, 1, requires_grad=True)
    out, lse = scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    factors = torch.randn_like(lse)
    (from_out,) = torch.autograd.grad(out.sum(), mask, retain_graph=True)
    assert from_out.eq(0).all()
    (from_lse,) = torch.autograd.grad(lse, mask, factors)
    torch.testing.assert_close(from_lse, factors.sum().view(1, 1, 1, 1))

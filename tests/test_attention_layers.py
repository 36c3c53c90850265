"""MultiheadAttention and the Transformer layers: every form of mask and option, against torch's in float64."""

import copy
import itertools

import pytest
import torch
from modules import results
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import fastnets

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")

N, HEADS, L, S, E = 3, 2, 5, 7, 8


@pytest.fixture(autouse=True)
def _slow_path_of_torch():
    """torch's inference kernels give zeros where padding is, its ordinary path does not."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def _pair(name: str, *args, **kwargs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's layer and ours with the same parameters, all of them random."""
    stock = getattr(torch.nn, name)(*args, **kwargs, dtype=torch.float64)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return stock, fastnets.convert(copy.deepcopy(stock))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _mask(kind: str | None, *shape: int) -> torch.Tensor | None:
    """Hides about a third of the keys and never the first."""
    if kind is None:
        return None
    hidden = (torch.rand(shape) < 0.3) & (torch.arange(shape[-1]) > 0)
    return hidden if kind == "bool" else _random(*shape).detach().masked_fill(hidden, -torch.inf).requires_grad_()


def _agree(stock, layer, args, kwargs, orders=2) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        expected = results(stock, args, kwargs, orders)
    assert_close(results(layer, args, kwargs, orders), expected)


KINDS = (None, "bool", "float")


@pytest.mark.parametrize("attn", [None, "2d bool", "2d float", "3d bool", "3d float"])
@pytest.mark.parametrize("padding", KINDS)
@pytest.mark.parametrize("weights", [None, "average", "heads"])
@pytest.mark.parametrize("extra", [False, True], ids=["", "bias_kv and zero_attn"])
def test_masks(attn, padding, weights, extra):
    stock, layer = _pair("MultiheadAttention", E, HEADS, batch_first=True, add_bias_kv=extra, add_zero_attn=extra)
    dims, kind = attn.split() if attn else (None, None)
    kwargs = {
        "attn_mask": _mask(kind, *((L, S) if dims == "2d" else (N * HEADS, L, S))),
        "key_padding_mask": _mask(padding, N, S),
        "need_weights": weights is not None,
        "average_attn_weights": weights == "average",
    }
    _agree(stock, layer, (_random(N, L, E), _random(N, S, E), _random(N, S, E)), kwargs)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6}, {"vdim": 4}, {"kdim": 6, "vdim": 4}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_layouts(batched, batch_first, sizes, bias, need_weights):
    stock, layer = _pair("MultiheadAttention", E, HEADS, bias=bias, batch_first=batch_first, **sizes)

    def draw(length, features):
        return _random(*((N, length) if batch_first else (length, N)) if batched else (length,), features)

    args = (draw(L, E), draw(S, sizes.get("kdim", E)), draw(S, sizes.get("vdim", E)))
    padding = _mask("bool", *((N, S) if batched else (S,)))
    _agree(stock, layer, args, {"key_padding_mask": padding, "need_weights": need_weights})


@pytest.mark.parametrize("same", ["query, key and value", "key and value", "query and key", "none"])
def test_projections_by_aliasing(same):
    stock, layer = _pair("MultiheadAttention", E, HEADS)
    a, b, c = (_random(L, N, E) for _ in range(3))
    args = {
        "query, key and value": (a, a, a),
        "key and value": (a, b, b),
        "query and key": (a, a, b),
        "none": (a, b, c),
    }
    _agree(stock, layer, args[same], {})


@pytest.mark.parametrize("padding", KINDS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_causal_hint(padding, need_weights, extra, kind):
    stock, layer = _pair("MultiheadAttention", E, HEADS, add_bias_kv=extra)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    causal = causal if kind == "bool" else torch.zeros(L, L).double().masked_fill(causal, -torch.inf)
    kwargs = {"attn_mask": causal, "key_padding_mask": _mask(padding, N, L), "need_weights": need_weights}
    x = _random(L, N, E)
    with sdpa_kernel(SDPBackend.MATH):
        expected = results(stock, (x, x, x), kwargs)  # without the hint, which must change nothing
    assert_close(results(layer, (x, x, x), {**kwargs, "is_causal": True}), expected)


def test_causal_hint_spares_the_mask():
    layer = fastnets.nn.MultiheadAttention(E, HEADS)
    x = torch.randn(L, N, E)
    seen = []
    with fastnets.dispatch.recording(
        lambda case, *_: seen.append(case.options) if case.family == "attention" else None
    ):
        layer(x, x, x, attn_mask=torch.ones(L, L, dtype=torch.bool).triu(1), is_causal=True, need_weights=False)
    assert "window" in seen[0]
    assert "mask" not in seen[0]


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_query_without_keys_gives_zero(kind, need_weights, dtype):
    layer = fastnets.nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=dtype)
    padding = torch.tensor([[False] * S, [True] * S, [False] * S])
    padding = padding if kind == "bool" else torch.zeros(N, S, dtype=dtype).masked_fill(padding, -torch.inf)
    x, y = (torch.randn(N, length, E, dtype=dtype, requires_grad=True) for length in (L, S))
    out, weights = layer(x, y, y, key_padding_mask=padding, need_weights=need_weights)
    assert_close(out[1], layer.out_proj.bias.expand(L, E))
    assert not out.isnan().any()
    if need_weights:
        assert not weights[1].any()
        assert_close(weights[0].sum(-1), torch.ones(L, dtype=dtype), rtol=0.02, atol=0.02)
    grads = torch.autograd.grad(out.sum(), (x, y))
    assert not any(grad.isnan().any() for grad in grads)
    assert not grads[1][1].any()


def test_no_keys_and_empty_batch():
    layer = fastnets.nn.MultiheadAttention(E, HEADS, batch_first=True)
    out, weights = layer(torch.randn(N, L, E), torch.randn(N, 0, E), torch.randn(N, 0, E))
    assert_close(out, layer.out_proj.bias.expand(N, L, E))
    assert weights.shape == (N, L, 0)
    x = torch.randn(0, L, E)
    out, weights = layer(x, x, x)
    assert out.shape == (0, L, E)
    assert weights.shape == (0, L, L)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_keeps_the_mean(need_weights):
    layer = fastnets.nn.MultiheadAttention(E, HEADS, dropout=0.4, batch_first=True)
    x = torch.randn(1, 16, E).expand(4000, -1, -1)
    dropped, weights = layer(x, x, x, need_weights=need_weights, average_attn_weights=False)
    layer.eval()
    whole, _ = layer(x[:1], x[:1], x[:1])
    assert not dropped[0].allclose(dropped[1])
    assert_close(dropped.mean(0), whole[0], rtol=0, atol=0.05)
    if need_weights:
        assert abs((weights == 0).float().mean() - 0.4) < 0.01


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(layout):
    stock, layer = _pair("MultiheadAttention", E, HEADS, batch_first=True)
    rows = [torch.randn(length, E, dtype=torch.float64) for length in (4, 2, 6)]
    nested = torch.nested.as_nested_tensor(rows, layout=layout)
    out, weights = layer(nested, nested, nested, need_weights=False)
    assert weights is None
    assert out.layout == layout
    for got, row in zip(out.unbind(), rows, strict=True):
        assert_close(got, stock(row, row, row)[0])


def test_nested_in_the_encoder():
    stock, ours = _pair("TransformerEncoderLayer", E, HEADS, 16, 0.0, batch_first=True)
    rows = [torch.randn(length, E, dtype=torch.float64) for length in (4, 2, 6)]
    stack = fastnets.nn.TransformerEncoder(ours, 2).eval()
    out = stack(torch.nested.as_nested_tensor(rows))
    peer = torch.nn.TransformerEncoder(stock, 2).eval()
    for got, row in zip(out.unbind(), rows, strict=True):
        assert_close(got, peer(row))


X = torch.zeros(N, L, E)
WRONG = {
    "query": [((X[0, 0], X, X), {}), ((X[..., :3], X, X), {}), ((X.double(), X, X), {}), ((None, X, X), {})],
    "key": [((X, X[:2], X), {}), ((X, X[0], X), {}), ((X, X[..., :4], X), {}), ((X, 1.0, X), {})],
    "value": [((X, X, X[:, :2]), {}), ((X, X, X[0]), {}), ((X, X, X.half()), {})],
    "key_padding_mask": [
        ((X, X, X), {"key_padding_mask": torch.zeros(shape, dtype=dtype)})
        for shape, dtype in (((N, L + 1), torch.bool), ((L,), torch.bool), ((N, L), torch.int64))
    ],
    "attn_mask": [
        ((X, X, X), {"attn_mask": torch.zeros(shape, dtype=dtype)})
        for shape, dtype in (
            ((L, L + 1), torch.bool),
            ((N, L, L), torch.bool),
            ((L,), torch.bool),
            ((L, L), torch.int32),
        )
    ]
    + [((X, X, X), {"is_causal": True})],
}


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, cases in WRONG.items() for i in range(len(cases))])
def test_bad_arguments(name, index):
    args, kwargs = WRONG[name][index]
    layer = fastnets.nn.MultiheadAttention(E, HEADS, batch_first=True)
    with pytest.raises((TypeError, ValueError), match=rf"^{name}:"):
        layer(*args, **kwargs)


ACTIVATIONS = ["relu", "gelu", torch.nn.functional.silu, torch.nn.Tanh()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["relu", "gelu", "function", "module"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_encoder_layer(activation, norm_first, training):
    stock, layer = _pair(
        "TransformerEncoderLayer", E, HEADS, 16, 0.0, activation, batch_first=True, norm_first=norm_first
    )
    kwargs = {"src_mask": _mask("float", L, L), "src_key_padding_mask": _mask("bool", N, L)}
    _agree(stock.train(training), layer.train(training), (_random(N, L, E),), kwargs)
    with torch.no_grad():
        x = _random(N, L, E)
        assert_close(layer(x, **kwargs), stock(x, **kwargs))


def _causal(kind: str) -> torch.Tensor:
    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    return later if kind == "bool" else torch.nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)


@pytest.mark.parametrize("padding", KINDS)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("hint", [None, True, False])
def test_encoder_stack(padding, kind, training, hint):
    """Padded positions too, where torch's inference kernels would give zeros."""
    one, _ = _pair("TransformerEncoderLayer", E, HEADS, 16, 0.0, batch_first=True)
    stock = torch.nn.TransformerEncoder(one, 2, torch.nn.LayerNorm(E, dtype=torch.float64)).train(training)
    layer = fastnets.convert(copy.deepcopy(stock))
    kwargs = {"mask": _causal(kind), "src_key_padding_mask": _mask(padding, N, L), "is_causal": hint}
    with torch.no_grad():
        x = _random(N, L, E)
        assert_close(layer(x, **kwargs), stock(x, **kwargs))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_causal_mask_is_recognised(kind, stack):
    model = fastnets.nn.Transformer(E, HEADS, 1, 1, 16, 0.0, dtype=torch.float64)
    x = torch.randn(L, N, E, dtype=torch.float64)

    def options(mask):
        seen = []
        with fastnets.dispatch.recording(
            lambda case, *_: seen.append(case.options) if case.family == "attention" else None
        ):
            model.encoder(x, mask) if stack == "encoder" else model.decoder(x, x, mask)
        return seen[0]

    causal = _causal(kind)
    assert "window" in options(causal)
    assert "mask" not in options(causal)
    causal[1, 3] = not causal[1, 3] if kind == "bool" else 0.5
    assert "mask" in options(causal)


@pytest.mark.parametrize(("batch_first", "norm_first", "bias"), itertools.product([True, False], repeat=3))
def test_transformer(batch_first, norm_first, bias):
    stock, layer = _pair(
        "Transformer", E, HEADS, 2, 2, 16, 0.0, batch_first=batch_first, norm_first=norm_first, bias=bias
    )
    src, tgt = (_random(*((N, length) if batch_first else (length, N)), E) for length in (S, L))
    kwargs = {
        "tgt_mask": _causal("float"),
        "memory_mask": _mask("bool", L, S),
        "src_key_padding_mask": _mask("bool", N, S),
        "memory_key_padding_mask": _mask("bool", N, S),
        "tgt_key_padding_mask": _mask("float", N, L),
    }
    _agree(stock, layer, (src, tgt), kwargs)


def test_what_the_constructors_make_is_ours():
    model = fastnets.nn.Transformer(E, HEADS, 2, 2, 16)
    attentions = [m for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert len(attentions) == 6
    assert {type(m) for m in attentions} == {fastnets.nn.MultiheadAttention}

    given = torch.nn.TransformerEncoderLayer(E, HEADS, 16)
    stack = fastnets.nn.TransformerEncoder(given, 2)
    assert {type(layer) for layer in stack.layers} == {fastnets.nn.TransformerEncoderLayer}
    assert type(given) is torch.nn.TransformerEncoderLayer
    custom = torch.nn.TransformerEncoder(given, 1)
    assert fastnets.nn.Transformer(E, HEADS, custom_encoder=custom).encoder is custom
    assert type(custom) is torch.nn.TransformerEncoder


def test_layers_of_the_users_own_get_additive_masks():
    class Layer(torch.nn.Module):
        def forward(self, x, src_mask, is_causal, src_key_padding_mask):
            assert src_mask.dtype == src_key_padding_mask.dtype == x.dtype
            return x

    stack = fastnets.nn.TransformerEncoder(Layer(), 1, enable_nested_tensor=False)
    stack(torch.zeros(L, N, E), _mask("bool", L, L), _mask("bool", N, L))

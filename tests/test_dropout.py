"""Dropout beyond the operator table: its random numbers, the choice of a backend, the layers that use it."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import fastnets
from fastnets import _library, dispatch
from fastnets.functional import dropout
from fastnets.ops.dropout import seeded
from fastnets.reference.dropout import dropout as reference
from fastnets.reference.philox import philox

pytestmark = pytest.mark.skipif(_library.missing is not None, reason=str(_library.missing))

SEED = torch.tensor([3, 1 << 31])
LARGE = 3, 41, 67  # runs on our kernel, and is no multiple of anything that it counts in


def _chosen(call) -> list[str]:
    """The backends of the dropouts within."""
    seen = []

    def record(case, chosen, _):
        if case.family == "dropout":
            seen.append(chosen.backend)

    with dispatch.recording(record):
        call()
    return seen


def _kept(count: int, p: float, seed=SEED) -> torch.Tensor:
    with fastnets.backend("cpu"):
        return seeded(torch.ones(count), None, seed, p) != 0


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_as_many_are_kept_as_asked_for(p):
    kept = _kept(1 << 20, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * deviation / 1024
    rows = kept.view(1024, 1024)
    for sums in (rows.sum(0), rows.sum(1)):  # binomial, along both axes of a matrix
        assert abs(sums.var() / (1024 * p * (1 - p)) - 1) < 0.2
        assert (sums - 1024 * (1 - p)).abs().max() < 6 * deviation * 32


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_independent(p):
    """Of neighbours at every distance within a group of 64, and a little beyond; of two seeds."""
    centred = (_kept(1 << 20, p).double() - (1 - p)) / (p * (1 - p)) ** 0.5
    for distance in (*range(1, 70), 128, 4096, 1 << 19):
        assert abs((centred[distance:] * centred[:-distance]).mean()) < 5 / (len(centred) - distance) ** 0.5
    for other in ([4, 1 << 31], [3, 1 + (1 << 31)]):
        theirs = (_kept(1 << 20, p, torch.tensor(other)).double() - (1 - p)) / (p * (1 - p)) ** 0.5
        assert abs((centred * theirs).mean()) < 5 / 1024


SAME_NUMBERS = """if True:
    import os, sys, torch, fastnets
    from fastnets import _library
    from fastnets.ops.dropout import seeded
    from fastnets.reference.dropout import dropout as reference
    assert _library.cpu_capability() == os.environ["FASTNETS_CPU"]
    seed = torch.tensor([7, 4_000_000_000])
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for count in (1, 7, 64, 100, 4097, 100_003, 1_500_001):
            x, residual = (torch.randn(count, generator=generator).to(dtype) for _ in range(2))
            for other in (None, residual):
                expected = reference(x, other, seed, 0.3)
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    with fastnets.backend("cpu"):
                        assert torch.equal(seeded(x, other, seed, 0.3), expected), (dtype, count, threads)
"""
CAPABILITIES = _library.CPU_CAPABILITIES[: 1 + _library.CPU_CAPABILITIES.index(_library.cpu_capability() or "generic")]


@pytest.mark.parametrize("name", CAPABILITIES)
def test_same_numbers_for_every_thread_and_instruction_set(name, tmp_path):
    """Bit for bit the reference's."""
    command = [sys.executable, "-c", SAME_NUMBERS]
    environment = {**os.environ, "FASTNETS_CPU": name}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("p", [0.0, 1e-9, 2**-24, 1 - 2**-24, 1 - 1e-9, 1.0])
def test_probabilities_at_the_ends(p):
    x = torch.randn(1 << 14, dtype=torch.float64)
    with fastnets.backend("cpu"):
        y = seeded(x, x, SEED, p)
    assert torch.equal(y, reference(x, x, SEED, p))
    assert torch.equal(y, 2 * x if p == 0 else x) or 1e-9 <= p < 1


def test_the_threshold_is_kept():
    """24 bits of element 0's word against p, both exact."""
    zero = torch.zeros(1, dtype=torch.int64)
    drawn = (philox((zero, zero, zero, zero), (SEED[0], SEED[1]))[0] >> 8).item()
    assert _kept(8, drawn / 2**24)[0]
    assert not _kept(8, (drawn + 1) / 2**24)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_draws_the_same_numbers(compiled):
    torch._dynamo.reset()
    call = torch.compile(dropout, fullgraph=True, backend="aot_eager") if compiled else dropout
    x, residual = torch.ones(LARGE, requires_grad=True), torch.zeros(LARGE, requires_grad=True)
    for scattered in (False, True):
        inputs = [t.mT if scattered else t for t in (x, residual)]
        y = call(inputs[0], 0.4, residual=inputs[1])
        assert 0.3 < (y == 0).float().mean() < 0.5
        grad = torch.randn(LARGE)
        found = torch.autograd.grad(y, (x, residual), grad.mT if scattered else grad)
        assert torch.equal(found[0], grad * (y.mT if scattered else y))
        assert torch.equal(found[1], grad)
        expanded = torch.autograd.grad(call(inputs[0], 0.4).sum(), x)[0]
        assert set(expanded.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}


def test_torchs_generator_decides():
    x = torch.randn(LARGE)
    torch.manual_seed(5)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(5)
    assert torch.equal(dropout(x), first)
    assert torch.equal(dropout(x), second)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    with fastnets.backend("reference"):
        assert torch.equal(dropout(x), first)
    torch._dynamo.reset()
    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    assert torch.equal(compiled(x), first)


def test_nothing_but_the_seed_is_kept():
    x = torch.randn(LARGE, requires_grad=True)
    y = dropout(x, residual=x)
    assert [t.numel() for t in y.grad_fn.saved_tensors if t is not None] == [2]


def test_derivatives_of_derivatives():
    x, residual = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with fastnets.backend("cpu"):
        assert torch.autograd.gradgradcheck(lambda *t: seeded(*t, SEED, 0.5).square(), (x, residual))
        pushed = torch.func.grad(lambda x: seeded(x, residual.detach(), SEED, 0.5).square().sum())(x.detach())
    assert_close(pushed, torch.autograd.grad(reference(x, residual, SEED, 0.5).square().sum(), x)[0])


@pytest.mark.parametrize("forced", [None, "cpu"])
def test_vmap(forced):
    x = torch.ones(4, 5000)
    with fastnets.backend(forced):
        rows = torch.vmap(dropout, randomness="different")(x)
        assert not torch.equal(rows[0], rows[1])
        rows = torch.vmap(dropout, randomness="same")(x)
        assert torch.equal(rows[0], rows[1])
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(dropout)(x)


@pytest.mark.parametrize("residual", [False, True])
def test_operator_registration(residual):
    x = torch.randn(5, 70)
    torch.library.opcheck(torch.ops.fastnets.dropout, (x, x if residual else None, SEED, 0.5))


@pytest.mark.parametrize("inputs", [(8, 4), LARGE], ids=["small", "large"])
@pytest.mark.parametrize("training", [False, True])
def test_bad_arguments(inputs, training):
    x = torch.ones(inputs)
    for arguments, error, message in [
        (([1.0],), TypeError, "^input: expected a Tensor, got list"),
        ((x, 1.5), ValueError, r"^p: expected a number in \[0, 1\], got 1.5 \(dropout probability has to be between"),
        ((x, -0.1), ValueError, r"^p: expected a number in \[0, 1\], got -0.1"),
        ((x, float("nan")), ValueError, "^p: expected a number"),
    ]:
        with pytest.raises(error, match=message):
            dropout(*arguments, training=training)
    for residual, error, message in [
        (1.0, TypeError, "^residual: expected a Tensor, got float"),
        (x[:1], ValueError, r"^residual: expected input's shape \(.*\), got \(1, "),
        (x.double(), TypeError, "^residual: expected torch.float32 like input, got torch.float64"),
        (x.to("meta"), ValueError, "^residual: expected device cpu like input, got meta"),
    ]:
        with pytest.raises(error, match=message):
            dropout(x, training=training, residual=residual)
    with pytest.raises(ValueError, match="dropout probability"):
        fastnets.nn.Dropout(2.0)


@pytest.mark.parametrize("shape", [(8, 4), LARGE], ids=["small", "large"])
def test_every_element_is_multiplied(shape):
    x = torch.full(shape, torch.inf)
    for p in (0.5, 1.0):
        for call in (dropout, F.dropout):
            y = call(x, p)
            assert y.isnan().any()
            assert ((y == torch.inf) | y.isnan()).all()
    assert dropout(torch.full(shape, torch.nan)).isnan().all()


@pytest.mark.parametrize("shape", [(8, 4), LARGE], ids=["small", "large"])
def test_without_dropout(shape):
    x, residual = torch.randn(shape), torch.randn(shape)
    assert dropout(x, training=False) is x
    assert dropout(x, 0.0) is x
    assert torch.equal(dropout(x, training=False, residual=residual), residual + x)
    assert torch.equal(dropout(x, 0.0, residual=residual), residual + x)
    assert torch.equal(dropout(x, 1.0, residual=residual), residual)
    torch.manual_seed(0)
    expected = residual + F.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropout(given := x.clone(), 0.5, inplace=True, residual=residual), expected)
    assert ((given == 0) | (given == 2 * x)).all()


def test_the_choice_of_a_backend():
    class Own(torch.Tensor):
        pass

    x = torch.randn(LARGE)
    assert _chosen(lambda: dropout(x)) == ["cpu"]
    assert _chosen(lambda: dropout(torch.nn.Parameter(x))) == ["cpu"]
    assert _chosen(lambda: dropout(x, residual=x.as_subclass(Own))) == ["reference"]
    assert _chosen(lambda: dropout(x.as_subclass(Own))) == ["reference"]
    assert _chosen(lambda: dropout(x[:, :, :1])) == ["reference"]
    assert _chosen(lambda: dropout(x.to("meta"))) == ["reference"]
    assert _chosen(lambda: torch.func.grad(lambda x: dropout(x).sum())(x)) == ["reference"]
    assert _chosen(lambda: dropout(x, inplace=True)) == []
    assert _chosen(lambda: dropout(x, 0.0)) == []
    assert "fewer than" in str(fastnets.explain(fastnets.nn.Dropout(), x[:1, :1]))
    for name in ("cuda", "triton", "simt"):  # which have no dropout
        with fastnets.backend(name):
            torch.manual_seed(0)
            y = dropout(x)
            with pytest.raises(NotImplementedError, match="does not run this dropout"):
                seeded(x, None, SEED, 0.5)
        torch.manual_seed(0)
        assert torch.equal(y, F.dropout(x))


def test_no_case_is_made_where_torch_drops(monkeypatch):
    monkeypatch.setattr(dispatch, "select", None)
    dropout(torch.randn(8, 8))
    dropout(torch.randn(LARGE, device="meta"))
    with pytest.raises(TypeError, match="not callable"):
        dropout(torch.randn(LARGE))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_stay_with_torch():
    x = torch.nested.nested_tensor([torch.ones(50, 80), torch.ones(60, 80)])
    assert _chosen(lambda: dropout(x)) == ["reference"]
    assert set(dropout(x)[0].unique().tolist()) == {0.0, 2.0}


def test_autocast_knows_no_dropout():
    x, residual = torch.randn(LARGE, dtype=torch.bfloat16), torch.randn(LARGE)
    with torch.autocast("cpu", torch.bfloat16):
        assert dropout(x).dtype == torch.bfloat16
        assert dropout(residual).dtype == torch.float32
        torch.manual_seed(0)
        y = dropout(x, residual=residual)
        torch.manual_seed(0)
        assert torch.equal(y, residual + dropout(x))


def test_graphs_for_any_number_of_rows():
    """The choice by elements must not settle the number of rows."""
    layer = fastnets.nn.Dropout(1.0)
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="eager")
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(layer, (torch.ones(80, 256),), dynamic_shapes={"input": {0: rows}})
    for count in (3, 80):
        assert not compiled(torch.ones(count, 256)).any()
        assert not exported.module()(torch.ones(count, 256)).any()
    fixed = torch.export.export(layer, (torch.ones(80, 256),))
    assert any(node.target == torch.ops.fastnets.dropout.default for node in fixed.graph.nodes)


def test_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, r: dropout(x.sin(), 0.4, residual=r).cos(), fullgraph=True)
    x, residual = torch.ones(LARGE, requires_grad=True), torch.zeros(LARGE, requires_grad=True)
    y = compiled(x, residual)
    dropped = y == 1
    assert 0.3 < dropped.float().mean() < 0.5
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0] == 0, dropped)


LAYERS = {
    "encoder": (fastnets.nn.TransformerEncoderLayer, 3),
    "decoder": (fastnets.nn.TransformerDecoderLayer, 4),
}


def _layer(kind: str, **options):
    torch.manual_seed(0)
    made = LAYERS[kind][0](32, 4, 64, batch_first=True, **options)
    x, memory = torch.randn(4, 35, 32), torch.randn(4, 20, 32)
    return made, (x,) if kind == "encoder" else (x, memory)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_transformer_layers_fuse_their_residuals(kind, norm_first, monkeypatch):
    layer, inputs = _layer(kind, norm_first=norm_first, dropout=0.3)
    fused = []
    kernel = dispatch.IMPLEMENTATIONS["dropout", "cpu"].operators.dropout

    class Operators:
        @staticmethod
        def dropout(x, residual, seed, p):
            fused.append(residual is not None)
            return kernel(x, residual, seed, p)

    watched = dispatch.IMPLEMENTATIONS["dropout", "cpu"]._replace(operators=Operators)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, ("dropout", "cpu"), watched)
    torch.manual_seed(1)
    y = layer(*inputs)
    sums = LAYERS[kind][1] - 1
    assert sorted(fused) == [False] + [True] * sums
    # The layers' hooks see what dropout returns, and the numbers are the same.
    seen = []
    for name in ("dropout1", "dropout2", *["dropout3"] * (kind == "decoder")):
        getattr(layer, name).register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    del fused[:]
    torch.manual_seed(1)
    assert torch.equal(layer(*inputs), y)
    assert not any(fused)
    assert len(seen) == sums
    for x, out in seen:
        assert 0.25 < (out == 0).float().mean() < 0.35
        assert_close(out, (x / 0.7).where(out != 0, 0.0))


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_of_everything_equals_torch(kind):
    layer, inputs = _layer(kind, dropout=1.0)
    stock = LAYERS[kind][0].__base__(32, 4, 64, batch_first=True, dropout=1.0)
    stock.load_state_dict(layer.state_dict())
    assert_close(layer(*inputs), stock(*inputs))


@pytest.mark.parametrize("kind", LAYERS)
def test_blocks_and_dropouts_of_the_users_own(kind):
    class Own(LAYERS[kind][0]):
        def _ff_block(self, x):
            return torch.zeros_like(x)

        def _sa_block(self, x, *args, **kwargs):
            return torch.zeros_like(x)

        def _mha_block(self, x, *args, **kwargs):
            return torch.zeros_like(x)

    layer, inputs = _layer(kind, norm_first=True)
    own = Own(32, 4, 64, batch_first=True, norm_first=True)
    assert torch.equal(own(*inputs), inputs[0])
    for name in ("_ff_block", "_sa_block", "_mha_block"):
        setattr(layer, name, lambda x, *args, **kwargs: torch.zeros_like(x))
    assert torch.equal(layer(*inputs), inputs[0])
    layer, _ = _layer(kind, norm_first=True)
    for name in ("dropout1", "dropout2", "dropout3"):
        if hasattr(layer, name):
            setattr(layer, name, torch.nn.Dropout(1.0))
    assert torch.equal(layer(*inputs), inputs[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_transformer_layers_compile(kind, autocast):
    layer, inputs = _layer(kind, dropout=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for call in (layer, compiled):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(*inputs)
        found.append((y, torch.autograd.grad(y.sin().sum(), list(layer.parameters()), allow_unused=True)))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_use_it(packed):
    layer = fastnets.nn.GRU(8, 40, num_layers=3, dropout=0.5)
    x = torch.randn(20, 16, 8)
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, torch.arange(20, 4, -1))
    assert _chosen(lambda: layer(x)) == ["cpu", "cpu"]
    assert _chosen(lambda: layer.eval()(x)) == []


def test_conversion():
    model = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Dropout(0.3, inplace=True), torch.nn.Dropout1d())
    before = repr(model)
    fastnets.convert(model)
    assert [type(m).__module__ for m in model] == ["fastnets.nn.dropout"] * 2 + ["torch.nn.modules.dropout"]
    assert repr(model) == before
    x = torch.ones(LARGE)
    assert model[1](x) is x
    assert _chosen(lambda: model[0](x)) == ["cpu"]
    fastnets.revert(model)
    assert type(model[0]) is torch.nn.Dropout

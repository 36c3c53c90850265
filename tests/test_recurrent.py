"""The recurrent family beyond the operator table and tests/test_nn.py: every option beside torch.nn's, bad input."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastnets
from fastnets.ops.recurrent import GATES, recurrent
from fastnets.reference.recurrent import CELLS

STEPS, BATCH, INPUT, HIDDEN = 6, 3, 4, 5
LENGTHS = {"sorted": (True, [6, 4, 1]), "unsorted": (False, [2, 6, 3])}


def _flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value if item is not None for t in _flat(item)]


def _twins(name: str, *args, **options):
    """torch's module and ours, made from the same seed."""
    modules = []
    for library in (torch.nn, fastnets.nn):
        torch.manual_seed(7)
        modules.append(getattr(library, name)(*args, **options))
    return modules


def _layers(name: str):
    """Every combination of constructor options of a layer."""
    switches = (False, True)
    nonlinearities = [{"nonlinearity": "tanh"}, {"nonlinearity": "relu"}] if name == "RNN" else [{}]
    for layers, bias, batch_first, bidirectional, more in itertools.product(
        (1, 2), switches, switches, switches, [{"proj_size": 0}, {"proj_size": 3}] if name == "LSTM" else nonlinearities
    ):
        yield {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, **more}


def _states(name: str, options, batch: int):
    count = options["num_layers"] * (2 if options["bidirectional"] else 1)
    h = torch.randn(count, batch, options.get("proj_size") or HIDDEN)
    return (h, torch.randn(count, batch, HIDDEN)) if name == "LSTM" else h


def _results(module, x, hx, seed=3):
    """Output, states, and the gradients of everything."""
    leaves = [
        t.requires_grad_()
        for t in _flat(x.data if isinstance(x, PackedSequence) else x) + _flat([] if hx is None else hx)
    ]
    torch.manual_seed(seed)
    y, state = module(x, hx)
    outputs = [y.data if isinstance(y, PackedSequence) else y, *_flat(state)]
    weights = [torch.randn(out.shape).to(out) for out in outputs]
    total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return outputs + list(torch.autograd.grad(total, leaves + list(module.parameters())))


def _assert_same(theirs, ours, **tolerance):
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, **tolerance)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", ["batched", "unbatched", *LENGTHS])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_layers_match_torch(name, kind):
    for options in _layers(name):
        stock, ours = _twins(name, INPUT, HIDDEN, **options)
        assert repr(stock) == repr(ours)
        for (key, a), (other, b) in zip(stock.state_dict().items(), ours.state_dict().items(), strict=True):
            assert key == other
            assert torch.equal(a, b)
        for with_states in (False, True):
            shape = (BATCH, STEPS, INPUT) if options["batch_first"] else (STEPS, BATCH, INPUT)
            x = torch.randn(shape)
            hx = _states(name, options, BATCH) if with_states else None
            if kind == "unbatched":
                x = x[0] if options["batch_first"] else x[:, 0]
                hx = None if hx is None else hx[:, 0] if name != "LSTM" else tuple(state[:, 0] for state in hx)
            if kind in LENGTHS:
                in_order, lengths = LENGTHS[kind]
                x = pack_padded_sequence(x, torch.tensor(lengths), options["batch_first"], enforce_sorted=in_order)
            _assert_same(_results(stock, x, hx), _results(ours, x, hx), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["batched", *LENGTHS])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_dropout_draws_what_torch_draws(name, kind):
    stock, ours = _twins(name, INPUT, HIDDEN, num_layers=3, dropout=0.5, bidirectional=True)
    x = torch.randn(STEPS, BATCH, INPUT)
    if kind in LENGTHS:
        in_order, lengths = LENGTHS[kind]
        x = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=in_order)
    _assert_same(_results(stock, x, None), _results(ours, x, None), rtol=1e-5, atol=1e-5)
    stock.eval(), ours.eval()
    _assert_same(_results(stock, x, None), _results(ours, x, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_match_torch(name, bias):
    for more in [{"nonlinearity": "tanh"}, {"nonlinearity": "relu"}] if name == "RNNCell" else [{}]:
        stock, ours = _twins(name, INPUT, HIDDEN, bias=bias, **more)
        assert repr(stock) == repr(ours)
        for rows, given_states in itertools.product([(), (BATCH,)], [False, True]):
            x, h, c = torch.randn(*rows, INPUT), torch.randn(*rows, HIDDEN), torch.randn(*rows, HIDDEN)
            hx = None if not given_states else (h, c) if name == "LSTMCell" else h
            results = []
            for cell in (stock, ours):
                states = _flat(cell(x, hx))
                results.append(
                    states + list(torch.autograd.grad(sum(s.square().sum() for s in states), cell.weight_ih))
                )
            _assert_same(*results, rtol=1e-5, atol=1e-6)


def _operands(cell, dtype=torch.float64, steps=3, batch=4, features=2, hidden=3, proj=0, bias=True):
    gates, outputs = GATES[cell] * hidden, proj or hidden
    shapes = [(steps, batch, features), (batch, outputs), (batch, hidden), (gates, features), (gates, outputs)]
    shapes += [(gates,), (gates,), (proj, hidden)]
    drawn = [torch.randn(shape, dtype=dtype) for shape in shapes]
    drawn[2] = drawn[2] if cell == "lstm" else None
    drawn[5:7] = drawn[5:7] if bias else [None, None]
    drawn[7] = drawn[7] if proj else None
    return drawn


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"lengths": [3, 0, 1, 2]}, {"proj": 2, "lengths": [0, 1, 3, 2], "bias": False}]
)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_gradients(cell, options, reverse):
    if cell != "lstm" and "proj" in options:
        options = {key: value for key, value in options.items() if key != "proj"}
    lengths = torch.tensor(options["lengths"]) if "lengths" in options else None
    operands = _operands(cell, **{key: value for key, value in options.items() if key != "lengths"})
    present = [i for i, t in enumerate(operands) if t is not None]

    def run(*tensors):
        operands = dict(zip(present, tensors, strict=True))
        results = recurrent(*(operands.get(i) for i in range(8)), lengths=lengths, cell=cell, reverse=reverse)
        return tuple(t for t in results if t is not None)

    leaves = tuple(operands[i].requires_grad_() for i in present)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("index", range(4))
def test_opcheck(index):
    cell = CELLS[index]
    for dtype, proj, lengths in [(torch.float32, 0, None), (torch.bfloat16, 2, [3, 0, 1, 2])]:
        operands = _operands(cell, dtype, proj=proj if cell == "lstm" else 0)
        lengths = None if lengths is None else torch.tensor(lengths)
        forward, backward = torch.ops.fastnets.recurrent_forward, torch.ops.fastnets.recurrent_backward
        torch.library.opcheck(forward, (*operands, lengths, index, False, False, False))
        torch.library.opcheck(forward, (*operands, lengths, index, True, False, True))
        y, h, c, gates, cells = forward(*operands, lengths, index, True, False, True)
        x, h0, c0, w_ih, w_hh, _, _, w_hr = operands
        common = (x, h0, c0, w_ih, w_hh, w_hr, lengths, y, gates, cells, index, True, False)
        for grads in [(y, h, c if cell == "lstm" else None), (None, None, None)]:
            torch.library.opcheck(backward, (*grads, *common, True, True))
            torch.library.opcheck(backward, (*grads, *common, False, False))


def test_frozen_parameters_and_inputs():
    layer = fastnets.nn.LSTM(INPUT, HIDDEN)
    layer.weight_hh_l0.requires_grad_(False)
    x = torch.randn(STEPS, BATCH, INPUT)
    layer(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is None
    assert layer.weight_ih_l0.grad is not None
    layer.requires_grad_(False)
    assert not layer(x)[0].requires_grad


def test_the_last_state_alone():
    stock, ours = _twins("LSTM", INPUT, HIDDEN)
    grads = []
    for layer in (stock, ours):
        x = torch.randn(STEPS, BATCH, INPUT, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer(x)[1][1].sum().backward()  # of c: neither y nor h has a gradient
        grads.append([x.grad, layer.weight_hh_l0.grad])
    _assert_same(*grads)


@pytest.mark.parametrize("steps", [1, STEPS])  # a single step reads its weights only once, by another path
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_an_empty_batch_and_an_empty_sequence(name, steps):
    layer = getattr(fastnets.nn, name)(INPUT, HIDDEN)
    y, _ = layer(torch.randn(steps, 0, INPUT))
    assert y.shape == (steps, 0, HIDDEN)
    y.sum().backward()
    assert all(p.grad.eq(0).all() for p in layer.parameters())
    with pytest.raises(RuntimeError, match="sequence length larger than 0"):
        layer(torch.randn(0, BATCH, INPUT))


X, H = torch.randn(STEPS, BATCH, INPUT), torch.randn(1, BATCH, HIDDEN)


@pytest.mark.parametrize(
    ("error", "words", "x", "hx"),
    [
        (TypeError, "input: expected a Tensor or a PackedSequence, got list", [1.0], None),
        (ValueError, "2D or 3D, got 1D", X[0, 0], None),
        (RuntimeError, "Expected 4, got 3", X[..., :3], None),
        (ValueError, "does not match weight dtype", X.double(), None),
        (ValueError, "does not match weight dtype", X.long(), None),
        (TypeError, "hx: expected a pair", X, H),
        (ValueError, "hx: expected a pair", X, (H,)),
        (RuntimeError, "hx: for batched 3-D input", X, (H[0], H[0])),
        (RuntimeError, "hx: for unbatched 2-D input", X[0], (H, H)),
        (RuntimeError, r"hidden\[0\] size", X, (H[:, :2], H)),
        (RuntimeError, r"hidden\[1\] size", X, (H, H[..., :2])),
        (TypeError, "h0: expected torch.float32", X, (H.double(), H)),
        (TypeError, "c0: expected torch.float32", X, (H, H.double())),
        (ValueError, "batch_sizes: expected", PackedSequence(X[0], torch.tensor([1, 2])), None),
        (ValueError, "batch_sizes: expected", PackedSequence(X[0], torch.tensor([2, 2])), None),
        (ValueError, "batch_sizes: expected", PackedSequence(X[0], torch.tensor([4, -1])), None),
        (ValueError, "batch_sizes: expected", PackedSequence(X[0], torch.tensor([], dtype=torch.int64)), None),
        (RuntimeError, "Expected 4, got 3", PackedSequence(X[0, :, :3], torch.tensor([2, 1])), None),
    ],
)
def test_layer_errors(error, words, x, hx):
    with pytest.raises(error, match=words):
        fastnets.nn.LSTM(INPUT, HIDDEN)(x, hx)


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, "cell: expected one of lstm", {"cell": "elman"}),
        (ValueError, "x: expected 3 dimensions", {"x": torch.randn(4, 2)}),
        (TypeError, "x: expected float32", {"x": torch.ones(3, 4, 2, dtype=torch.int64)}),
        (TypeError, "h0: expected a Tensor", {"h0": None}),
        (ValueError, "c0: expected a Tensor for lstm", {"c0": None}),
        (ValueError, "w_ih: expected shape", {"w_ih": torch.randn(12, 3)}),
        (ValueError, "w_hh: expected shape", {"w_hh": torch.randn(11, 3)}),
        (ValueError, "b_ih: expected shape", {"b_ih": torch.randn(12, 1)}),
        (TypeError, "b_hh: expected torch.float32 like x", {"b_hh": torch.randn(12).double()}),
        (ValueError, "I, P, H: expected sizes of one or more", {"x": torch.randn(3, 4, 0)}),
        (ValueError, "w_hr: expected 2 dimensions", {"w_hr": torch.randn(3)}),
        (ValueError, "w_hr: expected shape", {"w_hr": torch.randn(2, 3)}),
        (TypeError, "lengths: expected int64", {"lengths": torch.ones(4)}),
        (ValueError, "lengths: expected shape", {"lengths": torch.ones(3, dtype=torch.int64)}),
        (ValueError, "lengths: expected values in", {"lengths": torch.tensor([3, 4, 1, 1])}),
        (ValueError, "lengths: expected values in", {"lengths": torch.tensor([3, -1, 1, 1])}),
    ],
)
def test_operator_errors(error, words, change):
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    arguments = dict(zip(names, _operands("lstm", torch.float32), strict=True)) | {"cell": "lstm"} | change
    with pytest.raises(error, match=words):
        recurrent(**arguments)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_input_runs_as_the_reference_does_or_is_refused(data):
    """Sizes that mostly fit, dtypes that mostly agree: whatever is wrong is named, whatever is right is right."""
    cell = data.draw(st.sampled_from(CELLS))
    sizes = {name: data.draw(st.integers(0, 5), name) for name in ("steps", "batch", "features", "hidden")}
    operands = _operands(cell, torch.float32, **sizes, bias=data.draw(st.booleans()))
    lengths = data.draw(st.none() | st.lists(st.integers(0, sizes["steps"]), min_size=1, max_size=5))
    lengths = None if lengths is None else torch.tensor(lengths)
    wrong = data.draw(st.none() | st.integers(0, 7))
    if wrong is not None and operands[wrong] is not None:
        harm = data.draw(
            st.sampled_from([lambda t: t.double(), lambda t: t.unsqueeze(0), lambda t: t[:-1], lambda t: t.to("meta")])
        )
        operands[wrong] = harm(operands[wrong])
    reverse = data.draw(st.booleans())

    def run():
        return [t for t in recurrent(*operands, lengths=lengths, cell=cell, reverse=reverse) if t is not None]

    try:
        with fastnets.backend("reference"):
            expected = run()
    except (TypeError, ValueError) as refused:
        with pytest.raises(type(refused)):
            run()
    else:
        _assert_same(expected, run(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(("rows", "hidden"), [(2, 200), (20, 400)])
def test_threads_that_share_a_step_change_nothing(cell, rows, hidden):
    """Few rows, and weights enough that threads share the hidden units; eight on fewer processors come late."""
    layer, x = getattr(fastnets.nn, cell)(96, hidden), torch.randn(30, rows, 96)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            y = layer(x)[0]
            found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=0, atol=0)
        torch.testing.assert_close(other, found[0])


def test_lengths_that_validation_cannot_see_are_clamped():
    """A compiled graph may carry any lengths: the operator itself must stay inside its tensors."""
    operands = _operands("lstm", torch.float32)
    wild, tame = torch.tensor([99, -7, 3, 1]), torch.tensor([3, 0, 3, 1])
    run = torch.ops.fastnets.recurrent_forward
    _assert_same(
        run(*operands, wild, 0, True, False, True)[:3], run(*operands, tame, 0, True, False, True)[:3], rtol=0, atol=0
    )

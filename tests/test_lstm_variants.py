"""The options of fastnets.nn.LSTM that torch's lacks, against their formulas taken one unit vector at a time."""

import copy
import functools
import math
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastnets
from fastnets import dispatch
from fastnets.integrations.distributed import Processes
from fastnets.networks import NETWORKS
from fastnets.networks.trainer import Settings, Trainer
from fastnets.ops.recurrent import recurrent
from fastnets.reference.recurrent import CELLS, Variant

STEPS, BATCH, INPUT, HIDDEN = 5, 4, 3, 6
LENGTHS = [5, 4, 2, 1]
ALONE = [
    {"layer_norm": True},
    {"peephole": True},
    {"zoneout_h": 0.3},
    {"zoneout_c": 0.4},
    {"recurrent_dropout": 0.35},
    {"cell_clip": 0.3},
    {"forget_bias": 1.0},
]
EVERY = {key: value for option in ALONE for key, value in option.items()}
SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"proj_size": 4, "bidirectional": True},
    {"num_layers": 2, "bias": False, "batch_first": True},
]
BACKENDS = ["reference", *(name for name in ("cpu",) if dispatch.why_missing(name) is None)]

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def _layer(options: dict, dtype=torch.float64, **shape) -> fastnets.nn.LSTM:
    torch.manual_seed(1)
    layer = fastnets.nn.LSTM(INPUT, HIDDEN, **shape, **options, dtype=dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():  # gains of 1 and biases of 0 would hide a mistake
            if name.startswith(("gain", "bias_c")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


# ---- the formulas, for one row of the batch at a time, by vectors of units -----------------------------------------


def _norm(v: Tensor) -> Tensor:
    mean = v.sum() / len(v)
    return (v - mean) / ((v - mean).square().sum() / len(v) + 1e-5).sqrt()


def _sigmoid(v: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-v))


def _zoneout(layer, p: float, mask, before: Tensor, now: Tensor) -> Tensor:
    if p == 0:
        return now
    if layer.training:
        return torch.stack([a if held else b for held, a, b in zip(mask.tolist(), before, now, strict=True)])
    return p * before + (1 - p) * now


def _cell(layer, end: str, x: Tensor, h: Tensor, c: Tensor, keep, hold_h, hold_c) -> tuple[Tensor, Tensor]:
    weight = {name.removesuffix(end): p for name, p in layer.named_parameters() if name.endswith(end)}
    from_x, from_h = weight["weight_ih"] @ x, weight["weight_hh"] @ h
    if layer.layer_norm:
        from_x, from_h = weight["gain_ih"] * _norm(from_x), weight["gain_hh"] * _norm(from_h)
    total = from_x + from_h
    if layer.bias:
        total = total + weight["bias_ih"] + weight["bias_hh"]
    n = layer.hidden_size
    i, f, g, o = total[:n], total[n : 2 * n], total[2 * n : 3 * n], total[3 * n :]
    peephole = weight.get("weight_peephole", total.new_zeros(3 * n))
    i, f = _sigmoid(i + peephole[:n] * c), _sigmoid(f + peephole[n : 2 * n] * c)
    g = torch.tanh(g)
    if layer.training and layer.recurrent_dropout > 0:
        g = g * keep / (1 - layer.recurrent_dropout)
    now = f * c + i * g
    if layer.cell_clip is not None:
        bound = torch.full_like(now, layer.cell_clip)
        now = torch.minimum(torch.maximum(now, -bound), bound)
    o = _sigmoid(o + peephole[2 * n :] * now)
    seen = now
    if layer.layer_norm:
        seen = weight["gain_c"] * _norm(now)
        if layer.bias:
            seen = seen + weight["bias_c"]
    new = o * torch.tanh(seen)
    if layer.proj_size:
        new = weight["weight_hr"] @ new
    return _zoneout(layer, layer.zoneout_h, hold_h, h, new), _zoneout(layer, layer.zoneout_c, hold_c, c, now)


def _step_by_step(layer, x: Tensor, h0: Tensor, c0: Tensor, lengths: list[int]):
    """x[T, B, I]: y, h and c, with the random numbers in the order in which the layer draws them."""
    steps, batch, outputs = *x.shape[:2], layer.proj_size or layer.hidden_size
    training, last_h, last_c = layer.training, [], []
    rates = 1 - layer.recurrent_dropout, layer.zoneout_h, layer.zoneout_c
    used = layer.recurrent_dropout > 0, layer.zoneout_h > 0, layer.zoneout_c > 0
    for number in range(layer.num_layers):
        found = []
        for direction in range(2 if layer.bidirectional else 1):
            index = len(last_h)
            masks = [None] * 3
            for i, columns in enumerate((layer.hidden_size, outputs, layer.hidden_size)):
                if training and used[i]:
                    masks[i] = torch.rand(steps, batch, columns, dtype=torch.float32) < rates[i]
            y = [[x.new_zeros(outputs) for _ in range(batch)] for _ in range(steps)]
            rows_h, rows_c = [], []
            for b in range(batch):
                h, c, times = h0[index, b], c0[index, b], range(lengths[b])
                for t in reversed(times) if direction else times:
                    drawn = [None if mask is None else mask[t, b] for mask in masks]
                    h, c = _cell(layer, f"_l{number}" + "_reverse" * direction, x[t, b], h, c, *drawn)
                    y[t][b] = h
                rows_h.append(h), rows_c.append(c)
            last_h.append(torch.stack(rows_h)), last_c.append(torch.stack(rows_c))
            found.append(torch.stack([torch.stack(rows) for rows in y]))
        x = torch.cat(found, 2)
    return x, torch.stack(last_h), torch.stack(last_c)


def _with_gradients(layer, inputs, outputs) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    total = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in outputs)
    leaves = [*inputs, *layer.parameters()]
    return [*outputs, *torch.autograd.grad(total, leaves, materialize_grads=True)]


def _inputs(layer) -> tuple[Tensor, Tensor, Tensor]:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = layer.weight_ih_l0.dtype
    x = torch.randn(STEPS, BATCH, INPUT, dtype=dtype, requires_grad=True)
    h = torch.randn(count, BATCH, layer.proj_size or HIDDEN, dtype=dtype, requires_grad=True)
    return x, h, torch.randn(count, BATCH, HIDDEN, dtype=dtype, requires_grad=True)


def _run(layer, x, h, c, lengths: list[int] | None = None):
    given = x.transpose(0, 1) if layer.batch_first else x
    if lengths is not None:
        given = pack_padded_sequence(given, torch.tensor(lengths), layer.batch_first, enforce_sorted=False)
    torch.manual_seed(3)
    y, (h, c) = layer(given, (h, c))
    if lengths is not None:
        y, _ = pad_packed_sequence(y, layer.batch_first)
    return y.transpose(0, 1) if layer.batch_first else y, h, c


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        *(pytest.param(options, {}, id="-".join(options)) for options in ALONE),
        *(pytest.param(EVERY, shape, id="-".join(["every", *shape])) for shape in SHAPES),
    ],
)
def test_matches_the_formulas(options, shape, training, backend):
    if "forget_bias" in options and not shape.get("bias", True):
        options = {key: value for key, value in options.items() if key != "forget_bias"}
    layer = _layer(options, **shape).train(training)
    inputs = _inputs(layer)
    with fastnets.backend(backend):
        ours = _with_gradients(layer, inputs, _run(layer, *inputs))
    torch.manual_seed(3)
    expected = _with_gradients(layer, inputs, _step_by_step(layer, *inputs, [STEPS] * BATCH))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_packed_sequences_match_the_formulas(shape, backend):
    layer = _layer(EVERY, **shape)
    inputs = _inputs(layer)
    with fastnets.backend(backend):
        ours = _with_gradients(layer, inputs, _run(layer, *inputs, LENGTHS))
    torch.manual_seed(3)
    expected = _with_gradients(layer, inputs, _step_by_step(layer, *inputs, LENGTHS))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ---- the module ----------------------------------------------------------------------------------------------------


def test_without_options_it_is_torchs():
    layer = fastnets.nn.LSTM(INPUT, HIDDEN, layer_norm=False, peephole=False, zoneout_h=0, cell_clip=None)
    assert layer.options == {}
    assert vars(layer).keys() == vars(torch.nn.LSTM(INPUT, HIDDEN)).keys()


def test_state_dict_and_repr_show_the_options():
    layer = _layer(EVERY, bidirectional=True)
    added = ["weight_peephole", "gain_ih", "gain_hh", "gain_c", "bias_c"]
    stock = list(torch.nn.LSTM(INPUT, HIDDEN, bidirectional=True).state_dict())
    assert list(layer.state_dict()) == stock + [name + end for name in added for end in ("_l0", "_l0_reverse")]
    assert repr(layer) == (
        "LSTM(3, 6, bidirectional=True, layer_norm=True, peephole=True, zoneout_h=0.3, zoneout_c=0.4, "
        "recurrent_dropout=0.35, cell_clip=0.3, forget_bias=1.0)"
    )
    other = fastnets.nn.LSTM(INPUT, HIDDEN, bidirectional=True, **EVERY, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.options == layer.options
        inputs = _inputs(layer)
        for a, b in zip(_run(layer, *inputs), _run(twin, *inputs), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="weight_peephole_l0"):
        torch.nn.LSTM(INPUT, HIDDEN, bidirectional=True).load_state_dict(layer.state_dict())


def test_initial_values():
    torch.manual_seed(4)
    stock = torch.nn.LSTM(INPUT, HIDDEN, num_layers=2)
    torch.manual_seed(4)
    layer = fastnets.nn.LSTM(INPUT, HIDDEN, num_layers=2, **EVERY)
    forget = slice(HIDDEN, 2 * HIDDEN)
    for name, value in stock.state_dict().items():
        ours = layer.state_dict()[name].clone()
        if name.startswith("bias"):
            assert torch.equal(ours[forget], torch.full((HIDDEN,), float(name.startswith("bias_ih"))))
            ours[forget] = value[forget]
        assert torch.equal(ours, value)
    for end in ("_l0", "_l1"):
        assert all(getattr(layer, f"gain_{name}{end}").eq(1).all() for name in ("ih", "hh", "c"))
        assert getattr(layer, f"bias_c{end}").eq(0).all()
        peephole = getattr(layer, f"weight_peephole{end}").abs()
        assert 0 < peephole.max() <= HIDDEN**-0.5
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    torch.manual_seed(4)
    layer.reset_parameters()
    for name, value in state.items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_evaluation_expects_what_training_draws():
    """Of one linear step: the mean over many draws of h is what evaluation gives."""
    torch.manual_seed(0)
    layer = fastnets.nn.LSTM(INPUT, HIDDEN, zoneout_h=0.3, zoneout_c=0.2)
    x, h, c = torch.randn(1, 1, INPUT), torch.randn(1, 1, HIDDEN), torch.randn(1, 1, HIDDEN)
    draws = 20000
    many = [t.expand(1, draws, -1) for t in (x, h, c)]
    _, (h_drawn, c_drawn) = layer(many[0], (many[1], many[2]))
    _, (h_expected, c_expected) = layer.eval()(x, (h, c))
    for drawn, expected in ((h_drawn, h_expected), (c_drawn, c_expected)):
        error = (drawn.mean(1) - expected[0]).abs()
        assert (error <= 5 * drawn.std(1) / math.sqrt(draws) + 1e-6).all()


def test_random_masks_are_torchs_generators():
    layer = _layer({"zoneout_h": 0.5, "zoneout_c": 0.5, "recurrent_dropout": 0.5})
    inputs = _inputs(layer)
    first, second = _run(layer, *inputs), _run(layer, *inputs)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], layer(inputs[0], inputs[1:])[0])  # whatever the generator is at now
    layer.eval()
    assert torch.equal(layer(inputs[0], inputs[1:])[0], layer(inputs[0], inputs[1:])[0])


def test_checkpointed_backward_sees_the_same_masks():
    layer = _layer(EVERY)
    inputs = _inputs(layer)
    expected = _with_gradients(layer, inputs, _run(layer, *inputs))
    torch.manual_seed(3)
    y, h, c = torch.utils.checkpoint.checkpoint(
        lambda x, h, c: (lambda y, last: (y, *last))(*layer(x, (h, c))), *inputs, use_reentrant=False
    )
    for a, b in zip(_with_gradients(layer, inputs, (y, h, c)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (TypeError, "layer_norm: expected a bool, got int", {"layer_norm": 3}),
        (TypeError, "peephole: expected a bool, got str", {"peephole": "yes"}),
        (TypeError, "zoneout_h: expected a number, got str", {"zoneout_h": "0.5"}),
        (TypeError, "zoneout_c: expected a number, got bool", {"zoneout_c": True}),
        (ValueError, r"zoneout_h: expected a number in \[0, 1\], got 1.5", {"zoneout_h": 1.5}),
        (ValueError, r"zoneout_c: expected a number in \[0, 1\], got -0.1", {"zoneout_c": -0.1}),
        (ValueError, r"recurrent_dropout: expected a number in \[0, 1\), got 1", {"recurrent_dropout": 1.0}),
        (ValueError, "cell_clip: expected None or a positive number, got 0", {"cell_clip": 0}),
        (ValueError, "cell_clip: expected None or a positive number, got nan", {"cell_clip": math.nan}),
        (ValueError, "forget_bias: expected None without bias, got 1.0", {"forget_bias": 1.0, "bias": False}),
        (ValueError, "forget_bias: expected None or a finite number, got inf", {"forget_bias": math.inf}),
    ],
)
def test_layer_errors(error, words, options):
    with pytest.raises(error, match=words):
        fastnets.nn.LSTM(INPUT, HIDDEN, **options)


def test_options_are_keywords_of_lstm_alone():
    for name in ("GRU", "RNN"):
        with pytest.raises(TypeError, match="peephole"):
            getattr(fastnets.nn, name)(INPUT, HIDDEN, peephole=True)


def test_revert_keeps_what_torch_cannot_run():
    model = torch.nn.ModuleList([_layer({}), _layer(EVERY)])
    fastnets.revert(model)
    assert [type(layer) for layer in model] == [torch.nn.LSTM, fastnets.nn.LSTM]


def test_every_backend_takes_the_options_or_says_why_not():
    layer = _layer(EVERY, torch.float32)
    x = torch.randn(STEPS, BATCH, INPUT)
    for name in ("cpu", "simt"):
        if dispatch.why_missing(name) is not None:
            continue
        with fastnets.backend(name):
            if dispatch.IMPLEMENTATIONS["recurrent", name].supports(_case(layer)) is None:
                layer(x)
            else:
                with pytest.raises(dispatch.Unsupported, match="layer_norm"):
                    layer(x)
    (read,) = fastnets.explain(layer).operators
    (called,) = fastnets.explain(layer, x).operators
    assert read.backend == called.backend


def _case(layer) -> dispatch.Case:
    return dispatch.Case("recurrent", "cpu", torch.float32, frozenset(("lstm", *layer.options)))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_whole(training):
    layer = _layer(EVERY, torch.float32, proj_size=4).train(training)
    inputs = _inputs(layer)
    expected = _with_gradients(layer, inputs, _run(layer, *inputs))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    y, (h, c) = compiled(inputs[0], inputs[1:])
    for a, b in zip(_with_gradients(layer, inputs, (y, h, c)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_autocast():
    layer = _layer(EVERY, torch.float32)
    inputs = _inputs(layer)
    expected = _run(layer, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = _run(layer, *inputs)
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


@pytest.mark.skipif(dispatch.why_missing("cpu") is not None, reason=str(dispatch.why_missing("cpu")))
def test_threads_change_no_bit():
    """A batch of one shares its hidden units among threads, all but the norms; a larger one its rows."""
    former = torch.get_num_threads()
    try:
        for batch in (1, 9):
            found = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                torch.manual_seed(1)
                layer = fastnets.nn.LSTM(8, 264, **EVERY)
                inputs = [torch.randn(n, batch, size, requires_grad=True) for n, size in ((4, 8), (1, 264), (1, 264))]
                found.append(_with_gradients(layer, inputs, _run(layer, *inputs)))
            assert all(map(torch.equal, *found))
    finally:
        torch.set_num_threads(former)


GENTLE = {**EVERY, "zoneout_h": 0.05, "zoneout_c": 0.2, "recurrent_dropout": 0.2, "cell_clip": 1.0}


@pytest.mark.parametrize("options", [*ALONE, GENTLE], ids=lambda o: "-".join(o) if len(o) == 1 else "every")
def test_learns_the_language_of_a_word(options):
    pytest.importorskip("wordfreq")
    network = NETWORKS["lstm_classifier"]
    network = network._replace(factory=functools.partial(network.factory, hidden=32, **options))
    settings = Settings(seed=0, batch_size=32, learning_rate=0.01, dropout=True)
    trainer = Trainer(network, fastnets.nn, settings, Processes(0, 1, torch.device("cpu")))
    while len(trainer.losses) < 120:
        trainer.advance(120 - len(trainer.losses))
    first, last = sum(trainer.losses[:10]), sum(trainer.losses[-10:])
    assert last < 0.9 * first, f"the loss went from {first / 10:.3f} to {last / 10:.3f}"


@pytest.mark.skipif(dispatch.why_missing("simt") is not None, reason=str(dispatch.why_missing("simt")))
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda shape: "-".join(shape) or "plain")
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
def test_cuda_kernels_agree_in_every_schedule(device, norm, shape, training):
    """All options of packed sequences; without layer norm, too, for that has kernels of its own."""
    layer = _layer({**EVERY, "layer_norm": norm}, torch.float32, **shape).train(training)
    inputs = _inputs(layer)
    expected = _with_gradients(layer, inputs, _run(layer, *inputs, LENGTHS))
    with fastnets.backend("simt"):
        first = _with_gradients(layer, inputs, _run(layer, *inputs, LENGTHS))
        torch.testing.assert_close(first, expected, rtol=2e-5, atol=2e-5)
        for seed in range(1, 9):
            device.set_seed(seed)
            assert all(map(torch.equal, _with_gradients(layer, inputs, _run(layer, *inputs, LENGTHS)), first))


# ---- the operator --------------------------------------------------------------------------------------------------


def _operands(dtype=torch.float64, steps=3, batch=4, features=2, hidden=3, proj=0, seed=0):
    """The operands and a variant that has everything."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def mask(columns):
        return torch.rand(steps, batch, columns, generator=generator) < 0.5

    outputs = proj or hidden
    operands = [draw(steps, batch, features), draw(batch, outputs), draw(batch, hidden), draw(4 * hidden, features)]
    operands += [draw(4 * hidden, outputs), draw(4 * hidden), draw(4 * hidden), draw(proj, hidden) if proj else None]
    variant = Variant(draw(3 * hidden), draw(10 * hidden), mask(hidden), mask(outputs), mask(hidden), 2.0, clip=0.7)
    return operands, variant


VARIANTS = {
    "elementwise": lambda full: full._replace(norm=None),
    "layer norm": lambda full: Variant(norm=full.norm),
    "everything": lambda full: full,
    "evaluation": lambda full: Variant(full.peephole, full.norm, zoneout_h=0.2, zoneout_c=0.4, clip=0.7),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("proj", "lengths", "reverse"), [(0, None, False), (2, [3, 0, 1, 2], True)])
def test_gradients_of_gradients(name, proj, lengths, reverse):
    """On every backend those of autograd through the definition."""
    operands, variant = _operands(proj=proj)
    variant = VARIANTS[name](variant)
    leaves = [t.requires_grad_() for t in (*operands, *variant[:2]) if t is not None]
    options = {"lengths": lengths and torch.tensor(lengths), "cell": "lstm", "reverse": reverse, "variant": variant}
    found = []
    for backend in BACKENDS:
        with fastnets.backend(backend):
            total = sum(t.square().sum() for t in recurrent(*operands, **options))
            first = torch.autograd.grad(total, leaves, create_graph=True)
            found.append([*first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)])
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(dispatch.why_missing("cpu") is not None, reason=str(dispatch.why_missing("cpu")))
@pytest.mark.parametrize("name", VARIANTS)
def test_opcheck(name):
    for dtype, proj, lengths in [(torch.float32, 0, None), (torch.bfloat16, 2, torch.tensor([3, 0, 1, 2]))]:
        operands, variant = _operands(dtype, proj=proj)
        variant = VARIANTS[name](variant)
        forward, backward = torch.ops.fastnets.recurrent_forward, torch.ops.fastnets.recurrent_backward
        torch.library.opcheck(forward, (*operands, lengths, 0, True, False, False, *variant))
        torch.library.opcheck(forward, (*operands, lengths, 0, True, False, True, *variant))
        y, h, c, gates, cells = forward(*operands, lengths, 0, True, False, True, *variant)
        x, h0, c0, w_ih, w_hh, _, _, w_hr = operands
        common = (y, h, c, x, h0, c0, w_ih, w_hh, w_hr, lengths, y, gates, cells, 0, True, False)
        torch.library.opcheck(backward, (*common, True, True, *variant))
        torch.library.opcheck(backward, (*common, False, False, *variant))


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, "peephole: expected shape", {"peephole": torch.randn(8)}),
        (TypeError, "norm: expected torch.float32 like x", {"norm": torch.randn(30).double()}),
        (TypeError, "keep_g: expected bool", {"keep_g": torch.ones(3, 4, 3)}),
        (ValueError, "hold_h: expected shape", {"hold_h": torch.ones(3, 4, 2, dtype=torch.bool)}),
        (TypeError, "hold_c: expected a Tensor", {"hold_c": True}),
        (ValueError, "zoneout_h: expected a number in", {"zoneout_h": 2.0}),
        (ValueError, "keep_scale: expected a positive number", {"keep_scale": 0.0}),
        (ValueError, "clip: expected a positive number", {"clip": -1.0}),
    ],
)
def test_operator_errors(error, words, change):
    operands, variant = _operands(torch.float32)
    with pytest.raises(error, match=words):
        recurrent(*operands, cell="lstm", variant=variant._replace(**change))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "lstm"])
def test_variants_are_of_lstm_alone(cell):
    operands, variant = _operands(torch.float32)
    gates = {"gru": 9}.get(cell, 3)
    x, h, _, w_ih, w_hh, *_ = operands
    with pytest.raises(ValueError, match=f"variant: expected none for {cell}, got peephole"):
        recurrent(x, h, None, w_ih[:gates], w_hh[:gates], cell=cell, variant=Variant(variant.peephole))
    if dispatch.why_missing("cpu") is None:
        run = torch.ops.fastnets.recurrent_forward
        with pytest.raises(RuntimeError, match="belong to lstm alone"):
            run(x, h, None, w_ih[:gates], w_hh[:gates], *[None] * 4, CELLS.index(cell), False, False, False, clip=1.0)

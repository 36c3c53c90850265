"""The persistent recurrent kernels on the SIMT device, beyond the operator table: schedules, residence, traffic."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnets
from fastnets import dispatch
from fastnets.ops.recurrent import GATES, Direction, recurrent, recurrent_both
from fastnets.reference.recurrent import CELLS
from fastnets.testing import full_precision

pytestmark = pytest.mark.skipif(dispatch.why_missing("simt") is not None, reason=str(dispatch.why_missing("simt")))


@pytest.fixture
def device():
    from fastnets import _simt

    shared, resident = _simt.shared_limit(), _simt.resident_limit()
    with full_precision():
        yield _simt
    _simt.set_shared_limit(shared)
    _simt.set_resident_limit(resident)
    _simt.set_seed(0)
    _simt.set_counting(False)


def _operands(cell, dtype=torch.float32, steps=4, batch=5, features=3, hidden=20, proj=0):
    generator = torch.Generator().manual_seed(3)
    gates, outputs, scale = GATES[cell] * hidden, proj or hidden, hidden**-0.5
    shapes = [(steps, batch, features), (batch, outputs), (batch, hidden), (gates, features), (gates, outputs)]
    shapes += [(gates,), (gates,), (proj, hidden)]
    drawn = [torch.randn(shape, generator=generator) * (scale if i > 2 else 1) for i, shape in enumerate(shapes)]
    drawn = [t.to(dtype) for t in drawn]
    drawn[2] = drawn[2] if cell == "lstm" else None
    drawn[7] = drawn[7] if proj else None
    return drawn


def _run(backend, operands, **options):
    """Every output and every gradient."""
    operands = [t if t is None else t.detach().requires_grad_() for t in operands]
    with fastnets.backend(backend):
        outputs = [t for t in recurrent(*operands, **options) if t is not None]
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) for i, t in enumerate(outputs)]
        total = sum((t * w.to(t)).sum() for t, w in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(total, [t for t in operands if t is not None])]


def _assert_close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


OPTIONS = [
    ("lstm", 0, False, None),
    ("lstm", 7, True, [4, 0, 2, 1, 3]),
    ("gru", 0, True, [1, 4, 0, 3, 2]),
    ("rnn_tanh", 0, False, [2, 0, 4, 4, 1]),
    ("rnn_relu", 0, True, None),
]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("cell", "proj", "reverse", "lengths"), OPTIONS)
def test_every_schedule_gives_the_same_bits(device, cell, proj, reverse, lengths, seed):
    operands = _operands(cell, proj=proj)
    options = {"cell": cell, "reverse": reverse, "lengths": None if lengths is None else torch.tensor(lengths)}
    first = _run("simt", operands, **options)
    _assert_close(first, _run("cpu", operands, **options), rtol=2e-5, atol=2e-5)
    device.set_seed(seed)
    assert all(map(torch.equal, _run("simt", operands, **options), first))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_where_the_weights_stay_changes_no_bit(device, cell):
    """In registers and shared memory, partly in global memory; a strip a block, all strips in one block."""
    operands = _operands(cell, torch.bfloat16, steps=3, batch=3, hidden=72, proj=40 if cell == "lstm" else 0)
    first = _run("simt", operands, cell=cell)
    _assert_close(first, _run("cpu", operands, cell=cell), rtol=0.05, atol=0.05)
    for resident, shared in [(1, 232448), (1, 40 << 10), (2, 70 << 10), (3, 40 << 10)]:
        device.set_resident_limit(resident)
        device.set_shared_limit(shared)
        assert all(map(torch.equal, _run("simt", operands, cell=cell), first))


def test_shares_of_the_batch_change_no_bit(device):
    """Three groups of rows, one after the other in the same blocks, and each with blocks of its own."""
    operands = _operands("gru", batch=70)
    device.set_resident_limit(1)
    first = _run("simt", operands, cell="gru")
    _assert_close(first, _run("cpu", operands, cell="gru"), rtol=2e-5, atol=2e-5)
    for resident in (5, 32):
        device.set_resident_limit(resident)
        device.reset_counters()
        device.set_counting(True)
        assert all(map(torch.equal, _run("simt", operands, cell="gru"), first))
        assert device.largest_grid() == resident // 2 * 2 if resident < 6 else 6  # two strips each, three groups


def _products(device, dtype, batch):
    """Instructions of the tensor cores in one step forwards."""
    device.reset_counters()
    with torch.no_grad(), fastnets.backend("simt"):
        recurrent(*_operands("lstm", dtype, steps=1, batch=batch, features=8, hidden=64), cell="lstm")
    return device.counters()["recurrent_forward"]["mma"]


def test_small_batches_pad_no_products(device):
    device.set_counting(True)
    assert [_products(device, torch.float32, batch) for batch in (1, 4)] == [0, 0]
    eight, sixteen, more = (_products(device, torch.bfloat16, batch) for batch in (1, 16, 32))
    assert eight == 4 * 64 * (64 + 32) // (16 * 16)  # of w_hh, and of w_ih in whole chunks of 32
    assert (sixteen, more) == (2 * eight, 4 * eight)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("features", [8, 24, 3])
def test_a_step_is_one_launch_that_waits_for_nobody(device, cell, features):
    """Its product with x included, where the rows of x are whole pieces of 16 bytes."""
    operands = _operands(cell, steps=1, batch=6, features=features)
    device.reset_counters()
    device.set_counting(True)
    device.set_resident_limit(0)
    with torch.no_grad(), fastnets.backend("simt"):
        mine = [t for t in recurrent(*operands, cell=cell) if t is not None]
    with torch.no_grad(), fastnets.backend("cpu"):
        true = [t for t in recurrent(*operands, cell=cell) if t is not None]
    _assert_close(mine, true, rtol=2e-5, atol=2e-5)
    counters = device.counters()["recurrent_forward"]
    assert counters["launches"] == 1
    gates, hidden, size = GATES[cell], 20, 4
    weights = gates * hidden * (hidden + (features if features % 4 == 0 else 0)) * size
    assert counters["global_load_bytes"] >= weights


def _loaded(device, kernel, steps, **sizes):
    """Bytes that a pass over a sequence loads from global memory."""
    device.reset_counters()
    _run("simt", _operands("lstm", torch.bfloat16, steps=steps, **sizes), cell="lstm")
    return device.counters()[kernel]["global_load_bytes"]


def test_a_step_loads_no_weights(device):
    device.set_counting(True)
    hidden, batch = 64, 2
    sizes = {"hidden": hidden, "batch": batch, "features": 2}
    weights = 4 * hidden * hidden * 2
    blocks = hidden // 8  # of 8 units forwards
    of_steps = _loaded(device, "recurrent_forward", 5, **sizes) - _loaded(device, "recurrent_forward", 4, **sizes)
    # Every block reads h; of every unit somebody its gates' share of x, both biases and the state.
    assert of_steps == blocks * batch * hidden * 2 + batch * hidden * (3 * 4 * 2 + 4)
    device.set_resident_limit(1)
    device.set_shared_limit(40 << 10)  # too little for the weights
    streamed = _loaded(device, "recurrent_forward", 5, **sizes) - _loaded(device, "recurrent_forward", 4, **sizes)
    assert of_steps < streamed < of_steps + weights
    assert streamed > weights // 2


def test_a_device_without_cooperative_launches_is_told_apart(device):
    device.set_resident_limit(0)
    with pytest.raises(RuntimeError, match="recurrent_forward: the device takes no cooperative launch"):
        _run("simt", _operands("gru"), cell="gru")


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_that_validation_cannot_see_are_clamped(device, cell):
    operands = _operands(cell)
    wild, tame = torch.tensor([99, -7, 3, 1, 0]), torch.tensor([4, 0, 3, 1, 0])
    run, index = torch.ops.fastnets_simt.recurrent_forward, CELLS.index(cell)
    mine, true = (run(*operands, lengths, index, True, False, True) for lengths in (wild, tame))
    assert all(map(torch.equal, mine, true))


def test_tf32_where_it_is_allowed(device):
    operands = _operands("lstm", hidden=64)
    exact = _run("cpu", operands, cell="lstm")
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # full_precision gives it back
    rounded = _run("simt", operands, cell="lstm")
    error = max((a - b).abs().max().item() for a, b in zip(rounded, exact, strict=True))
    assert 1e-5 < error < 2e-2


def test_rows_that_miss_their_alignment(device):
    operands = _operands("gru", torch.bfloat16, hidden=24)
    shifted = []
    for t in operands:
        if t is not None:
            memory = torch.empty(t.numel() + 1, dtype=t.dtype)
            t = memory[1:].view_as(t).copy_(t)
        shifted.append(t)
    assert all(map(torch.equal, _run("simt", shifted, cell="gru"), _run("simt", operands, cell="gru")))


def test_infinite_input_stays_infinite_in_a_small_batch(device):
    """One by one, no weight is split in two, of which the second would be infinity less infinity."""
    operands = _operands("rnn_relu", steps=1, batch=2)
    operands[1][0, 3] = torch.inf
    operands[4][:, 3] = operands[4][:, 3].abs()
    y = _run("simt", operands, cell="rnn_relu")[0]
    assert y[0, 0].isposinf().all()
    assert y[0, 1].isfinite().all()


def test_weights_that_no_chip_holds(device):
    """The bytes of 1000 hidden units are streamed, and nothing hangs where a few blocks run at once."""
    operands = _operands("rnn_tanh", steps=2, batch=1, hidden=1000)
    device.set_resident_limit(3)
    _assert_close(_run("simt", operands, cell="rnn_tanh"), _run("cpu", operands, cell="rnn_tanh"), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("hidden", [17, 200])
@pytest.mark.parametrize("cell", CELLS)
def test_hidden_sizes_that_are_multiples_of_nothing(device, cell, hidden):
    operands = _operands(cell, steps=2, batch=3, hidden=hidden)
    _assert_close(_run("simt", operands, cell=cell), _run("cpu", operands, cell=cell), rtol=2e-5, atol=2e-5)


def _launches(device):
    return [device.counters()[f"recurrent_{way}"]["launches"] for way in ("forward", "backward")]


@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "peephole": True}], ids=["plain", "options"])
@pytest.mark.parametrize(("resident", "launches"), [(32, [1, 1]), (6, [1, 1]), (5, [2, 1]), (3, [2, 2])])
def test_both_directions_are_one_launch_where_they_fit(device, resident, launches, options):
    """20 units are three strips of 8 forwards, and two of 16 backwards."""
    torch.manual_seed(0)
    layer = fastnets.nn.LSTM(3, 20, bidirectional=True, **options)
    x = torch.randn(4, 5, 3)
    outputs = {}
    for backend in ("simt", "cpu"):
        if backend == "simt":
            device.set_resident_limit(resident)
            device.reset_counters()
            device.set_counting(True)
        with fastnets.backend(backend):
            y, (h, c) = layer(x)
            gradients = torch.autograd.grad(y.square().sum() + h.sum() + c.sum(), list(layer.parameters()))
            outputs[backend] = [y, h, c, *gradients]
    assert _launches(device) == launches
    _assert_close(outputs["simt"], outputs["cpu"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("seed", range(8))
def test_directions_at_once_give_the_bits_of_each_alone(device, cell, seed):
    device.set_seed(seed)
    lengths = torch.tensor([4, 0, 3, 1, 2])
    x, *ahead = _operands(cell)
    back = [None if t is None else t.flip(0) for t in ahead]
    tensors = [t for t in (x, *ahead, *back) if t is not None]
    for t in tensors:
        t.requires_grad_()

    def gradients(results):
        total = sum((t * (i + 1)).square().sum() for i, t in enumerate(results))
        return [*results, *torch.autograd.grad(total, tensors)]

    with fastnets.backend("simt"):
        at_once = recurrent_both(x, Direction(*ahead), Direction(*back), lengths=lengths, cell=cell)
        alone = [
            recurrent(x, *own, lengths=lengths, cell=cell, reverse=reverse)
            for own, reverse in ((ahead, False), (back, True))
        ]
        mine, true = (gradients([t for own in found for t in own if t is not None]) for found in (at_once, alone))
    assert all(map(torch.equal, mine, true))


@pytest.mark.parametrize(
    ("cell", "options"), [*((cell, "plain") for cell in CELLS), ("lstm", "projected"), ("lstm", "norm")]
)
def test_fake_kernels_know_the_shapes_of_both_directions(device, cell, options):
    """What torch.compile is told: the operators have no kernels for CPU tensors in their own library."""
    x, *own = _operands(cell, proj=7 if options == "projected" else 0)
    own = [*own, torch.randn(60), torch.randn(200) if options == "norm" else None, None, None, None]
    own = own if options == "norm" else [*own[:7], *([None] * 5)]
    index = CELLS.index(cell)
    forward = torch.ops.fastnets_simt.recurrent_forward_both(x, own, own, None, index, False, True)
    behind = [[None, None, None, forward[first], *forward[first + 3 : first + 5]] for first in (0, 5)]
    backward = torch.ops.fastnets_simt.recurrent_backward_both(x, own, own, *behind, None, index, False, True, True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        faked = torch.ops.fastnets.recurrent_forward_both(x, own, own, None, index, False, True)
        faked_back = torch.ops.fastnets.recurrent_backward_both(x, own, own, *behind, None, index, False, True, True)
    for real, fake in zip((*forward, *backward), (*faked, *faked_back), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_directions_that_differ_are_refused_by_the_operator(device):
    x, *own = _operands("lstm")
    masks = [None] * 5
    smaller = _operands("lstm", hidden=10)[1:]
    with pytest.raises(RuntimeError, match="both directions have the same sizes"):
        torch.ops.fastnets_simt.recurrent_forward_both(x, [*own, *masks], [*smaller, *masks], None, 0, False, False)
    with pytest.raises(RuntimeError, match="a direction has 12 tensors"):
        torch.ops.fastnets_simt.recurrent_forward_both(x, own, own, None, 0, False, False)

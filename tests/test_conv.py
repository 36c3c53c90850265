"""The convolutions beyond the operator table: PyTorch's samples and errors, modules, gradients, callers, bad input."""

import copy
import io
import itertools
import math
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from convolutions import FLOATING, gradients, innermost
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastnets
from fastnets import dispatch, functional
from fastnets.reference.conv import ACTIVATIONS

NAMES = [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]
CLASSES = [f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3)]
OPERATORS = [op for op in op_db if op.name.removeprefix("nn.functional.") in NAMES]
MODULES = [info for info in module_db if info.module_cls.__name__ in CLASSES]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def short(value) -> str:
    return getattr(value, "name", str(value)).removeprefix("nn.functional.").removeprefix("torch.")


# ---- PyTorch's samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPERATORS, ids=short)
@pytest.mark.parametrize("dtype", [*FLOATING, torch.complex64, torch.int64], ids=short)
def test_samples_of_torch(op, dtype):
    ours = getattr(functional, short(op))
    differentiable = dtype != torch.int64
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=differentiable):
        y, stock = ours(sample.input, *sample.args, **sample.kwargs), op(sample.input, *sample.args, **sample.kwargs)
        # Both round the same sums to dtype; what they sum is drawn from [-9, 9].
        tolerance = {"rtol": 2e-2, "atol": 0.5} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(y, stock, **tolerance)
        if differentiable:
            leaves = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
            if dtype.is_complex:
                found, expected = (torch.autograd.grad(out.abs().sum(), leaves) for out in (y, stock))
            else:
                found, expected = gradients(y, leaves), gradients(stock, leaves)
            torch.testing.assert_close(found, expected, **tolerance)
        count += 1
    assert count > 0


@pytest.mark.parametrize("op", [op for op in OPERATORS if op.error_inputs_func], ids=short)
def test_errors_of_torch(op):
    ours = getattr(functional, short(op))
    count = 0
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex) as caught:
            ours(sample.input, *sample.args, **sample.kwargs)
        assert isinstance(caught.value, (TypeError, ValueError))
        count += 1
    assert count > 0


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_module_samples_of_torch(info, dtype):
    ours = getattr(fastnets.nn, info.module_cls.__name__)
    count = 0
    for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=True):
        arguments, x = sample.constructor_input, sample.forward_input.args[0]
        torch.manual_seed(3)
        stock = info.module_cls(*arguments.args, **arguments.kwargs, dtype=dtype)
        torch.manual_seed(3)
        layer = ours(*arguments.args, **arguments.kwargs, dtype=dtype)
        strided = torch.stack([x.detach(), x.detach()], dim=-1)[..., 0].requires_grad_()
        assert not strided.is_contiguous()
        outputs = []
        for module, value in ((stock, x), (layer, x), (layer, strided), (pickle.loads(pickle.dumps(layer)), x)):
            leaves = [value, *module.parameters()]
            y = module(value)
            first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            outputs.append([y, *first, *second])
        for found in outputs[1:]:
            # Gradients of gradients reach thousands.
            torch.testing.assert_close(found, outputs[0], rtol=1e-3, atol=1e-2 if dtype == torch.float32 else 1e-9)
        count += 1
    assert count > 0


# ---- modules ---------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "groups": 2},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "circular"},
]
TRANSPOSED_OPTIONS = [
    {},
    {"bias": False, "stride": 2},
    {"stride": 3, "padding": 1, "output_padding": 2},
    {"dilation": 2, "groups": 2, "padding": 2},
]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_modules_are_drop_in(kind, dims, unbatched):
    name = f"{kind}{dims}d"
    for options in OPTIONS if kind == "Conv" else TRANSPOSED_OPTIONS:
        torch.manual_seed(1)
        stock = getattr(torch.nn, name)(4, 6, 3, dtype=torch.float64, **options)
        torch.manual_seed(1)
        layer = getattr(fastnets.nn, name)(4, 6, 3, dtype=torch.float64, **options)
        assert isinstance(layer, type(stock))
        assert repr(layer) == repr(stock)
        x = torch.randn((4, *(7, 6, 5)[:dims]) if unbatched else (2, 4, *(7, 6, 5)[:dims]), dtype=torch.float64)
        x.requires_grad_()
        found, expected = ([y := module(x), *gradients(y, [x, *module.parameters()])] for module in (layer, stock))
        torch.testing.assert_close(found, expected)
        layer.load_state_dict(stock.state_dict(), strict=True)
        stock.__class__ = type(layer)  # no state of its own: converting is a change of class
        torch.testing.assert_close(stock(x), expected[0])


def test_output_size_chooses_among_the_transposed_sizes():
    layer = fastnets.nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 6, 7)
    assert layer(x).shape[2:] == (11, 13)
    assert layer(x, output_size=[12, 13]).shape[2:] == (12, 13)
    assert layer(x, [2, 5, 11, 14]).shape[2:] == (11, 14)
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=[13, 13])


def test_the_kernels_run_and_say_when_they_do_not():
    seen = []
    with dispatch.recording(lambda case, chosen, objections: seen.append((chosen.backend, objections))):
        functional.conv2d(torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3))
        functional.conv2d(torch.ones(1, 2, 5, 5).long(), torch.ones(3, 2, 3, 3).long())
    assert [backend for backend, _ in seen] == ["cpu", "reference"]
    assert "int64" in seen[1][1]["cpu"]


# ---- memory format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["neither", "input", "weight"])
def test_result_has_the_memory_format_that_torch_gives(name, which):
    dims = int(name[-2])
    x, weight = torch.randn(2, 4, *(6, 7, 8)[:dims]), torch.randn(4, 4, *(3, 2, 3)[:dims])
    x = innermost(x) if which == "input" else x
    weight = innermost(weight) if which == "weight" else weight
    y = getattr(functional, name)(x, weight)
    assert y.is_contiguous() == (which == "neither")
    assert y.movedim(1, -1).is_contiguous() == (which != "neither")
    if dims == 2:
        assert y.stride() == getattr(torch.nn.functional, name)(x, weight).stride()


def test_views_of_any_strides():
    base = torch.randn(9, 3, 8, 2, 10, dtype=torch.float64)
    x = base[::2, :, 1:, 1, ::3].transpose(2, 3)
    weight = torch.randn(3, 5, 6, 3, dtype=torch.float64).permute(2, 0, 3, 1)[:, :, :2, ::2]
    bias = torch.randn(12, dtype=torch.float64)[::2]
    torch.testing.assert_close(functional.conv2d(x, weight, bias), torch.nn.functional.conv2d(x, weight, bias))
    expanded = torch.randn(1, 3, 1, 1, dtype=torch.float64).expand(4, 3, 6, 6)
    torch.testing.assert_close(functional.conv2d(expanded, weight), torch.nn.functional.conv2d(expanded, weight))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_gradients(activation, transposed):
    x = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    conv = functional.conv_transpose2d if transposed else functional.conv2d
    options = {"stride": (2, 1), "padding": 1, "groups": 2}
    shape = conv(x, weight, bias, **options).shape
    residual = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias, residual):
        return conv(x, weight, bias, **options, activation=activation, residual=residual)

    assert torch.autograd.gradcheck(run, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias, residual))


@pytest.mark.parametrize("wanted", [set(c) for n in range(1, 5) for c in itertools.combinations(range(4), n)], ids=str)
def test_only_the_gradients_asked_for(wanted):
    inputs = [torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(2, 4, 3, 3)]
    leaves = [t.requires_grad_() for i, t in enumerate(inputs) if i in wanted]
    x, weight, bias, residual = inputs
    y = functional.conv2d(x, weight, bias, activation="silu", residual=residual)
    stock = ACTIVATIONS["silu"](torch.nn.functional.conv2d(x, weight, bias) + residual)
    torch.testing.assert_close(gradients(y, leaves), gradients(stock, leaves))


def test_gradient_of_weight_is_the_same_every_time():
    x, weight = torch.randn(8, 16, 20, 20), torch.randn(24, 16, 3, 3, requires_grad=True)
    first = gradients(functional.conv2d(x, weight), [weight])[0]
    for _ in range(5):
        assert gradients(functional.conv2d(x, weight), [weight])[0].equal(first)


def test_nan_and_infinities_follow_torch():
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    x[0, 0, 0, 0], x[1, 2, 3, 3] = torch.nan, torch.inf
    for name, activation in ACTIVATIONS.items():
        y = functional.conv2d(x, weight, padding=1, activation=name)
        plain = torch.nn.functional.conv2d(x, weight, padding=1)
        expected = activation(plain)
        if name == "gelu":  # PyTorch's vectorised one gives NaN; the limit is infinity
            expected = torch.where(plain == torch.inf, plain, expected)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_opcheck():
    ops = torch.ops.fastnets
    for channels_last, activation in ((False, 0), (True, 2)):
        x, weight, residual = torch.randn(2, 4, 6, 5), torch.randn(6, 2, 3, 3), torch.randn(2, 6, 3, 3)
        if channels_last:
            x, weight, residual = innermost(x), innermost(weight), innermost(residual)
        geometry = [2, 2], [1, 1], [1, 1], 2, channels_last, False
        bias = torch.randn(6)
        epilogue = activation, activation > 0
        torch.library.opcheck(ops.conv_forward, (x, weight, bias, residual, [3, 3], *geometry, *epilogue))
        y = ops.conv_forward(x, weight, None, None, [3, 3], *geometry, 0, False)[0]
        torch.library.opcheck(ops.conv_grad_input, (y, weight, None, None, [6, 5], *geometry, *epilogue))
        for with_bias in (False, True):
            torch.library.opcheck(ops.conv_grad_weight, (y, x, weight, *geometry, with_bias))
        torch.library.opcheck(ops.conv_grad_epilogue, (y, y.clone(), activation))


# ---- callers ---------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = fastnets.nn.Conv2d(3, 8, 3, padding=1)
        self.second = fastnets.nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.third = fastnets.nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        return self.third(torch.relu(self.second(self.first(x).relu())))


@pytest.mark.parametrize("channels_last", [False, True])
def test_compile(channels_last):
    net, x = Net(), torch.randn(2, 3, 8, 8)
    x = (innermost(x) if channels_last else x).requires_grad_()
    expected = [y := net(x), *gradients(y, [x, *net.parameters()])]
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = [y := compiled(x), *gradients(y, [x, *net.parameters()])]
    torch.testing.assert_close(found, expected)
    assert found[0].stride() == expected[0].stride()


def test_compile_with_dynamic_sizes():
    def run(x, weight, bias):
        return functional.conv2d(x, weight, bias, stride=2, padding=1, activation="gelu")

    weight, bias = torch.randn(5, 3, 3, 3, requires_grad=True), torch.randn(5)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (8, 9, 14):
        x = torch.randn(2, 3, size, size + 1)
        torch.testing.assert_close(compiled(x, weight, bias), run(x, weight, bias))
        torch.testing.assert_close(
            gradients(compiled(x, weight, bias), [weight]), gradients(run(x, weight, bias), [weight])
        )


def test_export():
    net, x = Net().eval(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x))
    assert "fastnets" in str(program.graph)


def test_deepcopy_pickle_save_and_functional_call():
    net, x = Net(), torch.randn(2, 3, 8, 8)
    expected = net(x)
    torch.testing.assert_close(copy.deepcopy(net)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(net))(x), expected)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = Net()
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(x), expected)
    parameters = {name: p.detach().mul(2).requires_grad_() for name, p in net.named_parameters()}
    y = torch.func.functional_call(net, parameters, (x,))
    assert not torch.allclose(y, expected)
    assert all(g is not None for g in gradients(y, list(parameters.values())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_autocast_follows_torch(dtype):
    ours, stock = fastnets.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype):
        y, expected = ours(x), stock(x)
        assert ours.double()(x.double()).dtype == stock.double()(x.double()).dtype
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("column", [0, -1])
@pytest.mark.parametrize(("channels", "size"), [(1, 9), (3, 21), (20, 12)])
def test_infinities_stay_out_of_sums_that_they_are_no_part_of(channels, size, column):
    """Without padding a pixel of the first or last column meets one column of taps, and is part of one of results."""
    x, weight = torch.randn(2, channels, size, size), torch.randn(5, channels, 3, 3, requires_grad=True)
    x[0, 0, :, column] = torch.inf
    y = fastnets.functional.conv2d(x, weight)
    (grad,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    expected, of_taps = torch.ones_like(y, dtype=torch.bool), torch.ones_like(weight, dtype=torch.bool)
    expected[0, :, :, column], of_taps[:, 0, :, column] = False, False
    assert torch.equal(y.isfinite(), expected)
    assert torch.equal(grad.isfinite(), of_taps)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [9, 20])
@pytest.mark.parametrize("column", [0, -1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_infinities_of_a_depthwise_convolution(kernel, size, column, memory_format):
    x = torch.randn(2, 3, size, size).to(memory_format=memory_format)
    weight = torch.randn(3, 1, kernel, kernel, requires_grad=True)
    x[0, 0, :, column] = torch.inf
    y = fastnets.functional.conv2d(x, weight, groups=3)
    (grad,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    expected, of_taps = torch.ones_like(y, dtype=torch.bool), torch.ones_like(weight, dtype=torch.bool)
    expected[0, 0, :, column], of_taps[0, 0, :, column] = False, False
    assert torch.equal(y.isfinite(), expected)
    assert torch.equal(grad.isfinite(), of_taps)


def test_eight_threads_share_a_layer():
    layer, x = fastnets.nn.Conv2d(16, 40, 3, padding=1), torch.randn(4, 16, 12, 12)
    expected = [y := layer(x), *gradients(y, list(layer.parameters()))]
    wrong = []

    def work():
        for _ in range(10):
            found = [y := layer(x), *gradients(y, list(layer.parameters()))]
            if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fork_after_use():
    run_python(
        "import os, torch, fastnets\n"
        "torch.set_num_threads(4)\n"
        "x, w = torch.randn(8, 16, 32, 32), torch.randn(32, 16, 3, 3)\n"
        "y = fastnets.functional.conv2d(x, w)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    again = fastnets.functional.conv2d(x, w)\n"
        "    torch.set_num_threads(1)\n"  # torch's own threads do not survive a fork
        "    os._exit(0 if torch.allclose(again, y, atol=1e-4) else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    ({"stride": 0}, ValueError, "stride"),
    ({"stride": (1, 2, 3)}, ValueError, "stride"),
    ({"stride": 1.5}, TypeError, "stride"),
    ({"padding": -1}, ValueError, "padding"),
    ({"padding": "most"}, ValueError, "padding"),
    ({"padding": "same", "stride": 2}, ValueError, "padding"),
    ({"dilation": 0}, ValueError, "dilation"),
    ({"dilation": 9}, ValueError, "kernel"),
    ({"groups": 0}, ValueError, "groups"),
    ({"groups": 4}, ValueError, "groups"),
    ({"groups": 2}, ValueError, "input"),
    ({"groups": "two"}, TypeError, "groups"),
    ({"activation": "softplus"}, ValueError, "activation"),
    ({"residual": torch.zeros(1)}, ValueError, "residual"),
    ({"residual": 3}, TypeError, "residual"),
    ({"bias": torch.zeros(3)}, ValueError, "bias"),
    ({"bias": torch.zeros(6).double()}, TypeError, "bias"),
    ({"bias": [1.0]}, TypeError, "bias"),
    ({"weight": torch.zeros(6, 4, 3)}, ValueError, "weight"),
    ({"weight": torch.zeros(6, 5, 3, 3)}, ValueError, "input"),
    ({"weight": torch.zeros(6, 4, 3, 3).half()}, TypeError, "weight"),
    ({"weight": torch.zeros(6, 4, 3, 3, device="meta")}, ValueError, "weight"),
    ({"weight": None}, TypeError, "weight"),
    ({"input": torch.zeros(4, 4)}, ValueError, "input"),
    ({"input": torch.zeros(1, 4, 2, 8)}, ValueError, "kernel"),
    ({"input": [[0.0]]}, TypeError, "input"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_named(change, error, argument):
    arguments = {"input": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(6, 4, 3, 3), "bias": None} | change
    with pytest.raises(error, match=argument):
        functional.conv2d(**arguments)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"output_padding": 2}, "output_padding"),
        ({"output_padding": -1}, "output_padding"),
        ({"padding": 9}, "padding"),
        ({"stride": -1}, "stride"),
        ({"groups": 5}, "groups"),
    ],
    ids=str,
)
def test_bad_transposed_input_is_named(change, argument):
    with pytest.raises(ValueError, match=argument):
        functional.conv_transpose2d(torch.zeros(1, 4, 8, 8), torch.zeros(4, 6, 3, 3), **{"stride": 2} | change)


def test_sizes_past_two_to_the_31_on_meta():
    x, weight = torch.empty(3, 1 << 15, 1 << 16, device="meta"), torch.empty(5, 3, 3, 3, device="meta")
    assert functional.conv2d(x, weight).shape == (5, (1 << 15) - 2, (1 << 16) - 2)
    assert functional.conv_transpose2d(x, weight.transpose(0, 1), stride=3).shape == (5, 3 << 15, 3 << 16)
    with pytest.raises(ValueError, match="stride"):
        functional.conv2d(x, weight, stride=0)
    with pytest.raises(ValueError, match="kernel"):
        functional.conv2d(x, weight, dilation=1 << 31)


@pytest.mark.parametrize("name", ["conv_transpose2d", "linear"])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_only_the_gradients_asked_for_elsewhere(name, wanted):
    """The bias's comes with the weight's where both are asked for."""
    inputs = [torch.randn(2, 4, 6, 5), torch.randn(4, 4, 3, 3), torch.randn(4)]
    if name == "linear":
        inputs[1] = torch.randn(4, 5)
    with fastnets.backend("cpu"):
        leaves = [t.clone().requires_grad_(needs) for t, needs in zip(inputs, wanted, strict=True)]
        y = getattr(functional, name)(*leaves)
    found = gradients(y, [t for t in leaves if t.requires_grad])
    truths = [t.double().requires_grad_() for t in inputs]
    expected = gradients(getattr(torch.nn.functional, name)(*truths), truths)
    for ours, true in zip(found, itertools.compress(expected, wanted), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e38])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "size", "kernel", "stride"), [(32, 20, 3, 1), (6, 75, 7, 2)])
def test_an_infinite_source_spoils_what_sees_it_alone(bad, memory_format, channels, size, kernel, stride):
    """Winograd's transforms would spread it over a tile, and overflow near the largest number."""
    x = torch.randn(2, channels, size, size)
    x[1, 5, 7, 9] = bad
    weight = (torch.randn(40, channels, kernel, kernel) / 17).to(memory_format=memory_format)
    x = x.to(memory_format=memory_format)
    weight.requires_grad_()
    ours, stock = (call(x, weight, stride=stride) for call in (functional.conv2d, torch.nn.functional.conv2d))
    torch.testing.assert_close(ours, stock, equal_nan=True, rtol=1e-5, atol=1e-5)
    # Of the weight's gradient it spoils one channel's taps.
    for found, expected in zip(gradients(ours, [weight]), gradients(stock, [weight]), strict=True):
        assert expected[:, :5].isfinite().all()
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "kernel", "groups"), [(32, 3, 1), (3, 3, 1), (5, 5, 1), (70, 1, 1), (70, 3, 70), (6, 3, 3)]
)
def test_an_infinite_gradient_reaches_its_bias_alone(channels, kernel, groups, memory_format):
    x = torch.randn(2, channels, 20, 21).to(memory_format=memory_format)
    weight, bias = torch.randn(70 // groups * groups, channels // groups, kernel, kernel), torch.randn(70)
    bias = bias[: len(weight)].clone().requires_grad_()
    y = functional.conv2d(x, weight.requires_grad_(), bias, groups=groups)
    grad = torch.randn_like(y)
    grad[1, 5, 3, 4] = torch.inf
    expected = grad.double().sum((0, 2, 3)).float()
    found = torch.autograd.grad(y, [weight, bias], grad)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


LARGE = {  # results of 4 MiB and more where all is more than 16, which go past the caches: x, weight, options
    "first layer": ((9, 3, 96, 160), (32, 3, 3, 3), {"padding": 1}),
    "3x3": ((6, 32, 96, 160), (32, 32, 3, 3), {"padding": 1}),
    "7x7": ((6, 3, 200, 224), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "stride 2": ((6, 16, 160, 192), (48, 16, 3, 3), {"stride": 2, "padding": 1}),
    "1x1": ((3, 24, 144, 160), (40, 24, 1, 1), {}),
    "1x1, odd plane": ((3, 24, 145, 161), (40, 24, 1, 1), {}),
    "depthwise": ((4, 48, 112, 128), (48, 1, 3, 3), {"padding": 1, "groups": 48}),
    "one channel": ((1, 24, 1100, 1000), (1, 24, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_results_past_the_caches(name, channels_last):
    sizes, weight_sizes, options = LARGE[name]
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(sizes, generator=generator), torch.randn(weight_sizes, generator=generator)
    bias = torch.randn(weight_sizes[0], generator=generator)
    if channels_last:
        x = innermost(x)
    with fastnets.backend("cpu"):
        y = functional.conv2d(x, weight, bias, **options)
    assert y.nbytes > 4 << 20
    assert x.nbytes + y.nbytes > 16 << 20
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, bias, **options), rtol=1e-4, atol=1e-4)


PARTLY_REACHED = {  # tensors that a kernel's plane reaches a part of: x, weight, options
    "conv3d": (
        (2, 15, 3, 7, 9),
        (24, 5, 2, 2, 4),
        {"stride": (3, 3, 2), "padding": (0, 1, 2), "dilation": (1, 1, 3), "groups": 3},
    ),
    "conv_transpose3d": (
        (3, 5, 1, 9, 4),
        (5, 11, 1, 3, 4),
        {"stride": (2, 2, 3), "padding": (0, 2, 2), "dilation": (1, 2, 1), "output_padding": (1, 0, 1)},
    ),
}


@pytest.mark.parametrize("name", PARTLY_REACHED)
def test_planes_that_few_taps_reach(name):
    """Images lie in a row where each is one plane of results, and here it is one of several."""
    sizes, weight_sizes, options = PARTLY_REACHED[name]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(sizes, generator=generator, requires_grad=True)
    weight = torch.randn(weight_sizes, generator=generator, requires_grad=True)
    with fastnets.backend("cpu"):
        ours = getattr(functional, name)(x, weight, **options)
        stock = getattr(torch.nn.functional, name)(x, weight, **options)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        for found, expected in zip(gradients(ours, [x, weight]), gradients(stock, [x, weight]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

"""Every layer of fastnets.nn against torch.nn's, by torch's conformance samples and in every way a layer is used."""

import concurrent.futures
import copy
import itertools
import multiprocessing
import pickle

import pytest
import torch
from modules import (
    NAMES,
    Sample,
    assert_within_rule,
    every_sample,
    flatten,
    info,
    ours,
    parameter,
    replace,
    results,
    theirs,
    to_double,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum
from torch.testing._internal.common_utils import noncontiguous_like

import fastnets
from fastnets import _library
from fastnets.convert import TABLE

TRAINING = [sample for name in NAMES for sample in every_sample(name)]
EVALUATION = [sample for name in NAMES if info(name).train_and_eval_differ for sample in every_sample(name, False)]
FIRST_SAMPLES = [pytest.param(Sample(name, True, 0), id=name) for name in NAMES]

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


@pytest.mark.parametrize("sample", [parameter(s) for s in TRAINING + EVALUATION])
def test_equals_torch(sample: Sample):
    """Outputs, gradients and their gradients; torch's own attention has the last only in its plainest form."""
    stock, layer, args, kwargs = sample.draw(torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        expected = results(stock, args, kwargs, orders=2)
    assert_close(results(layer, args, kwargs, orders=2), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_precision(name: str, autocast: bool):
    """By the tolerance rule, over all samples."""
    found = []
    for sample in every_sample(name):
        stock, layer, args, kwargs = sample.draw(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            both = [results(layer, args, kwargs), results(stock, args, kwargs)]
        if not (autocast and "LSTM" in name):  # of its states torch's own dtype varies with oneDNN
            assert [[t.dtype for t in mine] for mine in both[0]] == [[t.dtype for t in peer] for peer in both[1]]
        args, kwargs = replace((args, kwargs), (to_double(t) for t in flatten((args, kwargs))))
        found.append([*both, results(stock.double(), args, kwargs)])
    dtype = torch.bfloat16 if autocast else torch.float32
    for order in (0, 1):
        assert_within_rule(*([t for row in found for t in row[kind][order]] for kind in range(3)), dtype)


@pytest.mark.parametrize(
    "sample", [parameter(s) for name in NAMES for s in every_sample(name)[:: max(1, len(every_sample(name)) // 3)]]
)
def test_gradgradcheck(sample: Sample):
    _, layer, args, kwargs = sample.draw(torch.float64)
    inputs = flatten((args, kwargs))
    names = [name for name, _ in layer.named_parameters()]

    def call(*tensors):
        given = iter(tensors[len(names) :])
        rebuilt = replace((args, kwargs), (next(given) if t.requires_grad else t for t in inputs))
        parameters = dict(zip(names, tensors, strict=False))
        return tuple(flatten(torch.func.functional_call(layer, parameters, *rebuilt)))

    parameters = (p.detach().requires_grad_() for p in layer.parameters())
    tensors = (*parameters, *(t for t in inputs if t.requires_grad))
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("sample", [parameter(s) for s in TRAINING])
def test_non_contiguous(sample: Sample):
    _, layer, args, kwargs = sample.draw(torch.float64)
    scattered = (noncontiguous_like(t) if t.is_floating_point() else t for t in flatten((args, kwargs)))
    assert_close(results(layer, *replace((args, kwargs), scattered)), results(layer, args, kwargs))


@pytest.mark.parametrize("sample", [parameter(s) for s in TRAINING])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_duplicates(sample: Sample, duplicate):
    _, layer, args, kwargs = sample.draw(requires_grad=False)
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    with torch.no_grad():
        assert_close(flatten(twin(*args, **kwargs)), flatten(layer(*args, **kwargs)), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if info(name).module_error_inputs_func is not None])
def test_error_inputs(name: str):
    found = info(name)
    for sample in found.module_error_inputs_func(found, "cpu", torch.float32, False, True):
        wrong = sample.module_error_input
        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type):
                ours(name)(*wrong.constructor_input.args, **wrong.constructor_input.kwargs)
            continue
        layer = ours(name)(*wrong.constructor_input.args, **wrong.constructor_input.kwargs)
        with pytest.raises(sample.error_type):
            layer(*wrong.forward_input.args, **wrong.forward_input.kwargs)


@pytest.mark.parametrize("sample", [parameter(s) for s in TRAINING])
def test_same_seed_same_layer(sample: Sample):
    stock = sample.build(theirs(sample.name))
    drawn = torch.get_rng_state()
    layer = sample.build(ours(sample.name))
    assert torch.get_rng_state().equal(drawn)
    assert isinstance(layer, theirs(sample.name))
    assert repr(layer) == repr(stock)
    assert list(layer.state_dict()) == list(stock.state_dict())
    assert_close(layer.state_dict(), stock.state_dict(), rtol=0, atol=0)
    assert vars(layer).keys() == vars(stock).keys()


@pytest.mark.parametrize("sample", FIRST_SAMPLES)
def test_conversion(sample: Sample):
    stock, layer, args, kwargs = sample.draw(requires_grad=False)
    calls = []
    stock.register_forward_hook(lambda *_: calls.append("hook"))
    model = torch.nn.Sequential(torch.nn.Identity(), stock)
    before = dict(model.named_parameters())
    assert fastnets.convert(model) is model
    assert type(stock) is ours(sample.name)
    assert not any(type(module) in TABLE for module in model.modules())
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert_close(flatten(stock(*args, **kwargs)), flatten(layer(*args, **kwargs)), rtol=0, atol=0)
    assert calls == ["hook"]

    fastnets.revert(model)
    assert type(stock) is theirs(sample.name)
    stock.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(stock.state_dict(), strict=True)


@pytest.mark.parametrize("sample", FIRST_SAMPLES)
def test_compile(sample: Sample):
    _, layer, args, kwargs = sample.draw()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, args, kwargs), results(layer, args, kwargs))


@pytest.mark.parametrize("name", ["Conv1d", "GRU", "MultiheadAttention", "Softmax"])
def test_compiled_code_notices_another_backend(name: str):
    _, layer, args, kwargs = Sample(name, True, 0).draw(requires_grad=False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def work():
        compiled(*args, **kwargs)
        with fastnets.backend("cuda"):
            refused = pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported), match="backend 'cuda'")
            with refused:
                compiled(*args, **kwargs)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a thread that never asked for a backend before
        pool.submit(work).result()


def test_inductor():
    _, layer, args, kwargs = Sample("MultiheadAttention", True, 0).draw()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    assert_close(results(compiled, args, kwargs), results(layer, args, kwargs))


@pytest.mark.parametrize("sample", FIRST_SAMPLES)
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(sample: Sample, strict: bool):
    _, layer, args, kwargs = sample.draw(requires_grad=False)
    exported = torch.export.export(layer, args, kwargs, strict=strict)
    assert_close(flatten(exported.module()(*args, **kwargs)), flatten(layer(*args, **kwargs)))


@pytest.mark.parametrize("sample", FIRST_SAMPLES)
def test_functional_call(sample: Sample):
    stock, layer, args, kwargs = sample.draw()
    other = {name: torch.rand_like(p) for name, p in stock.named_parameters()}
    got = torch.func.functional_call(layer, other, args, kwargs)
    expected = flatten(torch.func.functional_call(stock, other, args, kwargs))
    assert_close(flatten(got), expected, rtol=1e-5, atol=1e-4)  # sums of many terms of one sign, in another order


@pytest.mark.parametrize("sample", FIRST_SAMPLES)
def test_threads_share_a_layer(sample: Sample):
    _, layer, args, kwargs = sample.draw()
    expected = results(layer, args, kwargs)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: results(layer, args, kwargs), range(32)):
            assert_close(got, expected)


def _in_child(queue, layer, args, kwargs) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, torch's own operators need this too
    queue.put([t.detach().numpy() for t in flatten(layer(*args, **kwargs))])


@pytest.mark.parametrize("sample", FIRST_SAMPLES)
def test_fork_after_use(sample: Sample):
    _, layer, args, kwargs = sample.draw(requires_grad=False)
    expected = flatten(layer(*args, **kwargs))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, layer, args, kwargs))
    child.start()
    child.join(60)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert child.exitcode == 0
    assert_close([torch.from_numpy(array) for array in queue.get()], expected)


@pytest.mark.parametrize("sample", FIRST_SAMPLES)
def test_hooks(sample: Sample):
    _, layer, args, kwargs = sample.draw()
    seen = []
    layer.register_forward_pre_hook(lambda *_: seen.append("pre"))
    layer.register_forward_hook(lambda *_: seen.append("post"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    sum(t.sum() for t in flatten(layer(*args, **kwargs))).backward()
    assert seen == ["pre", "post", "backward"]


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(Sample(name, True, 0).draw()[1], "dropout")])
def test_dropout_only_in_training(name: str):
    _, layer, args, kwargs = Sample(name, True, 0).draw(requires_grad=False)
    for module in layer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        elif hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5

    def runs():
        return [torch.cat([t.flatten() for t in flatten(layer(*args, **kwargs))]) for _ in range(8)]

    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(runs()))
    layer.eval()
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(runs()))


@pytest.mark.skipif(_library.missing is not None, reason=str(_library.missing))
def test_every_operator_has_a_fake_kernel():
    operators = [op for op in torch._C._dispatch_get_all_op_names() if op.startswith("fastnets::")]
    assert operators
    registry = torch._library.simple_registry.singleton
    assert [op for op in operators if registry.find(op.partition(".")[0]).fake_impl.kernel is None] == []

"""The choice of a backend: forced, by thread, from the environment, without the library; convert and explain."""

import concurrent.futures
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from rich.console import Console
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import fastnets
from fastnets import _library, dispatch
from fastnets.convert import TABLE

X = torch.randn(2, 3)


def _softmax_case(device="cpu", dtype=torch.float32) -> dispatch.Case:
    return dispatch.Case("softmax", device, dtype)


def _backends(call) -> list[str]:
    """The backends chosen while `call` runs."""
    chosen = []
    with dispatch.recording(lambda case, implementation, objections: chosen.append(implementation.backend)):
        call()
    return chosen


@pytest.fixture
def _cpu_objects(monkeypatch):
    implementation = dispatch.Implementation("cpu", lambda case: "it is resting")
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, ("softmax", "cpu"), implementation)


def test_forced_backend_runs_or_raises():
    with fastnets.backend("reference"):
        assert _backends(lambda: fastnets.functional.softmax(X, -1)) == ["reference"]
    for name in ("cuda", "triton", "simt"):
        if dispatch.IMPLEMENTATIONS["softmax", name].supports(_softmax_case()) is not None:
            with fastnets.backend(name), pytest.raises(NotImplementedError, match=rf"'{name}'.*softmax: \w+"):
                fastnets.functional.softmax(X, -1)
    with pytest.raises(ValueError, match=r"backend: expected one of reference, cpu.*'gpu'"), fastnets.backend("gpu"):
        pass


@pytest.mark.usefixtures("_cpu_objects")
def test_automatic_choice_asks_in_order_and_forced_does_not_fall_back():
    found = []
    with dispatch.recording(lambda *row: found.append(row)):
        assert dispatch.select(_softmax_case()).backend == "reference"
    case, implementation, objections = found[0]
    assert (case.family, implementation.backend, objections) == ("softmax", "reference", {"cpu": "it is resting"})
    with fastnets.backend("cpu"), pytest.raises(NotImplementedError, match="it is resting"):
        fastnets.functional.softmax(X, -1)


def test_cuda_says_what_it_lacks(monkeypatch):
    def objection(**case):
        return dispatch.IMPLEMENTATIONS["softmax", "cuda"].supports(_softmax_case(**case))

    monkeypatch.setattr(_library, "cuda_missing", "nobody built it")
    assert objection(device="cuda") == dispatch.why_missing("cuda") == "nobody built it"
    monkeypatch.setattr(_library, "cuda_missing", None)
    assert "not cpu ones" in objection()
    assert "not torch.float64" in objection(device="cuda", dtype=torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert objection(device="cuda") == dispatch.why_missing("cuda") == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - 2 * index, 5))
    assert "need compute capability 8.0, and a device here has 7.5" in objection(device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert objection(device="cuda") is None
    assert dispatch.why_missing("cuda") is None
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, 0))
    assert objection(device="cuda") is objection(device="cuda") is None
    assert asked == [0]  # once, not at every call


@pytest.mark.parametrize("family", dispatch.FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int8])
def test_every_case_runs_somewhere(family, device, dtype):
    assert dispatch.select(dispatch.Case(family, device, dtype)).backend in dispatch.BACKENDS


def test_contexts_nest():
    def chosen():
        return _backends(lambda: fastnets.functional.softmax(X, -1))

    default = chosen()
    with fastnets.backend("reference"):
        with fastnets.backend(None):
            assert chosen() == default
        with pytest.raises(KeyError), fastnets.backend("triton"):
            raise KeyError
        assert chosen() == ["reference"]
    assert chosen() == default


def test_threads_do_not_see_each_other():
    entered, finished = threading.Barrier(2), threading.Barrier(2)

    def force():
        with fastnets.backend("reference"):
            entered.wait(10)
            found = _backends(lambda: fastnets.functional.softmax(X, -1))
            finished.wait(10)
            return found

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        before = dispatch.select(_softmax_case()).backend
        seen = []
        with dispatch.recording(lambda *row: seen.append(row)):
            other = pool.submit(force)
            entered.wait(10)
            during = dispatch.select(_softmax_case()).backend
            finished.wait(10)
            assert other.result() == ["reference"]
    assert during == before
    assert len(seen) == 1


def test_recorders_nest():
    outer, inner = [], []
    with dispatch.recording(lambda *row: outer.append(row)):
        with dispatch.recording(lambda *row: inner.append(row)):
            dispatch.select(_softmax_case())
        dispatch.select(_softmax_case())
    dispatch.select(_softmax_case())
    assert (len(outer), len(inner)) == (2, 1)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_environment_variable():
    code = "import fastnets, torch; print(fastnets.explain(fastnets.functional.softmax, torch.ones(2, 3), -1))"
    assert "reference" in _python(code, FASTNETS_BACKEND="reference").stdout
    refused = _python(code, FASTNETS_BACKEND="cuda")
    assert refused.returncode == 1
    assert "backend 'cuda' does not run this softmax" in refused.stderr
    unknown = _python("import fastnets", FASTNETS_BACKEND="gpu")
    assert unknown.returncode == 1
    assert "FASTNETS_BACKEND: expected one of" in unknown.stderr


WITHOUT_LIBRARY = """
import importlib.machinery, warnings
import torch
importlib.machinery.EXTENSION_SUFFIXES = [".hidden"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastnets, fastnets.nn, fastnets.ops.conv, fastnets.ops.recurrent, fastnets.ops.attention
assert len(caught) == 1, [str(w.message) for w in caught]
assert "plain PyTorch reference" in str(caught[0].message)
x = torch.randn(2, 6, 8)
layers = [fastnets.nn.Conv1d(6, 4, 3), fastnets.nn.LSTM(8, 5), fastnets.nn.Softmax(-1),
          fastnets.nn.TransformerEncoderLayer(8, 2, 16)]
for layer in layers:
    found = fastnets.explain(layer, x)
    assert {(row.backend, *(name for name, _ in row.objections)) for row in found.operators} == {("reference", "cpu")}
    try:
        with fastnets.backend("cpu"):
            layer(x)
    except NotImplementedError as error:
        assert "operator library" in str(error), error
    else:
        raise AssertionError("the cpu backend ran without its library")
"""


def test_import_without_the_operator_library():
    done = _python(WITHOUT_LIBRARY)
    assert done.returncode == 0, done.stderr


def _model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv1d(6, 4, 3),
        parametrizations.weight_norm(torch.nn.Conv1d(4, 4, 3)),
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        torch.nn.Softmax(-1),
    )


def test_convert_takes_exact_types_only():
    class Own(torch.nn.Conv1d):
        pass

    patched = torch.nn.Softmax(-1)
    patched.forward = lambda x: x
    model = torch.nn.ModuleList([_model(), Own(6, 4, 3), patched])
    kept = [model[0][1], model[1], model[2]]
    types = [type(module) for module in kept]
    state = model.state_dict()
    assert fastnets.convert(model) is model
    assert [type(module) for module in kept] == types
    assert type(model[0][0]) is fastnets.nn.Conv1d
    assert type(model[0][2][1].self_attn) is fastnets.nn.MultiheadAttention
    assert state.keys() == model.state_dict().keys()
    assert fastnets.convert(fastnets.convert(model)) is model
    fastnets.revert(model)
    assert not any(type(module) in TABLE.values() for module in model.modules())
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got function"):
        fastnets.convert(lambda: None)


def test_table_has_every_layer():
    assert {cls.__name__ for cls in TABLE.values()} == set(fastnets.nn.__all__)
    assert all(issubclass(ours, theirs) for theirs, ours in TABLE.items())


def test_converted_models_pickle_and_agree():
    model = _model().eval()

    def run():
        x = model[1](model[0](torch.ones(2, 6, 12)))
        return model[3](model[2](x.mT))

    expected = run()
    fastnets.convert(model)
    assert_close(run(), expected)
    model = pickle.loads(pickle.dumps(torch.nn.ModuleList([model[0], model[2], model[3]])))
    assert type(model[0]) is fastnets.nn.Conv1d


def test_explain_a_call():
    model = fastnets.convert(_model())
    found = fastnets.explain(model[2], torch.ones(2, 5, 4))
    assert [(row.layer, row.family, row.calls) for row in found.operators] == [
        ("0", "linear", 1),
        ("1.self_attn", "linear", 2),
        ("1.self_attn", "attention", 1),
        ("1.dropout1", "dropout", 1),
        ("1.linear1", "linear", 1),
        ("1.dropout", "dropout", 1),
        ("1.linear2", "linear", 1),
        ("1.dropout2", "dropout", 1),
    ]
    assert {row.dtype for row in found.operators} == {torch.float32}
    assert (("1.norm1", "1.norm2"), "LayerNorm") in [(row.layers, row.kind) for row in found.others]

    shared = fastnets.nn.Softmax(-1)
    found = fastnets.explain(torch.nn.Sequential(shared, torch.nn.Identity(), shared), X)
    assert [(row.layer, row.calls) for row in found.operators] == [("0", 2)]

    found = fastnets.explain(lambda: fastnets.functional.softmax(shared(X), 0))
    assert [row.layer for row in found.operators] == ["Softmax", ""]
    found = fastnets.explain(model[2].forward, torch.ones(2, 5, 4))
    assert found.operators[0].layer == "0"


@pytest.mark.usefixtures("_cpu_objects")
def test_explain_says_why():
    layer = fastnets.nn.Softmax(-1)
    for found in (fastnets.explain(layer, X), fastnets.explain(layer)):
        (row,) = found.operators
        assert (row.backend, row.objections) == ("reference", (("cpu", "it is resting"),))
        assert "not cpu: it is resting" in str(found)
    with fastnets.backend("cpu"):
        (row,) = fastnets.explain(layer).operators
        assert row.backend is None
        assert "it is resting" in row.why
        with pytest.raises(NotImplementedError):
            fastnets.explain(layer, X)


def test_explain_reads_a_model():
    model = _model()
    reasons = {name: row.why for row in fastnets.explain(model).others for name in row.layers}
    assert reasons["0"] == reasons["2.1"] == reasons["2.1.self_attn"] == "fastnets.convert makes it ours"
    assert "code of its own" in reasons["1"]
    assert reasons["2.1.norm1"] == "fastnets has no such layer"
    found = fastnets.explain(fastnets.convert(model).double())
    assert [(row.layer, row.family) for row in found.operators] == [
        ("0", "conv"),
        ("2.0", "linear"),
        ("2.1.self_attn", "attention"),
        ("2.1.linear1", "linear"),
        ("2.1.dropout", "dropout"),
        ("2.1.linear2", "linear"),
        ("2.1.dropout1", "dropout"),
        ("2.1.dropout2", "dropout"),
        ("3", "softmax"),
    ]
    assert {row.dtype for row in found.operators} == {torch.float64}
    assert {row.calls for row in found.operators} == {0}


def test_explain_leaves_nothing_behind():
    def fail(x):
        raise KeyError("inside")

    layer = fastnets.nn.Softmax(-1)
    layer.register_forward_hook(lambda *_: fail(0))
    with pytest.raises(KeyError, match="inside"):
        fastnets.explain(layer, X)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert dispatch._thread.recorders == ()
    with pytest.raises(TypeError, match=r"^model_or_call:"):
        fastnets.explain(3)


def test_explanation_prints():
    found = fastnets.explain(fastnets.convert(_model()))
    text = str(found)
    assert repr(found) == text
    assert [line.split()[0] for line in text.splitlines()[:4]] == ["layer", "0", "2.0", "2.1.self_attn"]
    console = Console(width=200, file=io.StringIO())
    console.print(found)
    assert "2.1.self_attn" in console.file.getvalue()
    assert str(fastnets.explain(torch.nn.Sequential())) == "no layers"


LARGE = {"rows": 64, "products": 1 << 24}


@pytest.fixture
def _outruns(monkeypatch):
    monkeypatch.setattr(_library, "outruns_mkl", True)


@pytest.mark.usefixtures("_outruns")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float64}, None),
        ({"device": "cuda"}, ""),
        ({"dtype": torch.bfloat16}, "in this precision"),
        ({"options": frozenset({"bf16"})}, "in this precision"),
        ({"options": frozenset({"special"})}, "neither sparse tensors nor subclasses"),
        ({"sizes": {**LARGE, "rows": 3}}, "rows are bound by memory"),
        ({"sizes": {**LARGE, "products": 1000}}, "done before a call of ours"),
    ],
)
def test_linear_layers_run_where_they_are_faster(case, reason):
    if _library.missing is not None:
        pytest.skip(_library.missing)
    case = dispatch.Case(**{"family": "linear", "device": "cpu", "dtype": torch.float32, "sizes": LARGE, **case})
    chosen, objections = dispatch._first_willing(case)
    assert chosen.backend == ("cpu" if reason is None else "reference")
    if reason is not None:
        assert any(reason in objection for objection in objections.values()), objections


def test_linear_layers_leave_processors_that_mkl_knows_to_it(monkeypatch):
    monkeypatch.setattr(_library, "outruns_mkl", False)
    case = dispatch.Case("linear", "cpu", torch.float32, sizes=LARGE)
    assert dispatch._first_willing(case)[0].backend == "reference"

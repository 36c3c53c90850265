"""fastnets.functional.linear beyond the operator table: errors, the choice of a backend, views as operands."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import fastnets
from fastnets import _library, dispatch
from fastnets.functional import linear

pytestmark = pytest.mark.skipif(_library.missing is not None, reason=str(_library.missing))


@pytest.fixture(params=["small", "forced"])
def _path(request):
    """Both ways into the operator: few products leave at once, a forced backend goes all the way."""
    with fastnets.backend(None if request.param == "small" else "cpu"):
        yield


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(2, 1)), TypeError, "^input: expected a Tensor, got list"),
        ((torch.ones(3, 4), None), TypeError, "^weight: expected a Tensor"),
        ((torch.ones(3, 4), torch.ones(2, 5)), ValueError, r"^input: expected 5 features.*got shape \(3, 4\)"),
        ((torch.tensor(1.0), torch.ones(2, 5)), RuntimeError, "^input: expected 5 features"),
        ((torch.ones(3, 4), torch.ones(2, 2, 4)), ValueError, "^weight: expected 2 dimensions, got 3"),
        ((torch.ones(3, 4), torch.ones(2, 4), torch.ones(3)), ValueError, r"^bias: expected shape \(2,\)"),
        ((torch.ones(3, 4), torch.ones(2, 4), 1.0), TypeError, "^bias: expected a Tensor"),
        ((torch.ones(3, 4), torch.ones(2, 4).double()), TypeError, "^weight: expected torch.float32 like input"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        linear(*arguments)


def test_bad_epilogues_and_devices():
    x, weight = torch.ones(3, 4), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"^weight: expected device cpu like input"), fastnets.backend("cpu"):
        linear(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"^activation: expected one of"):
        linear(x, weight, activation="softplus")
    with pytest.raises(ValueError, match=r"^residual: expected the result's shape \(3, 2\)"):
        linear(x, weight, residual=torch.ones(2))


def _chosen(*arguments, **options) -> list[str]:
    seen = []
    with dispatch.recording(lambda case, chosen, _: seen.append(chosen.backend)):
        linear(*arguments, **options)
    return seen


def test_tensors_of_other_kinds_stay_with_torch(monkeypatch):
    monkeypatch.setattr(_library, "outruns_mkl", True)

    class Own(torch.Tensor):
        pass

    x, weight = torch.randn(300, 128), torch.randn(256, 128)
    assert _chosen(x, weight) == ["cpu"]
    assert _chosen(x, torch.nn.Parameter(weight)) == ["cpu"]
    assert _chosen(x.as_subclass(Own), weight) == ["reference"]
    assert _chosen(x, weight.as_subclass(Own)) == ["reference"]
    wide = torch.randn(1 << 14, 128)
    assert _chosen(x[:8], wide) == _chosen(x[:3], torch.nn.Parameter(wide)) == ["reference"]
    assert _chosen(x[:8], torch.nn.Parameter(wide)) == ["cpu"]
    torch.set_float32_matmul_precision("medium")
    try:
        assert _chosen(x, weight) == ["reference"]
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", torch.bfloat16):
        assert _chosen(x, weight) == ["reference"]
        assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("turned", [False, True])
def test_operands_may_be_views(turned):
    """As found in models: slices of a sequence, the thirds of a joined weight, a transposed one."""
    x = torch.randn(6, 70, 40, dtype=torch.float64).transpose(0, 1)[1:, ::2].requires_grad_()
    whole = torch.randn(40, 96, dtype=torch.float64).t() if turned else torch.randn(96, 40, dtype=torch.float64)
    weight = whole.chunk(3)[1].detach().requires_grad_()
    bias = torch.randn(96, dtype=torch.float64).chunk(3)[1].detach().requires_grad_()
    leaves = x, weight, bias
    with fastnets.backend("cpu"):
        y = linear(*leaves)
        found = torch.autograd.grad(y.sin().sum(), leaves)
    expected = F.linear(*leaves)
    assert_close(y, expected)
    assert_close(found, torch.autograd.grad(expected.sin().sum(), leaves))


def test_a_vector_of_weights():
    x, weight = torch.randn(3, 4), torch.randn(4)
    with fastnets.backend("cpu"):
        assert_close(linear(x, weight), F.linear(x, weight))


@pytest.mark.usefixtures("_path")
def test_a_scalar_is_no_weight():
    with pytest.raises(ValueError, match=r"^weight: expected 2 dimensions, got 0"):
        linear(torch.ones(3, 4), torch.tensor(1.0))


def test_graphs_for_any_number_of_rows(monkeypatch):
    """The choice by sizes must not settle the number of rows."""
    monkeypatch.setattr(_library, "outruns_mkl", True)
    layer = fastnets.nn.Linear(256, 256)
    few, many = torch.randn(3, 256), torch.randn(80, 256)
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(layer, (many,), dynamic_shapes={"input": {0: rows}}).module()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="eager")
    for x in (many, few):
        assert_close(exported(x), layer(x))
        assert_close(compiled(x), layer(x))
    fixed = torch.export.export(layer, (many,))
    assert any(node.target == torch.ops.fastnets.conv_forward.default for node in fixed.graph.nodes)
    assert_close(fixed.module()(many), layer(many))


def test_no_case_is_made_where_torch_multiplies(monkeypatch):
    x, weight = torch.randn(300, 128), torch.randn(256, 128)
    monkeypatch.setattr(dispatch, "select", None)
    monkeypatch.setattr(_library, "outruns_mkl", False)
    assert_close(linear(x, weight), F.linear(x, weight))
    monkeypatch.setattr(_library, "outruns_mkl", True)
    assert_close(linear(x[:2], weight), F.linear(x[:2], weight))
    with pytest.raises(TypeError, match="not callable"):
        linear(x, weight)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.random_unstructured(layer, "bias", amount=3),
    ],
    ids=["parametrized", "pruned", "pruned bias"],
)
def test_weights_that_are_no_parameters(change):
    layer, x = fastnets.nn.Linear(5, 7), torch.randn(3, 5)
    change(layer)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_layer_called_with_other_parameters():
    layer, x = fastnets.nn.Linear(5, 7), torch.randn(3, 5)
    others = {"weight": torch.randn(7, 5), "bias": torch.randn(7)}
    assert_close(torch.func.functional_call(layer, others, x), F.linear(x, **others))

"""The Triton kernels on the CPU, under an interpreter that names what a GPU would hide; when they are chosen."""

import re
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fastnets
from fastnets import dispatch, testing
from fastnets.cli import main
from fastnets.kernels import registry

interpreted = pytest.mark.skipif(registry.interpreter_missing is not None, reason=str(registry.interpreter_missing))


def check(case: testing.Case, dtype: torch.dtype) -> None:
    """Holds the case on the Triton backend against the tolerance rule."""
    outcome = testing.check(case, dtype, "triton")
    assert outcome.passed, f"{outcome.where}: error {outcome.error:.3g}, tolerance {outcome.tolerance:.3g}"


SOFTMAX = [case for case in testing.operator_table("softmax") if case.quick and case.verify]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SOFTMAX, ids=lambda case: case.name)
@pytest.mark.parametrize("online", [False, True], ids=["whole", "online"])
def test_softmax(case, dtype, online, monkeypatch):
    if online:
        from fastnets.kernels import softmax

        monkeypatch.setattr(softmax, "_WIDEST", 8)
        monkeypatch.setattr(softmax, "_TILE", 32)
    check(case, dtype)


@interpreted
def test_softmax_of_a_mask_with_many_strides():
    x = torch.randn(2, 3, 2, 3, 2, 5)
    mask = torch.randn(2, 1, 2, 1, 2, 5).expand_as(x)
    with fastnets.backend("triton"):
        ours = fastnets.functional.softmax(x, -1, mask=mask)
    torch.testing.assert_close(ours, torch.softmax(x + mask, -1))


@interpreted
def test_the_interpreter_names_what_is_wrong():
    from fastnets.kernels._interpreter import KernelFault
    from fastnets.kernels._launch import launch
    from fastnets.kernels.softmax import softmax_backward_kernel

    y, short = torch.rand(4, 8), torch.rand(4, 7)
    tile = {"ROWS": 2, "COLUMNS": 8, "WHOLE": True}
    with pytest.raises(KernelFault, match=r"softmax\.py:\d+: tl\.store.* 4 element\(s\) past the end.*grad_x_ptr"):
        launch(softmax_backward_kernel, (2,), y, y, y, short, 4, 8, 1, 1.0, **tile)
    flat = torch.rand(33)  # the first program writes what the second one reads
    with pytest.raises(KernelFault, match=r"both touch element 16"):
        launch(softmax_backward_kernel, (2,), y, y, flat[:32], flat[1:], 4, 8, 1, 1.0, **tile)


@interpreted
def test_verify_says_what_was_interpreted(capsys, monkeypatch):
    from fastnets.kernels import softmax

    command = ["verify", "--backend", "triton", "--op", "softmax", "--match", "5x37", "--dtype", "float32"]
    assert main(command) == 0
    assert re.search(r"^ softmax_backward +\d+ +- *$", capsys.readouterr().out, re.MULTILINE)
    layout = softmax._layout
    monkeypatch.setattr(softmax, "_layout", lambda x, dim: (layout(x, dim)[0] + 1, *layout(x, dim)[1:]))
    assert main(command) == 1
    assert re.search(r"FAILED softmax 5x37.*KernelFault.*past the end", capsys.readouterr().out, re.DOTALL)


class _Attention(torch.nn.Module):
    def forward(self, q):
        return fastnets.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


@interpreted
@pytest.mark.parametrize(
    ("operator", "module", "sizes"),
    [
        ("softmax_forward", fastnets.nn.Softmax(-1), (3, 5)),
        ("attention_forward", _Attention(), (1, 2, 5, 8)),
        ("conv_forward", fastnets.nn.Conv2d(3, 8, 3), (1, 3, 6, 6)),
        ("recurrent_forward", fastnets.nn.LSTM(4, 6, layer_norm=True, zoneout_c=0.1).eval(), (3, 2, 4)),
    ],
)
def test_every_family_in_a_graph(operator, module, sizes):
    """Exported and compiled, without a break and with gradients, as operators of their own."""
    x = torch.randn(sizes, requires_grad=True)
    torch._dynamo.reset()
    targets = []

    def backend(graph, inputs):
        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    def keep(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def first(outputs):
        return outputs if isinstance(outputs, torch.Tensor) else outputs[0]

    with torch.backends.cudnn.flags(allow_tf32=False), fastnets.backend("triton"):
        exported = torch.export.export(module, (x,))
        of_export = first(exported.module()(x))
        ours = first(torch.compile(module, fullgraph=True, backend=backend)(x))
        grads = torch.autograd.grad(ours.square().sum(), (x, *module.parameters()))
    theirs = first(module(x))
    torch.testing.assert_close([ours, of_export], [theirs, theirs])
    torch.testing.assert_close(grads, torch.autograd.grad(theirs.square().sum(), (x, *module.parameters())))
    assert f"fastnets_triton.{operator}.default" in [str(node.target) for node in exported.graph.nodes]
    family = operator.split("_")[0]
    assert {name for name in targets if name.startswith(f"fastnets_triton.{family}")} >= {
        f"fastnets_triton.{operator}.default"
    }
    assert any("backward" in name or "grad" in name for name in targets if name.startswith("fastnets_triton"))


@interpreted
def test_opcheck():
    x = torch.randn(3, 5)
    torch.library.opcheck(torch.ops.fastnets_triton.softmax_forward, (x, torch.rand(3, 5) < 0.5, 1, 0.5))
    torch.library.opcheck(torch.ops.fastnets_triton.softmax_backward, (x, x.softmax(1), 1, 0.5))


WITHOUT_TRITON = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import fastnets, torch
from fastnets import dispatch
assert dispatch.why_missing("triton") == "Triton is not installed: pip install triton", dispatch.why_missing("triton")
fastnets.nn.Softmax(-1)(torch.ones(2, 3))
try:
    with fastnets.backend("triton"):
        fastnets.nn.Softmax(-1)(torch.ones(2, 3))
except NotImplementedError as error:
    assert "Triton is not installed" in str(error), error
else:
    raise AssertionError("it ran without Triton")
assert [name for name in sys.modules if name.startswith("fastnets.kernels.")] == ["fastnets.kernels.registry"]
"""


def test_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(registry.missing is not None, reason=str(registry.missing))
def test_triton_says_what_it_lacks(monkeypatch):
    def objection(**case):
        return dispatch.IMPLEMENTATIONS["softmax", "triton"].supports(dispatch.Case("softmax", **case))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        objection(device="cuda", dtype=torch.float32) == dispatch.why_missing("triton") == "torch sees no CUDA device"
    )
    assert "not meta ones" in objection(device="meta", dtype=torch.float32)
    monkeypatch.setattr(registry, "interpreter_missing", None)
    assert objection(device="cpu", dtype=torch.float32) is None
    assert "not torch.float64" in objection(device="cpu", dtype=torch.float64)
    monkeypatch.setattr(registry, "interpreter_missing", "it is out")
    assert objection(device="cpu", dtype=torch.float32) == "it is out"


@pytest.mark.parametrize(("major", "first"), [(8, "cuda"), (9, "triton"), (10, "triton"), (12, "cuda")])
def test_triton_comes_first_where_its_compiler_has_more(major, first, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    for family in dispatch.FAMILIES:
        names = dispatch._order(dispatch.Case(family, "cuda", torch.bfloat16))
        assert names[0] == (first if family in ("attention", "conv") else "cuda")
        assert sorted(names) == sorted(dispatch.ORDER["cuda"])
    assert dispatch._order(dispatch.Case("conv", "cpu", torch.bfloat16)) == dispatch.ORDER["cpu"]

"""What Triton makes of its kernels for GPUs that are not here."""

import dataclasses
import functools
import re
import subprocess
from pathlib import Path

import pytest

from fastnets.cli import _machine_code as code
from fastnets.cli import _triton, inspect
from fastnets.kernels import registry

if registry.missing is None:
    from fastnets.kernels import attention, attention_backward, conv, recurrent, recurrent_backward, softmax

pytestmark = pytest.mark.skipif(registry.missing is not None, reason=str(registry.missing))


def _launches(arch: str, name: str) -> list[_triton.Launch]:
    return _triton.launches([one for one in _triton.workloads() if f"{one.op} {one.name}" == name], arch)


@pytest.mark.parametrize(("arch", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_products_run_on_tensor_cores(arch, instruction, tmp_path, monkeypatch):
    monkeypatch.setattr(code, "CACHE", tmp_path)
    launch = _launches(arch, "conv bfloat16 256x56x56")[0]
    compiled = _triton.compiled(launch)
    assert launch.name.startswith("conv_gather ")
    assert _triton.complaint(compiled) is None
    assert compiled.multiplies == {"HMMA": "mma", "HGMMA": "wgmma"}[instruction]
    assert compiled.kernel.async_copies > 0
    (binary,) = tmp_path.glob("*.cubin")
    listed = subprocess.run([code.tool("cuobjdump"), "-sass", binary], capture_output=True, text=True, check=True)
    assert re.search(rf"\b{instruction}\b", listed.stdout)

    bad = dataclasses.replace(compiled.kernel, spill_loads=2)
    assert _triton.complaint(compiled._replace(kernel=bad)) == "2 spills, 0 bytes of stack"
    bad = dataclasses.replace(compiled.kernel, tensor=0)
    assert _triton.complaint(compiled._replace(kernel=bad)) == "no tensor-core instructions"
    bad = dataclasses.replace(compiled.kernel, async_copies=0)
    assert _triton.complaint(compiled._replace(kernel=bad)) == "no asynchronous copies"
    assert "shared memory" in _triton.complaint(compiled._replace(shared=1 << 20))


@functools.cache
def _every() -> list[_triton.Launch]:
    return _triton.launches(_triton.workloads(), "sm_80")


def test_workloads_start_every_kernel():
    assert {launch.op for launch in _every()} == registry.FAMILIES
    there = set()
    for module in (attention, attention_backward, conv, recurrent, recurrent_backward, softmax):
        there |= {name for name in vars(module) if name.endswith("_kernel")}
    assert {launch.kernel.__name__ for launch in _every()} == there


def test_side_by_side():
    """Pairs name kernels that are there, and a row's figures are theirs."""
    folder = Path(__file__).parent / "inspect"
    of_cuda = {kernel["name"] for path in folder.glob("*.json") for kernel in inspect.read_snapshot(path)["kernels"]}
    for pair in _triton.PAIRS:
        assert any(launch.name.startswith(pair.triton) for launch in _every()), pair.triton
        assert pair.cuda in of_cuda
    figures = {"family": "triton", "arch": "sm_80", "registers": 9, "stack": 0, "static_shared": 0, "instructions": 99}
    figures |= {"spill_loads": 0, "spill_stores": 0, "async_copies": 1, "ldsm": 1, "special": 0}
    kernel = code.Kernel(**figures, signature=_triton.PAIRS[0].triton, tensor=128, loop_instructions=1024)
    operations = 2 * 128 * 64 * 128 / 4
    theirs = _triton.Compiled(kernel, 4096, 128, "mma", True, operations)
    ours = {"name": _triton.PAIRS[0].cuda, "arch": "sm_80", "registers": 8, "shared": None, "tensor": 1}
    (row,) = _triton.beside([{**ours, "loop_instructions": 4}], [theirs])
    what = (_triton.PAIRS[0].what, "sm_80")
    assert row == (*what, "8", "-", "0.250", "244", "9", "4096", "0.125", "244")

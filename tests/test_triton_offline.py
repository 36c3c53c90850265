"""What Triton makes of its kernels for GPUs that are not here."""

import dataclasses
import re
import subprocess

import pytest

from fastnets.cli import _machine_code as code
from fastnets.cli import _triton
from fastnets.kernels import registry

if registry.missing is None:
    from fastnets.kernels import attention, attention_backward, conv, recurrent, recurrent_backward, softmax

pytestmark = pytest.mark.skipif(registry.missing is not None, reason=str(registry.missing))


def _launches(arch: str, name: str) -> list[_triton.Launch]:
    (workload,) = (workload for workload in _triton.workloads() if f"{workload.op} {workload.name}" == name)
    return _triton.launches(workload, arch)


@pytest.mark.parametrize(("arch", "instruction"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_products_run_on_tensor_cores(arch, instruction, tmp_path, monkeypatch):
    monkeypatch.setattr(code, "CACHE", tmp_path)
    launch = _launches(arch, "conv bfloat16 256x56x56")[0]
    compiled = _triton.compiled(launch)
    assert launch.name.startswith("conv_gather ")
    assert _triton.complaint(compiled) is None
    assert compiled.products
    assert compiled.kernel.async_copies > 0
    (binary,) = tmp_path.glob("*.cubin")
    listed = subprocess.run([code.tool("cuobjdump"), "-sass", binary], capture_output=True, text=True, check=True)
    assert re.search(rf"\b{instruction}\b", listed.stdout)

    bad = dataclasses.replace(compiled.kernel, spill_loads=2)
    assert _triton.complaint(compiled._replace(kernel=bad)) == "2 spills, 0 bytes of stack"
    bad = dataclasses.replace(compiled.kernel, tensor=0)
    assert _triton.complaint(compiled._replace(kernel=bad)) == "no tensor-core instructions"
    assert "shared memory" in _triton.complaint(compiled._replace(shared=1 << 20))


def test_workloads_start_every_kernel():
    started, there = set(), set()
    for workload in _triton.workloads():
        started |= {launch.kernel.__name__ for launch in _triton.launches(workload, "sm_80")}
        assert workload.op in registry.FAMILIES
    for module in (attention, attention_backward, conv, recurrent, recurrent_backward, softmax):
        there |= {name for name in vars(module) if name.endswith("_kernel")}
    assert started == there

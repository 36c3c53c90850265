"""`fastnets inspect`: what is read from machine code, what is counted, what follows; and the committed snapshot."""

import json
import re
import subprocess
from pathlib import Path

import host_compiler
import pytest
import torch

from fastnets import dispatch
from fastnets.cli import _gpu, _workloads, inspect, main
from fastnets.cli import _machine_code as code

SNAPSHOT = Path(__file__).parent / "inspect"
CHECKED_HERE = "sm_80"
"""What these tests compile for; the snapshot has every architecture."""

IN_SNAPSHOT = sorted(path.stem for path in SNAPSHOT.glob("*.json"))
FAMILIES = sorted(_workloads.FAMILIES)

needs_simt = pytest.mark.skipif(dispatch.why_missing("simt") is not None, reason=str(dispatch.why_missing("simt")))

OCCUPANCY = r"""
#include <cstdio>
#include <cstring>
struct cudaDeviceProp {};
struct cudaFuncAttributes {};
#include "cuda_occupancy.h"

int main() {
  int major, minor, threads_sm, shared_sm, threads, registers, shared;
  while (std::scanf("%d %d %d %d %d %d %d", &major, &minor, &threads_sm, &shared_sm, &threads, &registers, &shared) ==
         7) {
    cudaOccDeviceProp device;
    std::memset(&device, 0, sizeof device);
    device.computeMajor = major, device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = threads_sm;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = shared_sm, device.numSms = 1;
    device.sharedMemPerBlockOptin = shared_sm - 1024, device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    std::memset(&kernel, 0, sizeof kernel);
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers;
    kernel.maxDynamicSharedSizeBytes = shared_sm - 1024, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_NONE;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_that_of_nvidias_header(tmp_path):
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(OCCUPANCY)
    headers = host_compiler.nvcc().resolve().parents[1]
    include = next(path.parent for path in headers.rglob("cuda_occupancy.h"))
    host_compiler.run(host_compiler.compiler(), "-w", f"-I{include}", source, "-o", program)
    cases = [
        (arch, threads, registers, shared)
        for arch in _gpu.ARCHITECTURES
        for threads in (32, 96, 128, 256, 512, 1024)
        for registers in (16, 40, 41, 64, 96, 128, 168, 255)
        for shared in (0, 100, 1024, 16384, 49000, 80000, 101376, 166912)
        if shared <= _gpu.ARCHITECTURES[arch].shared - 1024
    ]
    lines = []
    for arch, threads, registers, shared in cases:
        limits = _gpu.ARCHITECTURES[arch]
        major, minor = divmod(int(arch.removeprefix("sm_")), 10)
        lines.append(f"{major} {minor} {limits.threads} {limits.shared} {threads} {registers} {shared}\n")
    said = subprocess.run([program], input="".join(lines), capture_output=True, text=True, check=True).stdout
    theirs = [int(line) for line in said.splitlines()]
    ours = [_gpu.blocks_per_multiprocessor(*case) for case in cases]
    assert len(theirs) == len(cases)
    assert ours == theirs


def test_a_block_that_does_not_fit():
    assert _gpu.blocks_per_multiprocessor("sm_120", 128, 32, 100 << 10) == 0
    assert _gpu.blocks_per_multiprocessor("sm_120", 128, 32, 99 << 10) == 1
    assert _gpu.occupancy("sm_80", 128, 128, 0) == 0.25


def test_roofline():
    a100 = _gpu.GPUS[0]
    second = _gpu.Work(a100.bandwidth * 1e9, 0, 0, 0, 0)
    assert _gpu.roofline(a100, second) == (pytest.approx(1.0), "memory")
    assert _gpu.roofline(a100, second._replace(half_flops=624e12)) == (pytest.approx(2.0), "tensor")
    assert _gpu.roofline(a100, second._replace(tf32_flops=468e12)) == (pytest.approx(3.0), "tensor")
    clocks = 108 * 1.41e9
    assert _gpu.roofline(a100, second._replace(wavefronts=4 * clocks)) == (pytest.approx(4.0), "shared")
    assert _gpu.roofline(a100, second._replace(exponentials=5 * 16 * clocks)) == (pytest.approx(5.0), "exp")


def test_main_loop():
    """Loops at 16-48, around it 0-64, and 80-96; addresses of instructions and where they branch to."""
    program = [
        (0, "MOV", None),
        (16, "HMMA", None),
        (32, "LDSM", None),
        (48, "BRA", 16),
        (64, "BRA", 0),
        (80, "LDG", None),
        (96, "BRA", 80),
        (112, "EXIT", None),
        (128, "BRA", 128),
    ]
    assert [address for address, _, _ in code.main_loop(program)] == [16, 32, 48]
    without = [(address, "MOV" if opcode == "HMMA" else opcode, target) for address, opcode, target in program]
    without[5] = (80, "IADD3", None)
    assert [address for address, _, _ in code.main_loop(without)] == [16, 32, 48]
    before = [(-16, "UTCHMMA", None), *without]  # its loops are waits
    assert code.main_loop(before) == before
    straight = program[5:6] + program[7:]
    assert code.main_loop(straight) == straight


def test_signatures_of_both_compilers_are_alike():
    host = "_ZN8fastnets4cuda12_GLOBAL__N_112forward_heldIDF16_Li8ELi256EEEvNS_14SoftmaxForwardE"
    device = (
        "_ZN8fastnets4cuda43_GLOBAL__N__1c66f47e_10_softmax_cu_7d06044212forward_heldI6__halfLi8ELi256EEEv"
        "NS_14SoftmaxForwardE"
    )
    assert code.signature(host) == code.signature(device) == "forward_held<Float16, 8, 256>(SoftmaxForward)"
    assert code.demangled("no symbol") == "no symbol"


@pytest.fixture(scope="module")
def compiler():
    return code.nvcc()


@pytest.fixture(scope="module")
def read(compiler):
    """A source's kernels for an architecture."""
    return lambda source, arch: code.read(code.compiled(source, arch, compiler), arch)


def test_resources_are_those_that_ptxas_reports(read, compiler, tmp_path):
    (source,), arch = code.sources(["softmax"]), "sm_120"
    option = f"-gencode=arch=compute_{arch[3:]},code={arch}"
    command = [compiler, "-std=c++20", "-O3", option, "-Xptxas=-v", "-cubin", "-o", tmp_path / "out", source]
    said = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stderr
    entry = r"entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers(?:[^\n]* (\d+) bytes smem)?"
    reported = {
        code.signature(symbol): (int(registers), int(stack), int(shared or 0))
        for symbol, stack, registers, shared in re.findall(entry, said, re.DOTALL)
    }
    found = {k.signature: (k.registers, k.stack, k.static_shared) for k in read(source, arch)}
    assert len(found) == 42
    assert found == reported


@needs_simt
@pytest.mark.parametrize("source", code.sources(FAMILIES), ids=lambda path: path.name)
def test_kernels_are_launched_fit_and_spill_nothing(read, launches, source):
    kernels = [inspect.entry(kernel, launches.get(kernel.signature)) for kernel in read(source, CHECKED_HERE)]
    assert kernels
    assert not [k["name"] for k in kernels if k["spills"] or k["stack"]]
    assert not [k["name"] for k in kernels if k["threads"] is None], "no probe of _workloads launches these"
    assert not [k["name"] for k in kernels if k["occupancy"] == 0]


@needs_simt
@pytest.mark.parametrize("source", code.sources(IN_SNAPSHOT), ids=lambda path: path.name)
def test_kernels_are_those_of_the_snapshot(read, compiler, launches, source):
    kernels = [inspect.entry(kernel, launches.get(kernel.signature)) for kernel in read(source, CHECKED_HERE)]
    (family,) = {inspect.family_of(k) for k in kernels}
    snapshot = inspect.read_snapshot(SNAPSHOT / f"{family}.json")
    if snapshot["nvcc"] != code.version(compiler):
        pytest.skip(f"the snapshot is of nvcc {snapshot['nvcc']}, this one is {code.version(compiler)}")
    names = {k["name"] for k in kernels}
    former = [k for k in snapshot["kernels"] if k["arch"] == CHECKED_HERE and k["name"] in names]
    renew = f"python -m fastnets inspect --build --op {family} --snapshot tests/inspect --renew"
    assert inspect.differences(former, kernels) == [], f"if that is meant: {renew}"


@pytest.mark.parametrize("family", IN_SNAPSHOT)
def test_snapshot_has_every_architecture_and_no_spills(family):
    kernels = inspect.read_snapshot(SNAPSHOT / f"{family}.json")["kernels"]
    assert {k["arch"] for k in kernels} == set(_gpu.ARCHITECTURES)
    assert not [k["name"] for k in kernels if k["spills"] or k["stack"] or k["occupancy"] == 0]
    by_arch = {arch: {k["name"] for k in kernels if k["arch"] == arch} for arch in _gpu.ARCHITECTURES}
    assert len(set(map(frozenset, by_arch.values()))) == 1


@pytest.fixture(scope="module")
def launches():
    """How every kernel is launched by the stated shapes."""
    found = {}
    for workload in _workloads.probes():
        found |= _workloads.measured(workload)[1]
    return found


@needs_simt
def test_counts_of_a_shape():
    workload = next(w for w in _workloads.workloads() if w.name == "65536x1024" and w.dtype == torch.bfloat16)
    (forward, backward), launches = _workloads.measured(workload)
    size = 65536 * 1024 * 2
    assert (forward.bytes, forward.fewest_bytes) == (2 * size, 2 * size)
    assert (backward.bytes, backward.fewest_bytes) == (3 * size, 3 * size)
    assert forward.sectors_per_request == forward.asked_sectors_per_request == 16  # 32 lanes of 16 bytes
    assert forward.work.exponentials == 65536 * 1024
    assert launches["forward_held<BFloat16, 8, 256>(SoftmaxForward)"] == _workloads.Launch(256, 0)


ONE = ["inspect", "--build", "--op", "softmax", "--arch", "sm_80", "--kernel", "backward_columns<float>"]


@needs_simt
def test_command(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert main([*ONE, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "softmax::backward_columns<float>" in out
    assert "ESTIMATED" in out
    found = json.loads(path.read_text())
    (kernel,) = found["kernels"]
    assert (kernel["arch"], kernel["threads"], kernel["shared"], kernel["spills"]) == ("sm_80", 256, 1024, 0)
    assert {"name", "registers", "stack", "occupancy", "tensor", "async"} <= kernel.keys()
    assert {w["pass"] for w in found["workloads"]} == {"forward", "backward"}
    assert set(found["workloads"][0]["estimated_seconds"]) == {"A100", "H100", "B200", "RTX 5090"}


@needs_simt
def test_command_compares_with_a_snapshot(tmp_path, capsys):
    snapshot = inspect.read_snapshot(SNAPSHOT / "softmax.json")
    path = tmp_path / "softmax.json"
    path.write_text(json.dumps(snapshot))
    assert main([*ONE, "--snapshot", str(tmp_path)]) == 0
    entry = next(
        k for k in snapshot["kernels"] if k["arch"] == "sm_80" and k["name"].endswith("backward_columns<float>")
    )
    entry["registers"] += 3
    path.write_text(json.dumps(snapshot))
    assert main([*ONE, "--snapshot", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert re.search(
        rf"backward_columns<float>\s+sm_80\s+registers\s+{entry['registers']}\s+{entry['registers'] - 3}", out
    )
    assert "--renew" in out


def test_differences_name_kernels_that_came_and_went():
    figures = dict.fromkeys(inspect.COMPARED, 0)
    old, new = {"name": "a", "arch": "sm_80", **figures}, {"name": "b", "arch": "sm_80", **figures}
    assert inspect.differences([old], [new]) == [
        ("a", "sm_80", "kernel", "there", "gone"),
        ("b", "sm_80", "kernel", "not there", "new"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--renew"], "--renew needs --snapshot"),
        (["--build", "--op", "softmax", "--arch", "sm_80", "--kernel", "no such"], "no kernel is left"),
        (["--build", "--op", "softmax", "--arch", "sm_80", "--snapshot", "no"], "cannot read no/softmax.json"),
        (["--build", "--op", "softmax", "--arch", "sm_80", "--snapshot", "no", "--renew"], "whole families"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err

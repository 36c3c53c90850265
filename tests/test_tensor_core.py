"""csrc/cuda/tensor_core.h: the PTX that nvcc makes of every wrapper, executed, against its body for the SIMT device.

tests/ptx.py executes it, written from NVIDIA's manual. Values are small integers, so that every sum is exact and one
element in a wrong place shows.
"""

import ctypes
import re

import host_compiler
import numpy as np
import ptx
import pytest

WORDS = np.uint32
KERNELS = host_compiler.CSRC / "cuda"


class Call(ctypes.Structure):
    _fields_ = (("probe", ctypes.CFUNCTYPE(None)), ("source", ctypes.c_void_p), ("target", ctypes.c_void_p))


@pytest.fixture(scope="module")
def device():
    return ctypes.CDLL(str(host_compiler.library("probes")))


@pytest.fixture(scope="module")
def programs():
    target = host_compiler.OUTPUT / "probes.ptx"
    if host_compiler.outdated(target):
        host_compiler.OUTPUT.mkdir(parents=True, exist_ok=True)
        source = host_compiler.HERE / "simt" / "probes.cu"
        host_compiler.run(host_compiler.nvcc(), "-std=c++20", "-arch=compute_80", "-ptx", source, "-o", target)
    return ptx.entries(target.read_text())


@pytest.fixture
def both(device, programs):
    """Runs a probe; returns the words that the SIMT device and the PTX gave."""

    def run(name, words, words_out):
        words = np.ascontiguousarray(words, WORDS)
        aligned = np.zeros(words.size + 4, WORDS)
        first = -aligned.ctypes.data // 4 % 4  # to 16 bytes
        aligned[first : first + words.size] = words
        ours = np.zeros(words_out, WORDS)
        device.run_probe(
            Call(ctypes.cast(device[name], ctypes.CFUNCTYPE(None)), aligned.ctypes.data + 4 * first, ours.ctypes.data)
        )
        return ours, ptx.Warp(programs[name], words, words_out).result

    return run


def floats(values):
    return np.asarray(values, np.float32).view(WORDS)


def bf16(values):
    return floats(values) >> 16


def fp16(values):
    return np.asarray(values, np.float16).view(np.uint16).astype(WORDS)


@pytest.mark.parametrize("convert", [bf16, fp16], ids=["bf16", "fp16"])
def test_mma_of_16_bit_floats(both, convert):
    generator = np.random.default_rng(0)
    operands = convert(generator.integers(-9, 10, (32, 6, 2)))
    words = np.concatenate([operands[..., 0] | operands[..., 1] << 16, floats(generator.integers(-9, 10, (32, 4)))], 1)
    ours, theirs = both(f"probe_mma_{convert.__name__}", words.ravel(), 128)
    assert np.array_equal(ours, theirs)
    assert len(np.unique(theirs)) > 64


def test_mma_of_tf32(both):
    words = floats(np.random.default_rng(0).integers(-9, 10, (32, 10)))
    ours, theirs = both("probe_mma_tf32", words.ravel(), 128)
    assert np.array_equal(ours, theirs)
    assert len(np.unique(theirs)) > 64


@pytest.mark.parametrize("transposed", ["", "_transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_load_matrix(both, count, transposed):
    elements = np.arange(512, dtype=WORDS)
    memory = elements[0::2] | elements[1::2] << 16
    rows = np.random.default_rng(0).integers(0, 64, 32)
    ours, theirs = both(f"probe_matrix_{count}{transposed}", np.concatenate([memory, rows]), 32 * count)
    assert np.array_equal(ours, theirs)
    assert len(np.unique(theirs)) > 16


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copy_async(both, size):
    rows = np.arange(1, 129)
    valid = np.arange(32) % (size + 1)
    ours, theirs = (w.reshape(32, 16) for w in both(f"probe_copy_{size}", np.concatenate([rows, valid]), 512))
    under_way = np.zeros((32, 16), bool)
    under_way[:, 4 : 4 + size // 4] = True  # the second copy, before its wait: nobody may read it
    assert np.array_equal(ours[~under_way], theirs[~under_way])
    assert (ours[under_way] == 0xFFFFFFFF).all()  # NaN on the SIMT device
    assert (theirs[:, 12 : 12 + size // 4] == rows.reshape(32, 4)[:, : size // 4]).all()


def test_copy_async_wait_all(both):
    rows = np.arange(1, 129)
    ours, theirs = both("probe_copy_wait_all", rows, 128)
    assert np.array_equal(ours, theirs)
    assert np.array_equal(theirs, rows)


@pytest.mark.parametrize("name", ["probe_named_barrier", "probe_flags"])
def test_order(both, name, programs):
    ours, theirs = both(name, np.arange(1, 33), 32)
    assert np.array_equal(ours, theirs)
    if name == "probe_flags":  # lockstep cannot show order: the instructions must ask for it
        opcodes = {line.split()[0] for line in programs[name]}
        assert {"ld.acquire.gpu.global.u32", "st.release.gpu.global.u32"} <= opcodes


TIES = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-12, -1 - 2.0**-11, 0.0, -3.0]


@pytest.mark.parametrize("name", ["probe_tf32", "probe_pack_bf16", "probe_pack_fp16"])
def test_rounding(both, name):
    values = np.concatenate([TIES, np.random.default_rng(0).normal(size=56)])
    ours, theirs = both(name, floats(values), 32)
    assert np.array_equal(ours, theirs)


def test_exp2(both):
    values = np.concatenate([[0, 1, -1, -127, -149, -200], np.random.default_rng(0).normal(size=26) * 20])
    ours, theirs = both("probe_exp2", floats(np.stack([values, values], 1)).ravel(), 32)
    assert np.allclose(ours.view(np.float32), theirs.view(np.float32), rtol=2.0**-22, atol=0)


def test_every_wrapper_has_a_probe(programs):
    header = (KERNELS / "tensor_core.h").read_text()
    wanted = set(re.findall(r'"((?:mma\.sync|ldmatrix|cp|bar|ld|st|cvt|ex2)\.[\w.:]+)', header))
    emitted = {line.split()[0] for lines in programs.values() for line in lines}
    assert wanted <= emitted

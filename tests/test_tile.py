"""csrc/cuda/tile.h: tiles copied at any width, products of them in every layout, without bank conflicts."""

import ctypes
import itertools

import host_compiler
import pytest
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
SIZE = 32


class Parameters(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "after", "d", "e", "kept")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "pitch")),
    )


@pytest.fixture(scope="module")
def device():
    library = ctypes.CDLL(str(host_compiler.library("tiles")))
    library.conflicts.restype = ctypes.c_uint64
    return library


def rows(values, pitch, shift):
    """`values` in memory with `pitch` elements from row to row, the first one `shift` elements past 16 bytes' bound."""
    lines, columns = values.shape
    memory = torch.full((lines * pitch + columns + 16,), float("nan"), dtype=values.dtype)
    laid = memory[shift:].as_strided((lines, columns), (pitch, 1))
    return laid.copy_(values)


def product(device, arithmetic, values, *, transposed=(False, False), paired=False, pitch=64, shift=0):
    """a b, a b after and a b rounded, as the kernel has them, of a [m, k], b [k, n] and after [n, n]."""
    dtype = DTYPES[arithmetic]
    a, b, after = (x.to(dtype) for x in values)
    (m, k), n = a.shape, b.shape[1]
    sources = [a.T if transposed[0] else a, b if transposed[1] else b.T, after]
    sources = [rows(x, pitch, shift) for x in sources]
    d, e = torch.empty(SIZE, SIZE), torch.empty(SIZE, SIZE)
    kept = torch.empty(SIZE, SIZE, dtype=dtype)
    pointers = [x.data_ptr() for x in (*sources, d, e, kept)]
    device.run_product(arithmetic.encode(), ctypes.byref(Parameters(*pointers, m, n, k, pitch)), *transposed, paired)
    return d, e, kept


def padded(x):
    return torch.nn.functional.pad(x, (0, SIZE - x.shape[1], 0, SIZE - x.shape[0]))


def integers(m=32, n=32, k=64):
    return torch.randint(-2, 3, (m, k)).float(), torch.randint(-2, 3, (k, n)).float(), torch.eye(n).roll(1, 0)


LAYOUTS = [(a, b, False) for a, b in itertools.product([False, True], repeat=2)] + [(True, True, True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arithmetic", DTYPES)
def test_every_layout(device, arithmetic, layout):
    a, b, after = integers()
    d, e, kept = product(device, arithmetic, (a, b, after), transposed=layout[:2], paired=layout[2])
    assert d.equal(a @ b)
    assert e.equal(a @ b @ after)
    assert kept.float().equal((a @ b).to(kept.dtype).float())
    assert device.conflicts() == 0


# Bytes from row to row and of the first row past a multiple of 16, in elements: copies of 16, 8, 4 bytes and elements.
@pytest.mark.parametrize("size", [(32, 32, 64), (17, 31, 63), (1, 1, 1), (9, 25, 33)])
@pytest.mark.parametrize(("pitch", "shift"), [(64, 0), (68, 4), (66, 2), (65, 1)])
@pytest.mark.parametrize("arithmetic", ["bf16", "fp32"])
@pytest.mark.parametrize("transposed", [False, True])
def test_borders(device, arithmetic, pitch, shift, size, transposed):
    a, b, after = integers(*size)
    d, e, _ = product(device, arithmetic, (a, b, after), transposed=(transposed,) * 2, pitch=pitch, shift=shift)
    assert d.equal(padded(a @ b))
    assert e.equal(padded(a @ b @ after))


def test_arithmetic(device):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(*shape, generator=generator) for shape in ((32, 64), (64, 32), (32, 32))]
    true = values[0].double() @ values[1].double()
    measure = ((values[0] @ values[1]).double() - true).square().mean().sqrt()
    errors = {
        name: (product(device, name, values)[0].double() - true).square().mean().sqrt() for name in ("fp32", "tf32")
    }
    assert errors["fp32"] < 2 * measure
    assert 100 * measure < errors["tf32"] < 1e-2

"""The SIMT device: right kernels give right values in every schedule, wrong ones are named, counters are exact."""

import ctypes
import re
import subprocess

import host_compiler
import pytest
import torch

import fastnets
from fastnets import dispatch

SEEDS = (0, 1, 2, 3)
NO_BUG, NO_WAIT, NO_LOAD_BARRIER, NO_LOOP_BARRIER, NO_GRID_BARRIER = range(5)


class Kernels:
    """tests/simt/kernels.cu, its functions called with tensors and integers."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.counter.restype = ctypes.c_uint64

    def run(self, name, *arguments):
        """Runs a kernel; returns what the device had against it, or None."""
        function = getattr(self._library, f"run_{name}")
        function.restype = ctypes.c_char_p
        message = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))
        return None if message is None else message.decode()

    def seed(self, seed):
        self._library.set_seed(ctypes.c_uint64(seed))

    def counting(self, on):
        self._library.set_counting(ctypes.c_bool(on))

    def counters(self, kernel, *names):
        return tuple(self._library.counter(kernel.encode(), name.encode()) for name in names)


@pytest.fixture(scope="module")
def built():
    return Kernels(host_compiler.library("kernels"))


@pytest.fixture
def kernels(built):
    yield built
    built.seed(0)
    built.counting(False)


def integers(*shape, dtype=torch.float32):
    return torch.randint(-7, 8, shape).to(dtype)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 31, 256, 1000])
def test_row_sums(kernels, n, seed):
    kernels.seed(seed)
    x, y = integers(3, n), torch.empty(3)
    assert kernels.run("row_sums", x, y, 3, n) is None
    assert y.equal(x.sum(1))


def product(kernels, m, n, k, bug=NO_BUG):
    a, b, c = integers(m, k, dtype=torch.bfloat16), integers(k, n, dtype=torch.bfloat16), torch.empty(m, n)
    assert kernels.run("product", a, b, c, m, n, k, bug) is None
    return c, a.float() @ b.float()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(64, 32, 32), (96, 64, 96), (17, 40, 56), (1, 8, 8)])
def test_pipelined_product(kernels, shape, seed):
    kernels.seed(seed)
    ours, true = product(kernels, *shape)
    assert ours.equal(true)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_wait_gives_nan(kernels, seed):
    kernels.seed(seed)
    ours, _ = product(kernels, 64, 32, 96, NO_WAIT)
    assert ours.isnan().any()


@pytest.mark.parametrize("bug", [NO_LOAD_BARRIER, NO_LOOP_BARRIER])
def test_a_missing_barrier_shows_in_some_schedule(kernels, bug):
    def right(seed):
        kernels.seed(seed)
        ours, true = product(kernels, 64, 32, 128, bug)
        return ours.equal(true)

    assert not all(right(seed) for seed in range(8))


def recurrence(kernels, bug):
    size, steps = 64, 6
    w, h = torch.randint(-1, 2, (size, size)).float(), torch.zeros(2, size)
    h[0] = torch.randint(-2, 3, (size,))
    true = h[0]
    for _ in range(steps):
        true = w @ true
    assert kernels.run("recurrence", w, h, size, steps, bug) is None
    return h[steps % 2].equal(true)


@pytest.mark.parametrize("seed", SEEDS)
def test_grid_synchronised_recurrence(kernels, seed):
    kernels.seed(seed)
    assert recurrence(kernels, NO_BUG)


def test_a_missing_grid_barrier_gives_wrong_values(kernels):
    assert not recurrence(kernels, NO_GRID_BARRIER)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_flag_hands_a_value_to_other_blocks(kernels, seed):
    kernels.seed(seed)
    value, flag, y = torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(5)
    assert kernels.run("hand_over", value, flag, y, 5) is None
    assert y.eq(42).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("deadlock", r"deadlock.*threads 32-63 wait at __syncthreads \(.*kernels.cu:\d+\)"),
        ("deadlock", r"threads 0-31 wait at named_barrier \(.*kernels.cu:\d+\)"),
        ("two_barriers", r"divergence.*__syncthreads \(.*kernels.cu:\d+\) \(.*kernels.cu:\d+\)"),
        ("two_masks", r"divergence.*__shfl_xor_sync, mask 0xffffffff"),
        ("foreign_lane", r"reads lane 20, which is not in its mask \(.*kernels.cu:\d+\)"),
        ("early_return", r"thread 5 returned while lanes of its warp wait.*__syncwarp.*kernels.cu:\d+"),
        ("poll", r"livelock.*threads 0-31 poll at .*kernels.cu:\d+"),
        ("misaligned", r"access of 16 bytes is not aligned \(.*kernels.cu:\d+\)"),
        ("leaves_early", r"returns before its copies to shared memory have come \(.*kernels.cu:\d+\)"),
        ("not_cooperative", r"needs a cooperative launch \(.*kernels.cu:\d+\)"),
        ("too_much_shared", r"asks for 102400 bytes of shared memory, more than the 101376"),
        ("too_many_threads", r"1 to 1024 threads, not 2048"),
    ],
)
def test_what_kernels_do_wrong_is_named(kernels, kernel, message, seed):
    kernels.seed(seed)
    found = kernels.run("named", kernel.encode(), torch.zeros(256))
    assert re.search(message, found, re.DOTALL), found
    assert kernels.run("row_sums", torch.ones(1, 9), y := torch.empty(1), 1, 9) is None  # the device goes on working
    assert y.item() == 9


def test_shared_memory_starts_full_of_nan(kernels):
    y = torch.zeros(32)
    assert kernels.run("named", b"reads_unset", y) is None
    assert y.isnan().all()


def test_seeds_change_the_order(kernels):
    def order(seed):
        kernels.seed(seed)
        counter, tickets = torch.zeros(1, dtype=torch.int32), torch.empty(96, dtype=torch.int32)
        assert kernels.run("tickets", counter, tickets, 96) is None
        assert counter.item() == 96
        return tuple(tickets.tolist())

    assert order(0) == tuple(range(96))
    assert order(5) == order(5)
    assert len({order(seed) for seed in range(8)}) == 8


GLOBAL = ("global_load_requests", "global_load_sectors", "global_load_bytes")
SHARED = ("shared_load_requests", "shared_load_wavefronts", "shared_load_conflicts")


@pytest.mark.parametrize(
    ("stride", "width", "first", "sectors"),
    [
        (1, 1, 0, 4),
        (1, 1, 1, 5),
        (2, 1, 0, 8),
        (8, 1, 0, 32),
        (100, 1, 0, 32),
        (0, 1, 0, 1),
        (2, 2, 0, 8),
        (4, 4, 0, 16),
    ],
)
def test_sectors_of_a_global_load(kernels, stride, width, first, sectors):
    kernels.counting(True)
    x, y = torch.zeros(4096), torch.empty(32)
    assert x.data_ptr() % 32 == y.data_ptr() % 32 == 0
    assert kernels.run("strided", x[first:], y, stride, width, 0) is None
    assert kernels.counters("strided", *GLOBAL) == (1, sectors, 32 * 4 * width)
    assert kernels.counters("strided", "global_store_requests", "global_store_sectors", "global_store_bytes") == (
        1,
        4,
        128,
    )


# Passes over 32 banks of 4 bytes; 8-byte accesses take at least two (half a warp each), 16-byte ones four.
@pytest.mark.parametrize(
    ("stride", "width", "wavefronts", "conflicts"),
    [
        (1, 1, 1, 0),
        (0, 1, 1, 0),
        (2, 1, 2, 1),
        (32, 1, 32, 31),
        (33, 1, 1, 0),
        (2, 2, 2, 0),
        (4, 4, 4, 0),
        (8, 4, 8, 4),
    ],
)
def test_bank_conflicts(kernels, stride, width, wavefronts, conflicts):
    kernels.counting(True)
    assert kernels.run("strided", torch.empty(1), torch.empty(32), stride, width, 1) is None
    assert kernels.counters("strided", *SHARED) == (1, wavefronts, conflicts)


@pytest.mark.parametrize(("pitch", "wavefronts"), [(1, 1), (5, 1), (8, 8), (2, 2), (4, 4)])
def test_bank_conflicts_of_ldmatrix(kernels, pitch, wavefronts):
    kernels.counting(True)
    assert kernels.run("matrix_rows", torch.empty(32), pitch) is None
    assert kernels.counters("matrix_rows", *SHARED) == (1, wavefronts, wavefronts - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_last_turn_of_few_lanes_is_a_request(kernels, seed):
    kernels.seed(seed)
    kernels.counting(True)
    assert kernels.run("ragged", torch.zeros(40), torch.empty(40), 40) is None
    assert kernels.counters("ragged", *GLOBAL) == (2, 5, 160)


@pytest.mark.parametrize("seed", SEEDS)
def test_counters_of_the_product(kernels, seed):
    kernels.seed(seed)
    kernels.counting(True)
    product(kernels, 96, 64, 96)
    blocks, steps, warps = 4, 3, 4
    assert kernels.counters("product", "launches", "barriers") == (1, blocks * steps * 2)
    assert kernels.counters("product", "mma") == (blocks * steps * warps * 2 * 4,)
    # Of a: 8 requests a block and step, half of them outside in the lower blocks; of b: 4.
    requests = steps * (2 * (8 + 4) + 2 * (4 + 4))
    loaded = 2 * (2 * 96 * 96 + 2 * 96 * 64)  # every tile of a and b twice, 2 bytes an element
    assert kernels.counters("product", *GLOBAL) == (requests, loaded // 32, loaded)
    assert kernels.counters("product", "global_store_bytes", "global_store_sectors") == (96 * 64 * 4, 96 * 64 * 4 // 32)
    # Rows 80 bytes apart: no two of eight share a bank. A matrix is a pass: four of a, two of b for each of 4 products.
    passes = blocks * steps * warps * 2 * (4 + 4 * 2)
    assert kernels.counters("product", "shared_load_wavefronts", "shared_load_conflicts") == (passes, 0)


def under(mode, name, *arguments):
    path = host_compiler.program("kernels", mode)
    done = subprocess.run([path, name, *arguments], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


RIGHT = ("row_sums", "product", "recurrence", "hand_over")


@pytest.mark.parametrize("sanitizers", ["address", "thread"])
@pytest.mark.parametrize("name", RIGHT)
def test_sanitizers_are_silent_on_right_kernels(name, sanitizers):
    for seed in ("0", "1"):
        assert under(sanitizers, name, seed) == (0, "done\n")


@pytest.mark.parametrize("sanitizers", ["address", "thread"])
@pytest.mark.parametrize("name", ["deadlock", "two_barriers", "early_return"])
def test_diagnoses_come_through_sanitizers(name, sanitizers):
    status, output = under(sanitizers, name)
    assert status == 3
    assert output.startswith(f"{name}: ")
    assert "Sanitizer" not in output


@pytest.mark.parametrize("name", ["global_overflow", "shared_overflow"])
def test_address_sanitizer_names_the_line_of_an_overflow(name):
    status, output = under("address", name)
    assert status != 0
    assert "heap-buffer-overflow" in output
    assert re.search(rf"{name}.*kernels.cu:\d+", output)


@pytest.mark.parametrize("name", ["product_no_load_barrier", "product_no_loop_barrier", "recurrence_no_grid_barrier"])
def test_thread_sanitizer_names_the_line_of_a_race(name):
    status, output = under("thread", name)
    assert status != 0
    assert "data race" in output
    assert re.search(r"(product|recurrence).*kernels.cu:\d+", output)


def test_thread_sanitizer_sees_blocks_race_behind_their_barriers():
    """Blocks 16 apart: as many as there are sets of fibers for them."""
    status, output = under("thread", "blocks_meet")
    assert status != 0
    assert re.search(r"blocks_meet.*kernels.cu:\d+", output)


needs_simt = pytest.mark.skipif(dispatch.why_missing("simt") is not None, reason=str(dispatch.why_missing("simt")))


@needs_simt
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_softmax_moves_no_byte_twice(device, dtype):
    x = torch.randn(6, 1024, dtype=dtype, requires_grad=True)
    size = x.numel() * x.element_size()
    with fastnets.backend("simt"):
        fastnets.functional.softmax(x, -1).sum().backward()
    forward, backward = device.counters()["softmax_forward"], device.counters()["softmax_backward"]
    assert forward["global_load_bytes"] == forward["global_load_sectors"] * 32 == size
    assert backward["global_load_bytes"] == backward["global_load_sectors"] * 32 == 2 * size
    for counters in (forward, backward):
        assert counters["global_store_bytes"] == counters["global_store_sectors"] * 32 == size
        assert counters["shared_load_conflicts"] == 0


@needs_simt
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 5000), 1), ((3, 5001), 1), ((70, 33, 3), 0), ((5, 40), 1), ((2, 9, 40), 1)]
)
def test_softmax_in_every_schedule(device, shape, dim, seed):
    device.set_seed(seed)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    with fastnets.backend("simt"):
        ours = fastnets.functional.softmax(x, dim)
        (mine,) = torch.autograd.grad(ours, x, grad)
    theirs = torch.softmax(x, dim)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, x, grad)[0])


@needs_simt
def test_a_forced_simt_says_what_it_does_not_take():
    with fastnets.backend("simt"), pytest.raises(dispatch.Unsupported, match=r"not torch\.float64"):
        fastnets.functional.softmax(torch.ones(3, dtype=torch.float64), 0)

"""The measuring core: rivals timed in turns within one process, and the memory that a call takes."""

import contextlib
import ctypes
import functools
import gc
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastnets import _library

__all__ = ["Limits", "Timing", "compare", "fastest", "freed_memory_kept", "peak_memory", "quantile"]

Call = Callable[[], object]

_BLOCK = 2e-3
"""Seconds that one sample lasts at least: a short call is repeated within a sample, against the clock's own cost."""
_COPIED = 256 << 20
"""Bytes of the copy that gives the bandwidth."""
_ROUNDS = 2_000_000
"""Of multiply-adds: some milliseconds."""
_LIMIT_SECONDS = 0.3
"""How long each limit of the machine is measured for."""
_FEWEST = 3
"""Samples of every rival, however long one takes."""
_ROOM = 256 << 20
"""Free bytes of the heap ahead of a row's samples: what four rivals with results of 32 MB made it grow by, at most."""


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one value a sample."""

    samples: list[float]

    @property
    def p20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def p50(self) -> float:
        return quantile(self.samples, 0.5)

    @property
    def p80(self) -> float:
        return quantile(self.samples, 0.8)


@dataclass(frozen=True)
class Limits:
    """What the machine does at most, on the threads that torch uses; None where it was not measured."""

    flops: float | None
    """A second, of float32 multiply-adds in registers."""
    bytes: float | None
    """A second, read and written by a copy much larger than the caches."""

    @classmethod
    def measured(cls) -> "Limits":
        source = torch.ones(_COPIED // 4)
        target = torch.empty_like(source)
        copied = 2 * _COPIED / fastest(lambda: target.copy_(source), _LIMIT_SECONDS)
        if _library.missing is not None:
            return cls(None, copied)
        multiply_adds = functools.partial(torch.ops.fastnets.cpu_multiply_adds, _ROUNDS)
        return cls(2 * multiply_adds() / fastest(multiply_adds, _LIMIT_SECONDS), copied)

    def share(self, flops: float, size: float, seconds: float) -> float | None:
        """Of the limit that a call comes closer to: its FLOPs or its bytes over what the machine does in that time."""
        amounts = ((flops, self.flops), (size, self.bytes))
        shares = [amount / limit / seconds for amount, limit in amounts if amount and limit]
        return max(shares, default=None)


def _repeat(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def compare(calls: Mapping[str, Call], seconds: float) -> dict[str, Timing]:
    """Times the calls in turns, so that whatever disturbs the machine disturbs all of them.

    Args:
        calls: the rivals by name.
        seconds: how long to go on altogether; each rival gets at least three samples, whatever they take.
    """
    for call in calls.values():
        call()  # so that a library's buffers, or compiled code, lie in the heap before it is warmed
    _warm_heap()
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        once = _repeat(call, 1)
        repeats[name] = max(1, math.ceil(_BLOCK / max(once, 1e-7)))
        samples[name] = [once] if repeats[name] == 1 else []
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while min(map(len, samples.values())) < _FEWEST or time.perf_counter() < end:
            for name in order:
                samples[name].append(_repeat(calls[name], repeats[name]) / repeats[name])
            order.reverse()  # a b, b a, a b: neither always follows the other
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(values) for name, values in samples.items()}


def fastest(call: Call, seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, of one at least; one more goes before to warm up."""
    call()
    samples = [_repeat(call, 1)]
    while sum(samples) < seconds:
        samples.append(_repeat(call, 1))
    return min(samples)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_DEFAULT_TRIM, _DEFAULT_MMAPS = 128 * 1024, 65536


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, freed memory stays in the process: else page faults of large outputs come and go between runs.

    Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(_M_MMAP_MAX, _DEFAULT_MMAPS)
        mallopt(_M_TRIM_THRESHOLD, _DEFAULT_TRIM)


_MADV_POPULATE_WRITE = 23  # mman.h, from Linux 5.14 on


def _warm_heap() -> None:
    """Maps every page of the heap, with room for results in it: a sample meets warm memory wherever its result comes.

    Results move from call to call: malloc finds no place for an aligned block in a hole of just its own size, since it
    asks for the alignment on top, so the first calls of a row make the heap grow; and peak_memory of the row before
    gave every free page back. Each page costs a fault of some 2 microseconds when touched first: a result of 32 MB took
    16 ms instead of 2, in as many samples as there were new places, which with few samples was the median.

    Within freed_memory_kept only does the room stay. Does nothing where the C library is not glibc, and maps nothing
    where the kernel is older than the request.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    library.free(library.malloc(_ROOM))
    heap = re.search(r"^(\w+)-(\w+) .*\[heap\]$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    if heap is not None:
        start, end = (int(address, 16) for address in heap.groups())
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_WRITE)


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match.group(1)) * 1024


def peak_memory(call: Call) -> int | None:
    """Bytes by which a call raises the process's peak resident memory; None where the system does not tell.

    The heap is trimmed before, and the call should have been made already: then neither inputs nor buffers that a
    library keeps between calls count. Good to about a quarter of a megabyte, the kernel's own precision.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS: proc(5)
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)

"""Runs a shape on the SIMT device with its counters on: what the kernels do to memory, exactly.

A shape is run once and stands for `copies` of it (rows, heads of a batch, images): blocks do not share work, so that
every count is that many times as large.
"""

import contextlib
import dataclasses
import functools
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _library, dispatch, testing
from .._gpu import Gpu, Work, roofline, step
from .._machine_code import signature

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Gradient(NamedTuple):
    """One of several gradients that are stated apart."""

    name: str
    of: str
    """An input."""
    reads: tuple[str, ...]
    """The inputs that it takes, beside the result's gradient."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call and its gradient."""

    op: str
    name: str
    """Says the shape that the copies make together, and the options."""
    dtype: torch.dtype
    copies: int
    inputs: Callable[[], dict[str, Tensor]]
    """The shape that is run."""
    call: Callable[..., Tensor]
    exponentials: int
    """Of one copy, forwards; the gradient takes as many again, where `recomputes`."""
    recomputes: bool = False
    saved: int = 0
    """Bytes of one copy that the forward pass writes for the backward pass alone, which reads them."""
    deterministic: bool = False
    """Whether the gradient's bits must be the same in every run."""
    common: frozenset[str] = frozenset()
    """The inputs that all copies share: weights."""
    once: frozenset[str] = frozenset()
    """The kernels that work on these alone, once for all copies."""
    gradients: tuple[Gradient, ...] | None = None
    """Each is a pass of its own; None: one backward pass gives them all."""
    shorter: Callable[[], dict[str, Tensor]] | None = None
    """The shape with a step less: what that counts is taken off, so that the figures are those of one step."""
    fewest: tuple[int, int] | None = None
    """Bytes that such a step has to move, forwards and backwards."""
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """What it is run in."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one pass of a workload did; totals over all copies."""

    workload: Workload
    direction: str
    """forward, backward or a gradient's name."""
    launches: tuple[str, ...]
    blocks: int
    """Of one copy's largest grid."""
    counters: Mapping[str, int]
    fewest_bytes: int
    """Every input once and every output once."""

    def total(self, *names: str) -> int:
        return sum(self.counters[name] for name in names)

    @property
    def bytes(self) -> int:
        """Moved between multiprocessors and L2: whole sectors of 32 bytes, those that atomics send among them."""
        return 32 * self.total("global_load_sectors", "global_store_sectors", "atomic_sectors")

    @property
    def sectors_per_request(self) -> float:
        requests = self.total("global_load_requests", "global_store_requests", "atomic_requests")
        return self.bytes / 32 / requests if requests else 0.0

    @property
    def asked_sectors_per_request(self) -> float:
        """What lanes ask for, in sectors; less than that are touched where lanes ask for the same."""
        asked = self.total("global_load_bytes", "global_store_bytes", "atomic_bytes")
        requests = self.total("global_load_requests", "global_store_requests", "atomic_requests")
        return asked / 32 / requests if requests else 0.0

    @property
    def conflicts_per_access(self) -> float:
        accesses = self.total("shared_load_requests", "shared_store_requests")
        return self.total("shared_load_conflicts", "shared_store_conflicts") / accesses if accesses else 0.0

    @property
    def work(self) -> Work:
        """For the roofline."""
        workload = self.workload
        half = workload.dtype != torch.float32
        again = self.direction == "forward" or workload.recomputes
        return Work(
            fewest_bytes=self.fewest_bytes,
            half_flops=self.counters["mma"] * (2 * 16 * 8 * 16 if half else 0),
            tf32_flops=self.counters["mma"] * (0 if half else 2 * 16 * 8 * 8),
            wavefronts=self.total("shared_load_wavefronts", "shared_store_wavefronts"),
            exponentials=workload.copies * workload.exponentials if again else 0,
        )

    def estimate(self, gpu: Gpu) -> tuple[float, str]:
        """Seconds, and what they are spent on."""
        if self.workload.shorter is not None:
            return step(gpu, self.work, self.bytes, self.blocks)
        return roofline(gpu, self.work)


class Launch(NamedTuple):
    """How a kernel was started."""

    threads: int
    dynamic_shared: int


def missing() -> str | None:
    """Why nothing can be counted here; None where it can."""
    if _library.simt_missing is not None:
        return _library.simt_missing
    return None if shutil.which("nm") else "no nm here, which names the kernels: install binutils"


def measured(workload: Workload) -> tuple[list[Counts], dict[str, Launch]]:
    """Runs a workload forwards and backwards; its counts, and its kernels' launches by signature."""
    torch.manual_seed(0)
    with workload.within():
        passes, launches = _passes(workload, workload.inputs())
        if workload.shorter is not None:
            for mine, its in zip(passes, _passes(workload, workload.shorter())[0], strict=True):
                mine.counters.subtract(its.counters)
    counts = []
    for place, (direction, found, kernels, blocks, every_tensor) in enumerate(passes):
        fewest = workload.copies * workload.fewest[place] if workload.fewest else every_tensor
        counts.append(Counts(workload, direction, kernels, blocks, found, fewest))
    return counts, launches


class _Pass(NamedTuple):
    direction: str
    counters: Counter[str]
    """Of all copies."""
    kernels: tuple[str, ...]
    blocks: int
    fewest: int
    """Bytes of every input and output, of all copies."""


def _passes(workload: Workload, inputs: dict[str, Tensor]) -> tuple[list[_Pass], dict[str, Launch]]:
    """Runs one copy forwards and backwards."""
    from ... import _simt

    passes: list[_Pass] = []
    launches: dict[str, Launch] = {}

    def finish(direction: str, fewest: int) -> None:
        found = _simt.counters()
        total: Counter[str] = Counter()
        for kernel, counters in found.items():
            times = 1 if kernel in workload.once else workload.copies
            total.update({name: times * count for name, count in counters.items()})
        passes.append(_Pass(direction, total, tuple(sorted(found)), _simt.largest_grid(), fewest))
        for place, threads, shared in _simt.launched():
            launches[signature(_symbols()[place])] = Launch(threads, shared)
        _simt.reset_counters()

    def call(wanted: Iterable[str]) -> tuple[list[Tensor], Tensor]:
        """The inputs whose gradients are wanted, and the result."""
        given = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
        return [given[name] for name in wanted], workload.call(**given)

    floating = [name for name, t in inputs.items() if t.is_floating_point()]
    of = {name: t.nbytes * (1 if name in workload.common else workload.copies) for name, t in inputs.items()}
    saved = workload.saved * workload.copies
    _simt.reset_counters()
    _simt.set_counting(True)
    try:
        with dispatch.backend("simt"), testing.deterministic(workload.deterministic):
            apart = workload.gradients
            leaves, result = call(floating if apart is None else [apart[0].of])
            out = result.nbytes * workload.copies
            finish("forward", sum(of.values()) + out + saved)
            if apart is None:
                torch.autograd.grad(result, leaves, torch.randn_like(result))
                # What the gradient needs: the result (softmax), or the inputs as well (attention).
                read = out if not workload.recomputes else sum(of.values()) + out + saved
                finish("backward", read + out + sum(of[name] for name in floating))
            for i, gradient in enumerate(apart or ()):
                if i > 0:
                    _simt.set_counting(False)
                    leaves, result = call([gradient.of])
                    _simt.reset_counters()
                    _simt.set_counting(True)
                torch.autograd.grad(result, leaves, torch.randn_like(result))
                finish(gradient.name, out + sum(of[name] for name in (gradient.of, *gradient.reads)))
    finally:
        _simt.set_counting(False)
    return passes, launches


@functools.cache
def _symbols() -> dict[int, str]:
    """Every function of the SIMT device's module, by its address there."""
    from ... import _simt

    listed = subprocess.run(["nm", "--defined-only", _simt.__file__], capture_output=True, text=True, check=True)
    lines = (line.split(maxsplit=2) for line in listed.stdout.splitlines())
    return {int(place, 16): symbol for place, _, symbol in lines}

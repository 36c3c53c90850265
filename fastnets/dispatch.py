"""The only place where a backend is chosen.

Two tables: which backends implement which operator family and what they object to (`IMPLEMENTATIONS`), and in which
order they are asked (`ORDER`). One function: `select`.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from . import _library
from .kernels import registry

__all__ = ["BACKENDS", "Case", "Implementation", "Unsupported", "backend", "recording", "select", "why_missing"]

BACKENDS = ("reference", "cpu", "cuda", "triton", "simt")
FAMILIES = ("conv", "linear", "recurrent", "attention", "softmax", "dropout")
_GPU_FAMILIES = FAMILIES[:-1]  # PyTorch's dropout is at memory speed on a GPU


class Unsupported(NotImplementedError):
    """The forced backend does not take the case; the message says why."""


class Case(NamedTuple):
    """One call, as far as the choice of a backend depends on it."""

    family: str
    """One of FAMILIES."""
    device: str
    """The inputs' device type."""
    dtype: torch.dtype
    options: frozenset[str] = frozenset()
    """The names of the options in use that not every backend need have: "dropout", "softcap", ..."""
    sizes: Mapping[str, int] = {}
    """The sizes that a backend may object to, or an order may depend on."""


class Implementation(NamedTuple):
    """One operator family on one backend."""

    backend: str
    supports: Callable[[Case], str | None]
    """None, or why the backend does not take the case."""
    operators: Any = None
    """Holds the family's operators as attributes named by the schemas in csrc/ops.cpp; None for the reference."""
    both: bool = False
    """Of recurrent: whether it has the operators for both directions of a layer at once."""


def _supports_everything(case: Case) -> None:
    return None


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GPU_WIDEST_HEAD = 256
_GPU_CAPABILITY = (8, 0)


def _cpu_supports(case: Case) -> str | None:
    if _library.missing is not None:
        return _library.missing
    if case.device != "cpu":
        return f"it takes CPU tensors, not {case.device} ones"
    if case.dtype not in _FLOATING:
        return f"it takes float32, float64, bfloat16 and float16, not {case.dtype}"
    return _tensors_objection(case)


def _tensors_objection(case: Case) -> str | None:
    """What no kernel of ours takes."""
    return "it takes neither sparse tensors nor subclasses of torch.Tensor" if "special" in case.options else None


@functools.cache
def _least(capability: Callable[[int], tuple[int, int]], devices: int) -> tuple[int, int]:
    """The least capability of so many devices, asked for once: every call of a CUDA operator wants to know."""
    return min(capability(index) for index in range(devices))


@torch.compiler.assume_constant_result
def _gpu_missing() -> str | None:
    """Why the GPU kernels have no GPU to run on, or None; looks at the machine."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = _least(torch.cuda.get_device_capability, torch.cuda.device_count())
    if capability < _GPU_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (_GPU_CAPABILITY, capability))
        return f"the GPU kernels need compute capability {needed}, and a device here has {found}"
    return None


def _kernels_objection(case: Case) -> str | None:
    """What the GPU kernels do not take, CUDA's and Triton's, on a GPU or on the CPU for tests."""
    if case.dtype not in _GPU_DTYPES:
        return f"the GPU kernels take float32, bfloat16 and float16, not {case.dtype}"
    if case.family in ("conv", "linear") and "large" in case.options:
        return "the GPU kernels count in 32 bits: fewer than 2^29 positions along a dimension, 2^31 in an image"
    widest = max(case.sizes.get("D", 0), case.sizes.get("Dv", 0))
    if case.family == "attention" and widest > _GPU_WIDEST_HEAD:
        return f"the GPU kernels take head dimensions up to {_GPU_WIDEST_HEAD}, not {widest}"
    return _tensors_objection(case)


def _cuda_supports(case: Case) -> str | None:
    if _library.cuda_missing is not None:
        return _library.cuda_missing
    if case.device != "cuda":
        return f"it takes CUDA tensors, not {case.device} ones"
    return _kernels_objection(case) or _gpu_missing()


def _triton_supports(case: Case) -> str | None:
    if registry.missing is not None:
        return registry.missing
    if case.device == "cpu":  # asked only when forced, by tests
        return registry.interpreter_missing or _kernels_objection(case)
    if case.device != "cuda":
        return f"it takes CUDA tensors, not {case.device} ones"
    return _kernels_objection(case) or _gpu_missing()


def _simt_supports(case: Case) -> str | None:
    if _library.simt_missing is not None:
        return _library.simt_missing
    if case.device != "cpu":
        return f"it takes CPU tensors, not {case.device} ones"
    return _kernels_objection(case)


# (family, backend) -> Implementation. A new backend adds its rows here and its name to ORDER.
IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {
    **{(family, "reference"): Implementation("reference", _supports_everything) for family in FAMILIES},
    **{(family, "cpu"): Implementation("cpu", _cpu_supports, torch.ops.fastnets) for family in FAMILIES},
    **{(family, "cuda"): Implementation("cuda", _cuda_supports, torch.ops.fastnets, True) for family in _GPU_FAMILIES},
    **{
        (family, "triton"): Implementation("triton", _triton_supports, getattr(torch.ops, registry.NAMESPACE))
        for family in FAMILIES
        if family in registry.FAMILIES or family == "linear"  # on convolution's operators
    },
    **{
        (family, "simt"): Implementation("simt", _simt_supports, torch.ops.fastnets_simt, True)
        for family in _GPU_FAMILIES
    },
}

# Device type -> backends in the order in which they are asked.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
_ORDER_ELSEWHERE = ("reference",)

# Compute capability -> families in which Triton comes before CUDA: its compiler emits the tensor core instructions of
# Hopper and Blackwell (wgmma, tcgen05), which csrc/cuda does not use yet. Nobody has measured it.
_TRITON_FIRST: dict[int, tuple[str, ...]] = {9: ("attention", "conv"), 10: ("attention", "conv")}


# Where plain PyTorch is the faster one. A linear layer is a matrix product: GPUs have cuBLAS, Intel's processors MKL,
# bfloat16 oneDNN (475 of 480 GFLOP/s a core). On AMD's processors MKL runs the code of AVX2, at 105 GFLOP/s of float32
# a core of Zen 5, where ours with AVX-512 reaches 200 to 220 (`bench --op linear`). Few rows are bound by memory, which
# ours reads twice to pack a weight, where MKL is slow at gradients alone; and of few products a call of ours costs more
# than it saves.
_LEAST_ROWS = 24
_LEAST_ROWS_WITH_GRADIENTS = 4
_LEAST_PRODUCTS = 1 << 22

# Dropout with its residual and both gradients: of 4096 elements ours takes 36 us and PyTorch, 6 ns an element on one
# thread, 42; of 2048 they take 35 and 32.
_LEAST_DROPPED = 1 << 12


def _faster_in_torch(case: Case) -> str | None:
    """Why the automatic choice leaves the case to plain PyTorch, or None."""
    if case.family == "linear":
        return _linear_faster_in_torch(case)
    if case.family == "dropout":
        return _dropout_faster_in_torch(case)
    return None


def _linear_faster_in_torch(case: Case) -> str | None:
    if case.device != "cpu":
        return f"PyTorch has the vendor's matrix product on {case.device}"
    if not _library.outruns_mkl:
        return "MKL knows this processor as well as our kernels do"
    if case.dtype not in (torch.float32, torch.float64) or "bf16" in case.options:
        return "oneDNN's matrix product is at the processor's peak in this precision"
    least = _LEAST_ROWS_WITH_GRADIENTS if "gradients" in case.options else _LEAST_ROWS
    if case.sizes.get("rows", least) < least:
        return f"fewer than {least} rows are bound by memory"
    if case.sizes.get("products", _LEAST_PRODUCTS) < _LEAST_PRODUCTS:
        return f"fewer than {_LEAST_PRODUCTS} products are done before a call of ours has begun"
    return None


def _dropout_faster_in_torch(case: Case) -> str | None:
    if "transformed" in case.options:
        return "torch.func's transforms would see our definition of it, not the kernel"
    if case.sizes.get("elements", _LEAST_DROPPED) < _LEAST_DROPPED:
        return f"fewer than {_LEAST_DROPPED} elements are done before a call of ours has begun"
    return None


def leaves_linear_to_torch(x: torch.Tensor, products: int) -> bool:
    """Whether a linear layer of `x` runs on plain PyTorch whatever else is said of it, and nobody watches: then no case
    need be made, which would cost a small layer, or a GPU's, a tenth of its time."""
    never = products < _LEAST_PRODUCTS or not _library.outruns_mkl or x.is_cuda
    return never and _thread.forced is None and _default is None and not _thread.recorders


def leaves_dropout_to_torch(x: torch.Tensor, elements: int) -> bool:
    """As leaves_linear_to_torch. A forced backend without dropout, a GPU's, leaves it to PyTorch as it does every layer
    that fastnets does not have."""
    forced = _thread.forced or _default
    if forced is not None:
        return ("dropout", forced) not in IMPLEMENTATIONS
    return (elements < _LEAST_DROPPED or x.device.type != "cpu") and not _thread.recorders


def is_forced() -> bool:
    """Whether a backend is forced, here or by the environment."""
    return (_thread.forced or _default) is not None


def _order(case: Case) -> tuple[str, ...]:
    names = ORDER.get(case.device, _ORDER_ELSEWHERE)
    if "triton" in names and case.family in _TRITON_FIRST.get(_architecture(), ()):
        return ("triton", *(name for name in names if name != "triton"))
    return names


@torch.compiler.assume_constant_result
def _architecture() -> int | None:
    """The current CUDA device's major compute capability."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None


def why_missing(name: str) -> str | None:
    """Why backend `name` cannot run on this machine at all; None when it can."""
    if name == "cpu":
        return _library.missing
    if name == "simt":
        return _library.simt_missing
    if name == "cuda":
        return _library.cuda_missing or _gpu_missing()
    if name == "triton":
        return registry.missing or _gpu_missing()
    return None


class _Thread(threading.local):
    def __init__(self) -> None:  # on the instance: torch.compile's guards would not see a class attribute shadowed
        self.forced: str | None = None
        self.recorders: tuple[Callable[[Case, Implementation, dict[str, str]], None], ...] = ()


_thread = _Thread()


def _check_name(name: str, argument: str = "backend") -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKENDS)}, got {name!r}")


_default = os.environ.get("FASTNETS_BACKEND") or None
if _default is not None:
    _check_name(_default, "FASTNETS_BACKEND")


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within this context every fastnets operator of this thread runs on backend `name`, or raises.

    Save dropout: cuda, triton and simt have none, and leave it to PyTorch.

    Args:
        name: one of reference, cpu, cuda, triton, simt; None returns to the automatic choice.

    Raises:
        ValueError: no such backend.
        Unsupported (a NotImplementedError): by an operator inside the context, with the reason, where the backend does
            not take it.
    """
    if name is not None:
        _check_name(name)
    former, _thread.forced = _thread.forced, name
    try:
        yield
    finally:
        _thread.forced = former


@contextlib.contextmanager
def recording(record: Callable[[Case, Implementation, dict[str, str]], None]) -> Iterator[None]:
    """Within this context every choice of this thread is told to `record`.

    Args:
        record: called with the case, the implementation chosen, and the objections of the backends asked before it.
    """
    former, _thread.recorders = _thread.recorders, (*_thread.recorders, record)
    try:
        yield
    finally:
        _thread.recorders = former


def select(case: Case) -> Implementation:
    """The implementation that runs `case`: the forced backend's, else the first in order without an objection."""
    forced = _thread.forced or _default
    if forced is not None:
        chosen, objections = _forced_choice(case, forced), {}
    else:
        chosen, objections = _first_willing(case)
    for record in _thread.recorders:
        record(case, chosen, objections)
    return chosen


def _forced_choice(case: Case, name: str) -> Implementation:
    implementation = IMPLEMENTATIONS.get((case.family, name))
    missing = why_missing(name) or "it has no such operator"
    reason = missing if implementation is None else implementation.supports(case)
    if implementation is None or reason is not None:
        raise Unsupported(f"backend {name!r} does not run this {case.family}: {reason}")
    return implementation


def _first_willing(case: Case) -> tuple[Implementation, dict[str, str]]:
    objections: dict[str, str] = {}
    slower = _faster_in_torch(case)
    for name in _order(case):
        implementation = IMPLEMENTATIONS.get((case.family, name))
        if implementation is None:
            objections[name] = why_missing(name) or "it has no such operator"
            continue
        reason = implementation.supports(case) or (slower if name != "reference" else None)
        if reason is None:
            return implementation, objections
        objections[name] = reason
    raise AssertionError("the reference takes every case")

"""The operator table and the tolerance rule: what `verify`, `bench` and the tests read.

A family's cases are in the module of its name. A case's inputs are drawn in float64; `check` casts them to a dtype,
runs ours on a backend, PyTorch's own in the same dtype as the measure, and the reference in float64 as the truth.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import dispatch

__all__ = [
    "FAMILIES",
    "Case",
    "Outcome",
    "check",
    "deterministic",
    "full_precision",
    "operator_table",
    "poisoned_memory",
    "tolerances",
]

FAMILIES = ("conv", "linear", "recurrent", "attention", "softmax", "dropout")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Inputs = Mapping[str, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the operator table."""

    op: str
    """The family."""
    name: str
    """Unique within the family; says the shape and the options."""
    inputs: Callable[[torch.Generator], dict[str, Tensor | None]]
    """Draws the inputs: floating ones in float64, all differentiable unless named in `constant`."""
    function: Callable[..., Any]
    """Ours, called with the inputs as keywords; returns a tensor or a (nested) tuple of tensors."""
    peer: Callable[..., Any] | None = None
    """PyTorch's own for the same inputs, the measure and the rival; None where it has none (then our reference)."""
    as_found: Callable[[dict[str, Tensor]], Callable[..., Any]] | None = None
    """Of a function with bends (relu): from a run's results by name, the function that is smooth, on the side of every
    bend on which that run was. Rounding may put a value that is all but on a bend on either side, which its results
    hardly show and its gradients do: so a run's gradients are held against those of this function."""
    constant: frozenset[str] = frozenset()
    """Floating inputs without gradient."""
    draws: int = 1
    """Draws that are judged together: several where a tensor has so few elements that one draw's rounding is luck."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    quick: bool = True
    """Part of `verify --quick`."""
    suite: bool = True
    """Part of the tests; False for the many rows of a sweep, which `verify` alone runs."""
    benchmark: tuple[torch.dtype, ...] = ()
    """The dtypes in which this is a row of the benchmark."""
    two_ways: bool = False
    """Its gradient may take another way where it need not be deterministic: a GPU's kernels are checked both ways."""
    verify: bool = True
    """False for benchmark rows too large to check on every backend."""
    flops: float = 0.0
    """Of one forward pass, by the formulas of docs/benchmarks; 0 for an operator bound by memory."""
    training_flops: float = 0.0
    """Of forward and backward together; 0 means three times `flops`."""
    elements: float = 0.0
    """Elements that one forward pass must read and write, to be multiplied by the dtype's size."""


@dataclass(frozen=True)
class Outcome:
    """What `check` found: the worst tensor's error beside its tolerance."""

    error: float
    tolerance: float
    where: str
    """The output or gradient that came closest to its tolerance, or passed it."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def operator_table(*families: str) -> list[Case]:
    """Every case of the given families (all, if none is named)."""
    cases = []
    for family in families or FAMILIES:
        cases += importlib.import_module(f".{family}", __name__).CASES
    return cases


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """torch.use_deterministic_algorithms, for as long as the context lasts."""
    former = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(former[0], warn_only=former[1])


def poisoned_memory() -> contextlib.AbstractContextManager[None]:
    """Fresh tensors hold NaN inside, so that an output that a kernel forgot shows."""
    return deterministic(True)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products are float32's, PyTorch's on a GPU as ours."""
    switches = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    former = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, former, strict=True):
            switch.fp32_precision = precision


def tolerances(measure: Tensor, truth: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The largest admissible (root mean square, maximum) error, from PyTorch's own error `measure` against `truth`."""
    floor = torch.finfo(dtype).eps * _largest(truth)
    return 2 * _rms(measure) + floor, 5 * _largest(measure) + floor


def check(case: Case, dtype: torch.dtype, backend: str, *, seed: int = 0) -> Outcome:
    """Runs the case forwards and backwards on `backend` and holds every output and gradient against the rule.

    Raises:
        dispatch.Unsupported: with the reason, where the backend does not take the case.
    """
    interpreted = backend == "triton" and dispatch.why_missing(backend) is not None
    device = "cuda" if backend in ("cuda", "triton") and not interpreted else "cpu"
    # For float64 itself nothing truer is at hand: PyTorch's float32 error, scaled by the ratio of the two epsilons.
    measured_in = torch.float32 if dtype == torch.float64 else dtype
    peer = case.peer or case.function
    ours, truth, measured, exact, as_truth = {}, {}, {}, {}, {}
    for draw in range(seed * case.draws, (seed + 1) * case.draws):
        drawn = case.inputs(torch.Generator().manual_seed(draw))
        with poisoned_memory(), full_precision(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of its own slow or odd cases
            with dispatch.backend(backend):
                both_ways = case.two_ways and backend in ("cuda", "simt")
                mine = _run(case, case.function, drawn, dtype, dtype, device, draw, both_ways)
            with dispatch.backend("reference"):
                theirs = _run(case, peer, drawn, measured_in, measured_in, device, draw)
                if dtype == torch.float64:  # the truth's algorithms, which oneDNN does not have
                    with torch.backends.mkldnn.flags(enabled=False):
                        _append(as_truth, _run(case, peer, drawn, measured_in, measured_in, device, draw))
                true = _true(case, drawn, dtype, device, draw, mine)
                _append(ours, mine)
                _append(truth, true)
                _append(measured, theirs)
                if measured_in != dtype or case.as_found is not None:
                    true = _true(case, drawn, measured_in, device, draw, theirs)
                _append(exact, true)
    scale = torch.finfo(dtype).eps / torch.finfo(measured_in).eps
    worst = Outcome(0.0, 0.0, "no output")
    freely = [(name + _FREELY, name) for name in truth if name + _FREELY in ours]
    for name, of in [*((name, name) for name in truth), *freely]:
        got, true = ours[name], truth[of]
        if got.shape != true.shape:
            return Outcome(float("inf"), 0.0, f"{name}: shape {tuple(got.shape)} instead of {tuple(true.shape)}")
        error = _difference(got, true)
        measure = _difference(measured[of], exact[of]) * scale
        rms, largest = tolerances(measure, true, dtype)
        if dtype == torch.float64:  # the truth is rounded too
            natively = _difference(as_truth[of], exact[of]) * scale
            rms = rms + max(_rms(measure), _rms(natively))
            largest = largest + max(_largest(measure), _largest(natively))
        for outcome in (Outcome(_rms(error), rms, f"{name}, rms"), Outcome(_largest(error), largest, f"{name}, max")):
            if not outcome.passed:
                return outcome
            if outcome.error * worst.tolerance >= worst.error * outcome.tolerance:
                worst = outcome
    return worst


def _append(to: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Puts each tensor behind those of its name from former draws."""
    for name, tensor in found.items():
        to[name] = torch.cat([to[name], tensor]) if name in to else tensor


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b in float64; 0 where both are the same infinity."""
    a, b = a.double(), b.double()
    return torch.where(a == b, 0.0, a - b)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    finite = x.double().abs()
    finite = finite.masked_fill(finite == torch.inf, 0.0) if x.numel() else finite
    return finite.max().item() if x.numel() else 0.0


def cast(inputs: Inputs, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
    """The inputs on a device, floating ones in `dtype`."""
    return {
        name: t if t is None else t.to(device, dtype) if t.is_floating_point() else t.to(device)
        for name, t in inputs.items()
    }


_FREELY = ", not deterministic"


def _run(
    case: Case,
    function,
    drawn: Inputs,
    rounded: torch.dtype,
    dtype: torch.dtype,
    device: str,
    seed: int,
    both_ways: bool = False,
) -> dict[str, Tensor]:
    """Outputs and gradients by name, of inputs rounded to `rounded` and computed in `dtype`."""
    inputs = cast(cast(drawn, rounded), dtype, device)
    leaves = {
        name: t.requires_grad_()
        for name, t in inputs.items()
        if t is not None and t.is_floating_point() and name not in case.constant
    }
    outputs = {f"output {i}": out for i, out in enumerate(flatten(function(**inputs)))}
    generator = torch.Generator().manual_seed(seed + 1)
    total = [
        (out, torch.randn(out.shape, generator=generator, dtype=torch.float64).to(rounded).to(device, out.dtype))
        for out in outputs.values()
        if out.requires_grad
    ]
    for way in ("", _FREELY) if both_ways else ("",):
        if not total or not leaves:
            break
        with deterministic(torch.are_deterministic_algorithms_enabled() and not way):
            found = torch.autograd.grad(
                [out for out, _ in total],
                list(leaves.values()),
                [g for _, g in total],
                allow_unused=True,
                retain_graph=both_ways,
            )
        for (name, leaf), grad in zip(leaves.items(), found, strict=True):
            outputs[f"gradient of {name}{way}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: out.detach().cpu() for name, out in outputs.items()}


def _true(case: Case, drawn: Inputs, rounded: torch.dtype, device: str, seed: int, found: dict[str, Tensor]):
    """Outputs and gradients in float64, to hold what was found against."""
    true = _run(case, case.function, drawn, rounded, torch.float64, device, seed)
    if case.as_found is None:
        return true
    same_side = _run(case, case.as_found(found), drawn, rounded, torch.float64, device, seed)
    return {name: t if name.startswith("output") else same_side[name] for name, t in true.items()}


def flatten(value: Any) -> list[Tensor]:
    """The tensors of a (nested) tuple of outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value if item is not None for tensor in flatten(item)]

"""Recurrent layers: one step of a sequence, of which the weights are no part, for they stay on the chip."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.recurrent import GATES, recurrent
from ...reference.recurrent import PLAIN, Variant
from .counting import DTYPES, Workload

_MULTIPROCESSORS, _SHARED = 108, 163 << 10  # an A100's


@contextlib.contextmanager
def _a100(tf32: bool = False) -> Iterator[None]:
    """The SIMT device with the limits of an A100."""
    from ... import _simt

    switch = torch.backends.cudnn.rnn
    former = _simt.resident_limit(), _simt.shared_limit(), switch.fp32_precision
    _simt.set_resident_limit(_MULTIPROCESSORS)
    _simt.set_shared_limit(_SHARED)
    switch.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        _simt.set_resident_limit(former[0])
        _simt.set_shared_limit(former[1])
        switch.fp32_precision = former[2]


def _inputs(cell: str, steps: int, batch: int, hidden: int, proj: int, dtype: torch.dtype) -> dict[str, Tensor]:
    gates, outputs = GATES[cell] * hidden, proj or hidden
    shapes = {
        "x": (steps, batch, 8),
        "h0": (batch, outputs),
        "c0": (batch, hidden) if cell == "lstm" else None,
        "w_ih": (gates, 8),
        "w_hh": (gates, outputs),
        "b_ih": (gates,),
        "b_hh": (gates,),
        "w_hr": (proj, hidden) if proj else None,
    }
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items() if shape}


def _call(cell: str, variant: Variant = PLAIN, **drawn: Tensor) -> Tensor:
    return recurrent(**{"c0": None, **drawn}, cell=cell, variant=variant)[0]


def _step(cell: str, batch: int, hidden: int, dtype: torch.dtype, tf32: bool = False) -> Workload:
    """A step forwards reads h and x's share of the gates and writes h, with the gates and c for the way back; which
    reads those, c before them, the gradient of y and the next step's gates' and writes its own."""
    gates, size, row = GATES[cell], dtype.itemsize, batch * hidden
    saved = {"lstm": 4 + 1, "gru": 4}.get(cell, 0) * 4  # bytes of a unit
    return Workload(
        op="recurrent",
        name=f"a step of {cell} {batch}x{hidden}" + (" TF32" if tf32 else ""),
        dtype=dtype,
        copies=1,
        inputs=lambda: _inputs(cell, 4, batch, hidden, 0, dtype),
        shorter=lambda: _inputs(cell, 3, batch, hidden, 0, dtype),
        call=functools.partial(_call, cell),
        within=functools.partial(_a100, tf32),
        exponentials=0,
        fewest=(
            row * (size * (gates + 2) + saved),
            row * (saved + size * (1 + 2 * gates) + (size if cell == "gru" else 0)),
        ),
    )


def workloads() -> Iterator[Workload]:
    """The sizes of cuDNN's published times (docs/gpu.md), and larger ones."""
    half = torch.bfloat16
    for batch, hidden in ((6, 72), (16, 128), (12, 192), (16, 512), (1, 1024), (64, 1024)):
        yield _step("lstm", batch, hidden, half)
    for batch, hidden in ((34, 120), (16, 264)):
        yield _step("rnn_tanh", batch, hidden, half)
    yield _step("gru", 16, 512, half)
    for batch in (1, 16):
        yield _step("lstm", batch, 512, torch.float32)
    yield _step("lstm", 16, 512, torch.float32, tf32=True)


def probes() -> Iterator[Workload]:
    """Every arithmetic and number of rows (one by one, 8, 16, 32), plain and with options; layer norm's one number."""
    hidden, clipped = 256, Variant(clip=1.0)
    for dtype, tf32 in (*((dtype, False) for dtype in DTYPES), (torch.float32, True)):
        kinds = [(batch, options) for options in (PLAIN, clipped) for batch in (1, 8, 9, 17)]
        kinds += [] if tf32 else [(9, Variant(norm=torch.ones(10 * hidden, dtype=dtype)))]
        for batch, variant in kinds:
            yield Workload(
                op="recurrent",
                name=", ".join((f"{batch} rows", *variant.names)),
                dtype=dtype,
                copies=1,
                inputs=lambda batch=batch, dtype=dtype: _inputs("lstm", 2, batch, hidden, 8, dtype),
                call=functools.partial(_call, "lstm", variant),
                within=functools.partial(_a100, tf32),
                exponentials=0,
            )

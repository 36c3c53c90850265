"""Softmax: rows that one pass holds, rows that it does not, columns, and rows that no 16 bytes divide."""

from collections.abc import Iterator

import torch

from ... import functional
from .counting import DTYPES, Workload


def _softmax(rows: int, size: int, inner: int, copies: int, dtype: torch.dtype) -> Workload:
    shape = (rows, size, inner) if inner > 1 else (rows, size)
    whole = "x".join(str(n) for n in (rows * copies, *shape[1:]))
    return Workload(
        op="softmax",
        name=whole + (" over 1" if inner > 1 else ""),
        dtype=dtype,
        copies=copies,
        inputs=lambda: {"x": torch.randn(shape, dtype=dtype)},
        call=lambda x: functional.softmax(x, 1),
        exponentials=rows * size * inner,
    )


def workloads() -> Iterator[Workload]:
    for dtype in DTYPES:
        yield _softmax(8, 128, 1, 16384, dtype)
        yield _softmax(8, 1024, 1, 8192, dtype)
        yield _softmax(4, 8192, 1, 2048, dtype)
        yield _softmax(2, 256, 64, 512, dtype)
        yield _softmax(8, 131, 1, 16384, dtype)  # rows that no 16 bytes divide
        yield _softmax(8, 1001, 1, 8192, dtype)
        yield _softmax(4, 8193, 1, 2048, dtype)


probes = workloads

"""The operator table on every backend of this machine, by the tolerance rule."""

import pytest
import torch

from fastnets import dispatch, testing

BACKENDS = [name for name in dispatch.BACKENDS if dispatch.why_missing(name) is None]
ROWS = [
    pytest.param(case, dtype, backend, id=f"{case.op}-{case.name}-{str(dtype).removeprefix('torch.')}-{backend}")
    for case in testing.operator_table()
    if case.verify
    for dtype in case.dtypes
    for backend in BACKENDS
]


@pytest.mark.parametrize(("case", "dtype", "backend"), ROWS)
def test_operator(case: testing.Case, dtype: torch.dtype, backend: str):
    try:
        outcome = testing.check(case, dtype, backend)
    except dispatch.Unsupported as reason:
        pytest.skip(str(reason))
    assert outcome.passed, f"{outcome.where}: error {outcome.error:.3g}, tolerance {outcome.tolerance:.3g}"

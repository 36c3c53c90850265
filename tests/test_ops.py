"""The operator table on every backend of this machine, by the tolerance rule."""

import os
import subprocess
import sys

import pytest
import torch

from fastnets import _library, dispatch, testing

BACKENDS = [name for name in dispatch.BACKENDS if dispatch.why_missing(name) is None]
ROWS = [
    pytest.param(case, dtype, backend, id=f"{case.op}-{case.name}-{str(dtype).removeprefix('torch.')}-{backend}")
    for case in testing.operator_table()
    if case.verify and case.suite
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


# The best one, which this process runs on, has the tests above.
OTHERS = _library.CPU_CAPABILITIES[: _library.CPU_CAPABILITIES.index(_library.cpu_capability() or "generic")]


@pytest.mark.parametrize("name", OTHERS)
def test_instruction_set(name: str, tmp_path):
    code = f"""if True:
        from fastnets import _library, cli
        assert _library.cpu_capability() == {name!r}
        raise SystemExit(cli.main(["verify", "--quick", "--backend", "cpu"]))
    """
    environment = {**os.environ, "FASTNETS_CPU": name}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""Every test starts from the same seed and with fresh memory full of NaN."""

import re
from pathlib import Path

import pytest
import torch

from fastnets.testing import poisoned_memory

_HERE = Path(__file__).parent
# `make testwheel` copies the tests away from the sources, so that they test the wheel; those of the sources stay.
if not (_HERE.parent / "setup.py").exists():
    _of_sources = re.compile(r"^import (host_compiler|mutants|sanitizers)$", re.MULTILINE)
    collect_ignore = [path.name for path in _HERE.glob("*.py") if _of_sources.search(path.read_text())]


@pytest.fixture(autouse=True)
def _poison():
    torch.manual_seed(0)
    with poisoned_memory():
        yield


@pytest.fixture
def device():
    """The SIMT device with fresh counters; what a test sets is put back."""
    from fastnets import _simt

    limit, multiprocessors = _simt.shared_limit(), _simt.multiprocessors()
    _simt.set_counting(True)
    _simt.reset_counters()
    yield _simt
    _simt.set_counting(False)
    _simt.set_seed(0)
    _simt.set_shared_limit(limit)
    _simt.set_multiprocessors(multiprocessors)

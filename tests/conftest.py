"""Every test starts from the same seed and with fresh memory full of NaN."""

import pytest
import torch

from fastnets.testing import poisoned_memory


@pytest.fixture(autouse=True)
def _poison():
    torch.manual_seed(0)
    with poisoned_memory():
        yield


@pytest.fixture
def device():
    """The SIMT device with fresh counters; what a test sets is put back."""
    from fastnets import _simt

    limit = _simt.shared_limit()
    _simt.set_counting(True)
    _simt.reset_counters()
    yield _simt
    _simt.set_counting(False)
    _simt.set_seed(0)
    _simt.set_shared_limit(limit)

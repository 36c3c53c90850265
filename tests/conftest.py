"""Every test starts from the same seed and with fresh memory full of NaN."""

import pytest
import torch

from fastnets.testing import poisoned_memory


@pytest.fixture(autouse=True)
def _poison():
    torch.manual_seed(0)
    with poisoned_memory():
        yield

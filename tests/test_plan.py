"""Plans: what a call's checks found holds for the calls alike, and for no other."""

import pytest
import torch

from fastnets import dispatch, functional
from fastnets.ops import _plan
from fastnets.ops._plan import Metadata, planned


def test_alike_calls_plan_once(monkeypatch):
    monkeypatch.setattr(_plan, "_KEPT", 2)
    asked = []

    @planned
    def plan(*of):
        asked.append(of)
        if of[-1] == "bad":
            raise ValueError("bad")
        return of

    x, y = Metadata.of(torch.empty(2, 3)), Metadata.of(torch.empty(2, 3, dtype=torch.float64))
    assert plan(x, (1, 1)) is plan(Metadata.of(torch.empty(2, 3)), (1, 1))
    assert plan(y, (1, 1)) == (y, (1, 1))
    assert len(asked) == 2
    for _ in range(2):  # what was wrong is said again
        with pytest.raises(ValueError, match="bad"):
            plan(x, "bad")
    assert len(asked) == 4
    plan(x, (2, 2))  # the third: no room
    plan(x, (1, 1))
    assert len(asked) == 6
    assert plan([1], (1, 1)) == ([1], (1, 1))  # cannot be kept


def test_a_number_of_another_type_is_asked_about_again():
    """1 == 1.0 == True, for Python's dictionaries too."""
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    for good in (1, (1, 1), [1, 1]):
        functional.conv2d(x, weight, stride=good)
    for bad in (1.0, (1.0, 1.0), (1, 1.0)):
        with pytest.raises(TypeError, match="stride"):
            functional.conv2d(x, weight, stride=bad)
    with pytest.raises(TypeError, match="groups"):
        functional.conv2d(x, weight, groups=1.0)
    with pytest.raises(TypeError, match="weight"):
        functional.conv2d(x, weight.double())


def test_a_scale_that_changes():
    q = torch.randn(1, 2, 5, 8)
    scale = torch.tensor(0.5)
    functional.scaled_dot_product_attention(q, q, q, scale=scale)
    scale.fill_(2.0)
    found = functional.scaled_dot_product_attention(q, q, q, scale=scale)
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=2.0))


def test_every_call_chooses_its_backend():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    chosen = []
    with dispatch.recording(lambda case, implementation, objections: chosen.append(implementation.backend)):
        functional.conv2d(x, weight)
        with dispatch.backend("reference"):
            functional.conv2d(x, weight)
        functional.conv2d(x, weight)
    assert chosen[1] == "reference"
    assert chosen[0] == chosen[2]

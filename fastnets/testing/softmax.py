"""The operator table's softmax cases."""

import torch

from .. import functional
from . import Case


def _case(
    name: str, shape: tuple[int, ...], dim: int, mask: tuple[int, ...] | None = None, kind: str = "", **more
) -> Case:
    scale = more.pop("scale", 1.0)

    def inputs(generator: torch.Generator):
        drawn = {"x": 3 * torch.randn(shape, generator=generator, dtype=torch.float64), "mask": None}
        if kind == "boolean":
            drawn["mask"] = torch.rand(mask, generator=generator) < 0.7
        elif kind == "additive":
            drawn["mask"] = torch.randn(mask, generator=generator, dtype=torch.float64)
        elif kind == "empty rows":
            drawn["mask"] = torch.rand(mask, generator=generator) < 0.5
        return drawn

    peer = (lambda x, mask: torch.softmax(x, dim)) if mask is None and scale == 1.0 else None
    elements = 1
    for size in shape:
        elements *= size
    return Case(
        op="softmax",
        name=name,
        inputs=inputs,
        function=lambda x, mask: functional.softmax(x, dim, scale=scale, mask=mask),
        peer=peer,
        elements=2.0 * elements,
        **more,
    )


CASES = [
    _case("5x37", (5, 37), -1),
    _case("3x1", (3, 1), -1),
    _case("2x3x5x7 over 1", (2, 3, 5, 7), 1),
    _case("17 over 0", (17,), 0),
    _case("0x4", (0, 4), 1),
    _case("4x0", (4, 0), 1),
    _case("65x129 scaled", (65, 129), -1, scale=0.125),
    _case("2x3x8x33 boolean mask", (2, 3, 8, 33), -1, (2, 1, 1, 33), "boolean"),
    _case("2x3x8x33 over 1, additive mask", (2, 3, 8, 33), 1, (3, 1, 33), "additive", scale=0.3),
    _case("4x2 boolean mask, empty rows", (40, 2), -1, (40, 2), "empty rows"),
    _case("4096x1000", (4096, 1000), -1, quick=False, benchmark=(torch.float32, torch.bfloat16)),
    _case("64x8x128x128", (64, 8, 128, 128), -1, verify=False, benchmark=(torch.float32,)),
]

"""How cost grows: attention's time and memory with the length of its sequences, a recurrent layer's with its steps."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .. import functional
from ..ops.recurrent import GATES, recurrent
from . import measure
from .rows import MODES

__all__ = ["FAMILIES", "SERIES", "Point", "Series", "as_json", "measured", "order", "plot", "table"]

FAMILIES = ("attention", "recurrent")

_WIDTH = 64
_BATCH, _HIDDEN = 16, 128
_SECONDS = 0.2
"""How long a size is measured for, if one call does not take longer."""


@dataclass(frozen=True)
class Series:
    """One curve: a call at sizes that double."""

    family: str
    name: str
    symbol: str
    """What the sizes are: L, the length of a sequence, or T, the steps."""
    sizes: tuple[int, ...]
    prepare: Callable[[int], tuple[Callable[..., Any], list[torch.Tensor]]]
    """Draws the inputs for a size: the function and its arguments, all of which have a gradient."""


@dataclass(frozen=True)
class Point:
    family: str
    name: str
    mode: str
    symbol: str
    size: int
    seconds: float
    memory: int | None
    """Peak memory of one call, in bytes."""


def _attention(causal: bool) -> Callable[[int], tuple[Callable[..., Any], list[torch.Tensor]]]:
    def prepare(length: int):
        q, k, v = torch.randn(3, 1, 1, length, _WIDTH, generator=torch.Generator().manual_seed(0))
        return lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal), [q, k, v]

    return prepare


def _recurrent(cell: str) -> Callable[[int], tuple[Callable[..., Any], list[torch.Tensor]]]:
    def prepare(steps: int):
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(2, GATES[cell] * _HIDDEN, _HIDDEN, generator=generator) * _HIDDEN**-0.5
        states = torch.zeros(2, _BATCH, _HIDDEN)
        x = torch.randn(steps, _BATCH, _HIDDEN, generator=generator)

        def call(x, w_ih, w_hh):
            return recurrent(x, states[0], states[1] if cell == "lstm" else None, w_ih, w_hh, cell=cell)[0]

        return call, [x, *weights]

    return prepare


_LENGTHS = tuple(1 << n for n in range(10, 16))
_STEPS = tuple(1 << n for n in range(6, 13))
SERIES = (
    Series("attention", f"B1 H1 D{_WIDTH}", "L", _LENGTHS, _attention(False)),
    Series("attention", f"B1 H1 D{_WIDTH}, causal", "L", _LENGTHS, _attention(True)),
    *(Series("recurrent", f"{cell} B{_BATCH} H{_HIDDEN}", "T", _STEPS, _recurrent(cell)) for cell in ("lstm", "gru")),
)


def measured(series: Series, mode: str, size: int) -> Point:
    """Times one size, as the fastest of its calls, and takes a call's peak memory."""
    function, leaves = series.prepare(size)
    if mode == "forward":

        def call():
            with torch.no_grad():
                return function(*leaves)

    else:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        grad = torch.ones_like(function(*leaves))

        def call():
            return torch.autograd.grad(function(*leaves), leaves, grad)

    seconds = measure.fastest(call, _SECONDS)
    return Point(series.family, series.name, mode, series.symbol, size, seconds, measure.peak_memory(call))


def order(points: list[Point], value: Callable[[Point], float | None]) -> float:
    """The exponent by which a value grows with the size, over the upper half of a curve (least squares of the logs)."""
    upper = [(math.log(p.size), math.log(value(p))) for p in points[len(points) // 2 :] if value(p)]
    if len(upper) < 2:
        return math.nan
    x, y = (sum(values) / len(upper) for values in zip(*upper, strict=True))
    return sum((a - x) * (b - y) for a, b in upper) / sum((a - x) ** 2 for a, _ in upper)


def _curves(points: Iterable[Point]) -> dict[tuple[str, str, str], list[Point]]:
    curves: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        curves.setdefault((point.family, point.name, point.mode), []).append(point)
    return curves


def table(points: list[Point]) -> Table:
    """A row a point; under each curve the exponents of time and memory."""
    shown = Table(box=None)
    shown.add_column("case", overflow="fold", min_width=24)
    shown.add_column("mode")
    for column in ("size", "ms", "times the former", "peak MB", "times the former"):
        shown.add_column(column, justify="right", no_wrap=True)
    for (family, name, mode), curve in _curves(points).items():
        former = None
        for point in curve:
            shown.add_row(
                f"{family} {name}",
                mode,
                f"{point.symbol} {point.size}",
                f"{point.seconds * 1e3:.3g}",
                f"{point.seconds / former.seconds:.2f}" if former else "",
                "-" if point.memory is None else f"{point.memory / 1e6:.1f}",
                f"{point.memory / former.memory:.2f}" if former and point.memory and former.memory else "",
            )
            former = point
        time, memory = order(curve, lambda p: p.seconds), order(curve, lambda p: p.memory)
        shown.add_row(
            "", "", "", f"{curve[0].symbol}^{time:.2f}", "", f"{curve[0].symbol}^{memory:.2f}", "", style="bold"
        )
    return shown


def as_json(points: list[Point], environment: dict[str, Any]) -> dict[str, Any]:
    return {"environment": environment, "points": [asdict(point) for point in points]}


def plot(points: list[Point], environment: dict[str, Any], path: Path) -> None:
    """Time and peak memory over the size, on logarithmic axes, one row of axes a family. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = list(dict.fromkeys(point.family for point in points))
    figure, axes = pyplot.subplots(
        len(families), 2, figsize=(10, 3.6 * len(families)), layout="constrained", squeeze=False
    )
    for (family, name, mode), curve in _curves(points).items():
        style = "o-" if mode == MODES[0] else "s--"
        row = axes[families.index(family)]
        sizes = [p.size for p in curve]
        exponent = order(curve, lambda p: p.seconds)
        row[0].plot(sizes, [p.seconds for p in curve], style, label=f"{name}, {mode}: {curve[0].symbol}^{exponent:.2f}")
        known = [p for p in curve if p.memory]
        exponent = order(curve, lambda p: p.memory)
        label = f"{name}, {mode}: {curve[0].symbol}^{exponent:.2f}"
        row[1].plot([p.size for p in known], [p.memory / 1e6 for p in known], style, label=label)
        for place, unit in zip(row, ("seconds", "peak MB"), strict=True):
            place.set(xlabel=curve[0].symbol, ylabel=unit, title=family, yscale="log")
            place.set_xscale("log", base=2)
    for place in axes.flat:
        place.legend(fontsize=7)
        place.grid(alpha=0.3)
    machine = environment["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, {environment['date'][:10]}", fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)

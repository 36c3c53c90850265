"""Two loss curves beside each other, in a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-~=+*#"
POINTS = 40
FIRST_STEPS = 50


def sparkline(values: Sequence[float], low: float, high: float, marks: str) -> str:
    """`values` from left to right, each point the mean of its share of them, between `low` and `high`."""
    points = min(POINTS, len(values))
    shares = [values[len(values) * i // points : len(values) * (i + 1) // points] for i in range(points)]
    scale = (len(marks) - 1) / (high - low or 1)
    return "".join(marks[round((sum(share) / len(share) - low) * scale)] for share in shares)


def _largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max((abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=False)), default=0.0)


def comparison(out: Console, trainers: dict[str, Any], scores: dict[str, float], metric: str) -> None:
    """Prints both runs' loss by epoch and as a curve, how far they are apart, both scores and both speeds."""
    ours, theirs = (trainers[name].losses for name in ("fastnets", "torch"))
    if not ours or not theirs:
        return
    steps = trainers["fastnets"].steps_an_epoch
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("epoch", "loss: fastnets", "torch", f"{metric}: fastnets", "torch"):
        table.add_column(title, justify="right")
    for epoch in range(-(-len(ours) // steps)):
        part = slice(epoch * steps, (epoch + 1) * steps)
        row = [str(epoch + 1)]
        row += [f"{sum(losses[part]) / max(1, len(losses[part])):.5f}" for losses in (ours, theirs)]
        row += [f"{trainer.scores[epoch]:.2%}" if epoch < len(trainer.scores) else "-" for trainer in trainers.values()]
        table.add_row(*row)
    out.print()
    out.print(table)
    out.print()
    low, high = min(*ours, *theirs), max(*ours, *theirs)
    marks = BLOCKS if out.encoding.lower().startswith("utf") else ASCII
    for name, losses in (("fastnets", ours), ("torch", theirs)):
        speed = trainers[name].samples_per_second
        curve = sparkline(losses, low, high, marks)
        out.print(f"{name:8}  {curve}  {metric} {scores[name]:.2%}  {speed:,.0f} samples/s")
    first = _largest_difference(ours[:FIRST_STEPS], theirs[:FIRST_STEPS])
    apart = _largest_difference(ours, theirs)
    ratio = trainers["fastnets"].samples_per_second / max(trainers["torch"].samples_per_second, 1e-12)
    out.print(
        f"losses apart by at most {first:.1e} in the first {min(FIRST_STEPS, len(ours))} steps, {apart:.1e} in all; "
        f"fastnets at {ratio:.2f} times torch's speed"
    )

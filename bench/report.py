"""How measurements are reported: a table a person can read, JSON, CSV, a plot."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .measure import Limits, Timing
from .rows import MODES, OURS, THEIRS, Row

__all__ = ["Measurement", "as_csv", "as_json", "geometric_means", "plot", "table", "totals"]


@dataclass(frozen=True)
class Measurement:
    """One row's figures, by rival."""

    row: Row
    timings: dict[str, Timing]
    memory: dict[str, int | None]
    """Peak memory of a call, in bytes."""
    limits: Limits
    """The machine's."""

    @property
    def speedup(self) -> float:
        """PyTorch's median time over ours."""
        return self.timings[THEIRS].p50 / self.timings[OURS].p50

    @property
    def against_best(self) -> float | None:
        """The fastest rival's median time over ours; None where PyTorch is the only one."""
        others = [timing.p50 for rival, timing in self.timings.items() if rival != OURS]
        return min(others) / self.timings[OURS].p50 if len(others) > 1 else None

    def rate(self, rival: str) -> tuple[float, str] | None:
        """What the rival reaches at its median, and the unit."""
        amounts = ((self.row.flops / 1e9, "GFLOP/s"), (self.row.items, "samples/s"), (self.row.bytes / 1e9, "GB/s"))
        return next(((amount / self.timings[rival].p50, unit) for amount, unit in amounts if amount), None)

    @property
    def share(self) -> float | None:
        """Of the machine's limit, FLOPs or bytes, that we reach; fewer products than counted can take it past 1."""
        return self.limits.share(self.row.flops, self.row.bytes, self.timings[OURS].p50)

    def figures(self) -> dict[str, Any]:
        """One flat record: times in seconds, memory in bytes."""
        record = {
            "family": self.row.family,
            "name": self.row.name,
            "dtype": str(self.row.dtype).removeprefix("torch."),
            "mode": self.row.mode,
            "speedup": self.speedup,
            "share_of_limit": self.share,
            "against_best": self.against_best,
        }
        for rival, timing in self.timings.items():
            rate = self.rate(rival)
            record |= {
                f"{rival}_p20": timing.p20,
                f"{rival}_p50": timing.p50,
                f"{rival}_p80": timing.p80,
                f"{rival}_samples": len(timing.samples),
                f"{rival}_rate": rate[0] if rate else None,
                f"{rival}_peak_memory": self.memory[rival],
            }
        rate = self.rate(OURS)
        return record | {"rate_unit": rate[1] if rate else None}


def geometric_means(measurements: Iterable[Measurement]) -> dict[tuple[str, str], float]:
    """The geometric mean of the speed-ups, by family and mode, in the order of the rows."""
    logs: dict[tuple[str, str], list[float]] = {}
    for m in measurements:
        logs.setdefault((m.row.family, m.row.mode), []).append(math.log(m.speedup))
    return {key: math.exp(sum(values) / len(values)) for key, values in logs.items()}


def as_json(measurements: list[Measurement], environment: dict[str, Any]) -> dict[str, Any]:
    means = geometric_means(measurements)
    return {
        "environment": environment,
        "geometric_means": [
            {"family": family, "mode": mode, "speedup": mean} for (family, mode), mean in means.items()
        ],
        "rows": [m.figures() for m in measurements],
    }


def as_csv(measurements: list[Measurement], environment: dict[str, Any]) -> str:
    """One line a row; what identifies the run is repeated on each."""
    run = {
        "device": environment["device"],
        "cpu": environment["machine"]["cpu"],
        "instruction_set": environment["instruction_set"]["in_use"],
        "threads": environment["machine"]["threads"],
        "fastnets": environment["versions"]["fastnets"],
        "torch": environment["versions"]["torch"],
        "commit": environment["commit"],
        "date": environment["date"],
        "verified": environment["verified"],
    }
    records = [m.figures() | run for m in measurements]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]) if records else list(run), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def table(measurements: list[Measurement]) -> Table:
    """The rows: times in ms as p50 (p20-p80), the speed-up, rates as fastnets / torch, our share
    of what the machine can do at most, and peak memory as fastnets / torch."""
    shown = Table(box=None)
    shown.add_column("case", overflow="fold", min_width=24)
    for column in ("dtype", "mode"):
        shown.add_column(column, no_wrap=True)
    others = any(m.against_best for m in measurements)
    for column in ("fastnets ms", "torch ms", "speed-up", "rate", "of peak", "MB", *["best rival"] * others):
        shown.add_column(column, justify="right", no_wrap=True)
    family = None
    for m in measurements:
        ours, theirs = m.rate(OURS), m.rate(THEIRS)
        if family != m.row.family:
            family = m.row.family
            unit = ours[1] if ours else ""
            shown.add_row(family, *[""] * 5, unit, style="bold")
        rates = f"{_short(ours[0])} / {_short(theirs[0])}" if ours and theirs else "-"
        shown.add_row(
            f"  {m.row.name}",
            str(m.row.dtype).removeprefix("torch."),
            m.row.mode,
            *(_milliseconds(m.timings[rival]) for rival in (OURS, THEIRS)),
            f"{m.speedup:.2f}x",
            rates if not ours or ours[1] == unit else f"{rates} {ours[1]}",
            "-" if m.share is None else f"{m.share:.0%}",
            " / ".join(_megabytes(m.memory[rival]) for rival in (OURS, THEIRS)),
            f"{m.against_best:.2f}x" if m.against_best else "",
        )
    return shown


def totals(measurements: list[Measurement]) -> Table:
    """The geometric means by family and mode."""
    means = geometric_means(measurements)
    shown = Table(box=None)
    shown.add_column("geometric mean of speed-ups")
    for mode in MODES:
        shown.add_column(mode, justify="right")
    for family in dict.fromkeys(family for family, _ in means):
        values = (means.get((family, mode)) for mode in MODES)
        shown.add_row(family, *("-" if value is None else f"{value:.2f}x" for value in values))
    best = [math.log(m.against_best) for m in measurements if m.against_best]
    if best:
        shown.add_row("against the best rival", f"{math.exp(sum(best) / len(best)):.2f}x")
    return shown


def plot(measurements: list[Measurement], environment: dict[str, Any], path: Path) -> None:
    """A bar a row: the speed-up, on a logarithmic axis. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(measurements)), layout="constrained")
    names = [m.row.title for m in measurements][::-1]
    values = [m.speedup for m in measurements][::-1]
    axes.barh(names, [value - 1 for value in values], left=1, color=["C0" if v >= 1 else "C3" for v in values])
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.set_xlabel("speed-up over torch (median times)")
    machine = environment["machine"]
    axes.set_title(
        f"{machine['cpu']}, {machine['threads']} threads, torch {environment['versions']['torch']}, "
        f"{environment['date'][:10]}",
        fontsize=9,
    )
    figure.savefig(path)
    pyplot.close(figure)


def _milliseconds(timing: Timing) -> str:
    return f"{_short(timing.p50 * 1e3)} ({_short(timing.p20 * 1e3)}-{_short(timing.p80 * 1e3)})"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"

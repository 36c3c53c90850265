"""`fastnets bench`: every benchmark row beside PyTorch's own, interleaved, in one process."""

import argparse
import dataclasses
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import testing
from ..bench import environment, growth, measure, report
from ..bench.rivals import RIVALS, missing
from ..bench.rows import MODES, NETWORK, Row, network_rows, operator_rows
from ..networks import MissingPackageError
from . import INTERRUPTED, UsageError, verify
from ._common import add_selection, console, output_file, selects, write

FAMILIES = (*testing.FAMILIES, NETWORK)

_SECONDS, _QUICK_SECONDS = 60, 20
_LEAST = 0.1
"""Seconds a row, when the time is up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Both sides run in turns in one process, on the same inputs, threads and allocator settings. `verify --quick` "
        "comes first: nothing wrong is measured. Only what ran on this machine is printed."
    )
    add_selection(parser, FAMILIES)
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads for both sides (default: torch's own)")
    parser.add_argument(
        "--seconds", type=_positive, metavar="S", help=f"time to measure for, all rows together (default {_SECONDS})"
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help=f"instead, how time and memory grow with the length ({', '.join(growth.FAMILIES)}), of fastnets alone",
    )
    parser.add_argument("--quick", action="store_true", help=f"measure for {_QUICK_SECONDS} seconds only")
    parser.add_argument("--skip-verify", action="store_true", help="do not check first; the report says so")
    parser.add_argument(
        "--rival", action="append", choices=sorted(RIVALS), default=[], help="time this beside torch too, forwards"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write figures and environment to FILE")
    parser.add_argument("--csv", type=output_file, metavar="FILE", help="write one line a row to FILE")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="draw the speed-ups (.png, .svg or .pdf)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


def _picture(name: str) -> Path:
    if Path(name).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"expected a .png, .svg or .pdf file, got {name}")
    return output_file(name)


def run(args: argparse.Namespace) -> int:
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'fastnets[bench]'")
    for rival in args.rival:
        if (advice := missing(rival)) is not None:
            raise UsageError(f"--rival {rival} needs packages that are not here: {advice}")
    rows = [] if args.growth else _rows(args)
    out, progress = console(), console(stderr=True)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.growth:
        return _growth(args, out, progress)
    if not args.skip_verify and not _verified(args, out, progress):
        out.print("not benchmarked: the figures of a wrong result mean nothing")
        return 1
    found: list[report.Measurement] = []
    left_out: dict[str, str] = {}
    setting = environment.record() | {"verified": not args.skip_verify}
    limits = measure.Limits.measured()
    setting["limits"] = dataclasses.asdict(limits)
    interrupted = False
    seconds = args.seconds or (_QUICK_SECONDS if args.quick else _SECONDS)
    try:
        for measurement in measured(rows, seconds, limits, progress, left_out):
            found.append(measurement)
    except KeyboardInterrupt:
        interrupted = True
    setting["left_out"] = left_out
    _print(found, setting, out)
    if interrupted:
        out.print("interrupted: these are the rows that were measured")
    if args.json is not None:
        write(args.json, json.dumps(report.as_json(found, setting), indent=1) + "\n")
    if args.csv is not None:
        write(args.csv, report.as_csv(found, setting))
    if args.plot is not None:
        report.plot(found, setting, args.plot)
    return INTERRUPTED if interrupted else 0


def _growth(args: argparse.Namespace, out: Console, progress_on: Console) -> int:
    """Measures how cost grows, and prints and writes it."""
    if args.csv is not None:
        raise UsageError("--growth has no --csv: take --json")
    curves = [
        (series, mode)
        for series in growth.SERIES
        for mode in MODES
        if series.family in (args.op or growth.FAMILIES) and selects(args, series.name, torch.float32)
    ]
    if not curves:
        raise UsageError(f"--growth knows {', '.join(growth.FAMILIES)} in float32: no curve is left by these options")
    setting, points = environment.record(), []
    with measure.freed_memory_kept(), _progress(progress_on) as progress:
        task = progress.add_task("", total=sum(len(series.sizes) for series, _ in curves))
        for series, mode in curves:
            for size in series.sizes:
                progress.update(task, description=f"{series.family} {series.name} {mode} {series.symbol} {size}")
                points.append(growth.measured(series, mode, size))
                progress.advance(task)
    _print_heading(setting, out)
    out.print(growth.table(points))
    out.print("times: the fastest call; in bold: by which power of the size they grow, over a curve's upper half")
    if args.json is not None:
        write(args.json, json.dumps(growth.as_json(points, setting), indent=1) + "\n")
    if args.plot is not None:
        growth.plot(points, setting, args.plot)
    return 0


def _rows(args: argparse.Namespace) -> list[Row]:
    asked = args.op or FAMILIES
    families = [family for family in asked if family != NETWORK]
    rows = operator_rows(testing.operator_table(*families), args.rival) if families else []
    rows += network_rows() if NETWORK in asked else []
    rows = [row for row in rows if selects(args, row.name, row.dtype)]
    if not rows:
        raise UsageError("no row of the benchmark is left by these options")
    return rows


def _verified(args: argparse.Namespace, out: Console, progress: Console) -> bool:
    """Runs `verify --quick` on the operators about to be measured (all, for a network); prints what failed."""
    families = None if NETWORK in (args.op or FAMILIES) else args.op
    asked = argparse.Namespace(op=families, match=None, dtype=None, backend=None, quick=True)
    results = list(verify.check_all(verify.rows(asked), progress))
    if any(result.status == "failed" for result in results):
        verify.print_results(results, out, verbose=False)
        return False
    out.print(f"verified: {sum(result.status == 'passed' for result in results)} checks against float64 passed")
    return True


def _progress(shown_on: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=shown_on, transient=True)


def measured(
    rows: list[Row], seconds: float, limits: measure.Limits, progress_on: Console, left_out: dict[str, str]
) -> Iterator[report.Measurement]:
    """Measures row by row under a progress bar; the rows left share the time left.

    A network that needs a package that is not here goes into `left_out`, with the reason.
    """
    end = time.perf_counter() + seconds
    with measure.freed_memory_kept(), _progress(progress_on) as progress:
        task = progress.add_task("", total=len(rows))
        for i, row in enumerate(rows):
            progress.update(task, description=row.title)
            share = max(_LEAST, (end - time.perf_counter()) / (len(rows) - i))
            try:
                calls = row.prepare()
            except MissingPackageError as error:
                left_out[row.title] = str(error)
                continue
            timings = measure.compare(calls, share)
            memory = {name: measure.peak_memory(call) for name, call in calls.items()}
            yield report.Measurement(row, timings, memory, limits)
            progress.advance(task)


def _print_heading(setting: dict[str, Any], out: Console) -> None:
    machine, versions = setting["machine"], setting["versions"]
    load = setting["load_average"][0]
    out.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{setting['instruction_set']['in_use'] or 'reference backend: no operator library'}; "
        f"fastnets {versions['fastnets']} ({setting['commit'] or 'no commit'}), torch {versions['torch']}, "
        f"{setting['date']}, load average {load:.2f}"
    )
    if load > machine["cores"]:
        out.print("the machine is busy: times are longer than they would be, ratios less certain")
    out.print()


def _print(found: list[report.Measurement], setting: dict[str, Any], out: Console) -> None:
    _print_heading(setting, out)
    if not setting["verified"]:
        out.print("NOT VERIFIED: run without --skip-verify before you quote a figure")
    out.print(report.table(found))
    out.print("times: median (20th-80th percentile); rates and peak memory of one call: fastnets / torch")
    flops, size = setting["limits"]["flops"], setting["limits"]["bytes"]
    most = f"{flops / 1e9:.0f} GFLOP/s of float32 multiply-adds or " if flops else ""
    out.print(
        f"of peak: ours, of {most}{size / 1e9:.1f} GB/s of a large copy, measured before; Winograd counts as direct"
    )
    out.print()
    out.print(report.totals(found))
    for title, reason in setting["left_out"].items():
        out.print(f"not measured: {title}: {reason}")

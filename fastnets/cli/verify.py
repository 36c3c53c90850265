"""`fastnets verify`: the operator table on every backend of this machine, against float64."""

import argparse
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import dispatch, testing
from ..kernels import registry
from . import INTERRUPTED, UsageError
from ._common import add_selection, console, dtype_name, output_file, selects, write

# What a broken operator may raise; anything else is a defect of this command and shows as one.
_CASE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Row(NamedTuple):
    """One check: a case in a dtype on a backend."""

    case: testing.Case
    dtype: torch.dtype
    backend: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a row; its fields are those of the JSON report."""

    op: str
    backend: str
    case: str
    dtype: str
    error: float | None
    """The error that came closest to its tolerance or passed it; None where nothing finite was computed."""
    tolerance: float | None
    status: str
    """passed, failed or skipped."""
    reason: str
    """Which output or gradient the error is of; why the case failed or was skipped."""

    @property
    def ratio(self) -> float:
        """Error over tolerance; infinite where the case failed without one."""
        if self.error is None or self.tolerance is None:
            return math.inf if self.status == "failed" else 0.0
        return self.error / self.tolerance if self.tolerance else 0.0 if self.error == 0 else math.inf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The tolerance is no constant: against float64 an error may be twice PyTorch's own in the same dtype (root "
        "mean square) and five times (maximum), plus the dtype's epsilon times the largest value. Exit status: 0 all "
        "passed, 1 something failed."
    )
    add_selection(parser)
    parser.add_argument("--backend", action="append", metavar="NAME", help="only this backend; may be repeated")
    parser.add_argument("--quick", action="store_true", help="leave out the slow cases")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every case's result to FILE")
    parser.add_argument("--verbose", action="store_true", help="list every case, not only failures and totals")


def rows(args: argparse.Namespace) -> list[Row]:
    """The checks that the arguments ask for."""
    backends = _backends(args.backend)
    found = [
        Row(case, dtype, backend)
        for case in testing.operator_table(*(args.op or ()))
        if case.verify and (case.quick or not args.quick)
        for backend in backends
        for dtype in case.dtypes
        if selects(args, case.name, dtype)
    ]
    if not found:
        raise UsageError("no case of the operator table is left by these options")
    return found


def _backends(asked: list[str] | None) -> list[str]:
    if asked is None:
        return [name for name in dispatch.BACKENDS if dispatch.why_missing(name) is None]
    for name in asked:
        if name not in dispatch.BACKENDS:
            raise UsageError(f"--backend: expected one of {', '.join(dispatch.BACKENDS)}, got {name!r}")
        if (reason := _missing(name)) is not None:
            raise UsageError(f"--backend: {name} does not run here: {reason}")
    return asked


def _missing(name: str) -> str | None:
    """Why a backend that was asked for by name cannot run here. Triton's kernels can be interpreted, slowly."""
    reason = dispatch.why_missing(name)
    if reason is None or name != "triton" or registry.missing is not None:
        return reason
    return registry.interpreter_missing and f"{reason}, and {registry.interpreter_missing}"


def check(row: Row) -> Result:
    """Runs one check; whatever the operator raises is that row's failure, an objection of the backend a skip."""
    identity = (row.case.op, row.backend, row.case.name, dtype_name(row.dtype))
    try:
        outcome = testing.check(row.case, row.dtype, row.backend)
    except dispatch.Unsupported as reason:
        return Result(*identity, None, None, "skipped", str(reason))
    except _CASE_ERRORS as error:
        return Result(*identity, None, None, "failed", f"{type(error).__name__}: {error}")
    if outcome.passed:
        return Result(*identity, outcome.error, outcome.tolerance, "passed", outcome.where)
    finite = math.isfinite(outcome.error)
    return Result(
        *identity,
        outcome.error if finite else None,
        outcome.tolerance,
        "failed",
        f"{outcome.where}: error {outcome.error:.3g}, tolerance {outcome.tolerance:.3g}",
    )


def check_all(found: Iterable[Row], out: Console) -> Iterator[Result]:
    """Every row's result as it comes, under a progress bar."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=out, transient=True) as progress:
        found = list(found)
        task = progress.add_task("", total=len(found))
        for row in found:
            progress.update(task, description=f"{row.case.op} {row.case.name}, {row.backend}")
            yield check(row)
            progress.advance(task)


def run(args: argparse.Namespace) -> int:
    results: list[Result] = []
    interrupted = False
    try:
        for result in check_all(rows(args), console(stderr=True)):
            results.append(result)
    except KeyboardInterrupt:
        interrupted = True
    out = console()
    print_results(results, out, verbose=args.verbose)
    if any(result.backend == "triton" for result in results) and registry.interpreter_missing is None:
        _print_interpreted(out)
    if interrupted:
        out.print("interrupted: these are the cases that were done")
    if args.json is not None:
        write(args.json, json.dumps(report(results), indent=1) + "\n")
    if interrupted:
        return INTERRUPTED
    return 1 if any(result.status == "failed" for result in results) else 0


def report(results: list[Result]) -> dict:
    """The JSON report."""
    counts = Counter(result.status for result in results)
    return {
        **{status: counts[status] for status in ("passed", "failed", "skipped")},
        "cases": [dataclasses.asdict(result) for result in results],
    }


def print_results(results: list[Result], out: Console, *, verbose: bool) -> None:
    """Totals by op, backend and dtype; failures, skips' reasons and (verbose) every case."""
    if verbose:
        table = Table(title="cases", title_justify="left", box=None)
        for column in ("op", "backend", "case", "dtype", "status", "error", "tolerance", "where"):
            table.add_column(column, justify="right" if column in ("error", "tolerance") else "left", overflow="fold")
        for r in results:
            table.add_row(r.op, r.backend, r.case, r.dtype, r.status, _number(r.error), _number(r.tolerance), r.reason)
        out.print(table)
        out.print()

    table = Table(title="against float64 (worst: error over tolerance)", title_justify="left", box=None)
    for column in ("op", "backend", "dtype", "passed", "failed", "skipped", "worst", "worst case"):
        right = column in ("passed", "failed", "skipped", "worst")
        table.add_column(column, justify="right" if right else "left", overflow="fold")

    def key(result: Result) -> tuple[str, str, str]:
        return result.op, result.backend, result.dtype

    for group, members in groupby(sorted(results, key=key), key):
        members = list(members)
        counts = Counter(result.status for result in members)
        worst = max(members, key=lambda result: result.ratio)
        red = "red" if counts["failed"] else None
        numbers = [str(counts[status] or "-") for status in ("passed", "failed", "skipped")]
        ratio = "-" if counts["skipped"] == len(members) else f"{worst.ratio:.2f}"
        table.add_row(*group, *numbers, ratio, worst.case, style=red)
    out.print(table)
    out.print()

    skips = Counter((r.op, r.backend, r.reason) for r in results if r.status == "skipped")
    for (op, _, reason), count in skips.items():
        out.print(f"skipped {count} x {op}: {reason}")
    for r in results:
        if r.status == "failed":
            out.print(f"FAILED {r.op} {r.case}, {r.dtype} on {r.backend}: {r.reason}", style="red")
    counts = report(results)
    out.print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")


def _print_interpreted(out: Console) -> None:
    """Triton's kernels that were interpreted, as those are that have no GPU."""
    from ..kernels import _interpreter

    if not _interpreter.launched:
        return
    table = Table(title="interpreted: no access outside a tensor, no race", title_justify="left", box=None)
    table.add_column("kernel")
    table.add_column("launches", justify="right")
    table.add_column("too large to be searched for races", justify="right")
    for kernel, launches in sorted(_interpreter.launched.items()):
        table.add_row(kernel.removesuffix("_kernel"), str(launches), str(_interpreter.unsearched[kernel] or "-"))
    out.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"

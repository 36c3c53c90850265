"""Runs every CUDA kernel as a program of its own under sanitizers: `python tests/sanitizers.py --help`.

tests/sanitize has a driver for each family, in C++ alone: the kernels on the SIMT device, each option on small odd
shapes, against loops in double. Each driver becomes three programs: plain (run in eight schedules), under
AddressSanitizer with UBSan, and under ThreadSanitizer. Then every barrier, wait and fence of the kernels is left out in
turn, in a copy of the sources, and some run has to notice; what none notices must be listed in
tests/sanitize/redundant.json with the proof that it may be missing.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import host_compiler
import mutants
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastnets.cli._machine_code import included

ROOT = mutants.ROOT
DRIVERS = mutants.HERE / "sanitize"
OUTPUT = ROOT / "build" / "sanitize"
COPY = OUTPUT / "source"
"""The sources with a number at every statement that can be left out; what all programs are built from."""

SCHEDULES = 8
TIME_LIMIT = 900
"""Seconds of processor time that one run may take, whatever else the machine does; more is an endless loop."""

ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    "ASAN_OPTIONS": "exitcode=67",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class Run(NamedTuple):
    """One program to be run."""

    family: str
    mode: str
    schedules: int
    removed: int = mutants.NOTHING
    """The number of the statement that is left out."""

    @property
    def command(self) -> list[str]:
        program = OUTPUT / f"{self.family}.{self.mode}"
        return [str(program), "--seeds", str(self.schedules), "--remove", str(self.removed)]


class Outcome(NamedTuple):
    """What came of a run."""

    run: Run
    noticed: str | None
    """What was wrong, in one line; None where nothing was."""
    output: str
    seconds: float
    """Of processor time."""


def families() -> list[str]:
    """The families that have a driver."""
    return sorted(path.stem for path in DRIVERS.iterdir() if path.suffix in (".cpp", ".cu") and path.stem != "driver")


def sources(family: str) -> list[Path]:
    """A family's driver and kernels: csrc/cuda/FAMILY.cu and FAMILY_*.cu."""
    driver = next(path for path in DRIVERS.glob(f"{family}.*"))
    kernels = [path for path in (ROOT / "csrc" / "cuda").glob("*.cu") if _belongs(path, family)]
    return [driver, *sorted(kernels)]


def _belongs(path: Path, family: str) -> bool:
    return path.stem == family or path.stem.startswith(f"{family}_")


def without_driver() -> list[str]:
    """The files of kernels that no driver runs."""
    paths = (ROOT / "csrc" / "cuda").glob("*.cu")
    return sorted(path.name for path in paths if not any(_belongs(path, family) for family in families()))


def build(runs: Iterable[Run], jobs: int) -> None:
    """Compiles what the runs need, incrementally.

    Raises:
        subprocess.CalledProcessError: the compiler's message has been printed.
    """
    targets = sorted({f"{run.family}.{run.mode}" for run in runs})
    with host_compiler.building_in(OUTPUT):
        mutants.write_copy(COPY)
        (OUTPUT / "build.ninja").write_text(_ninja_file())
        command = [sys.executable, "-m", "ninja", "-C", str(OUTPUT), "-j", str(jobs), *targets]
        subprocess.run([*command, "--quiet"], check=True)


def _ninja_file() -> str:
    compiler = ("ccache " if shutil.which("ccache") else "") + host_compiler.compiler()
    common = [f"-I{COPY / 'csrc'}", f"-I{DRIVERS}", f"-include {DRIVERS / 'mutant.h'}"]
    lines = [
        "rule compile",
        f"  command = {compiler} {' '.join(host_compiler.FLAGS)} -MMD -MF $out.d $flags -c -o $out -x c++ $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $flags -o $out $in",
    ]
    for mode, (kernel_flags, device_flags, link_flags) in host_compiler.MODES.items():
        # Of the drivers only those with kernels of their own are CUDA.
        flags = {".cpp": " ".join([*device_flags, *common]), ".cu": " ".join([*kernel_flags, *common])}
        shared = {path: f"{mode}/{path.name}.o" for path in (*host_compiler.DEVICE, DRIVERS / "driver.cpp")}
        of_family = {path: f"{mode}/{family}/{path.name}.o" for family in families() for path in sources(family)}
        for path, target in (shared | of_family).items():
            place = COPY / path.relative_to(ROOT) if path.suffix == ".cu" else path
            lines += [f"build {target}: compile {place}", f"  flags = {flags[path.suffix]}"]
        for family in families():
            objects = [*(of_family[path] for path in sources(family)), *shared.values()]
            lines += [f"build {family}.{mode}: link {' '.join(objects)}", f"  flags = {' '.join(link_flags)}"]
    return "\n".join(lines) + "\n"


def perform(run: Run) -> Outcome:
    """Runs one program."""
    limited = ["sh", "-c", f'ulimit -t {TIME_LIMIT}; exec "$@"', "sh", *run.command]
    with tempfile.TemporaryFile("w+", errors="replace") as written:
        process = subprocess.Popen(limited, stdout=written, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        written.seek(0)
        output = written.read()
    noticed = None if process.returncode == 0 else _what(process.returncode, output)
    return Outcome(run, noticed, output, used.ru_utime + used.ru_stime)


def _what(status: int, output: str) -> str:
    """The line of a failed run's output that says what was wrong."""
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"goes on for ever ({TIME_LIMIT} s of processor time)"
    for line in output.splitlines():
        if "Sanitizer:" in line or "runtime error:" in line:
            return line.split("ERROR: ")[-1].split("WARNING: ")[-1].strip()
    lines = output.strip().splitlines()
    return lines[0] if lines else f"exit status {status}"


def original_runs(names: Sequence[str], schedules: int) -> list[Run]:
    """Of every family: plain in so many schedules, and under each sanitizer."""
    under = {"thread": 1, "address": 2, "plain": schedules}  # the slowest first
    return [Run(family, mode, count) for mode, count in under.items() for family in names]


def mutant_runs(statement: mutants.Statement, names: Iterable[str]) -> list[Run]:
    """The runs that may notice that a statement is missing, those that usually do first."""
    concerned = [family for family in names if ROOT / statement.file in _read_by(family)]
    concerned.sort(key=lambda family: sum(path.stat().st_size for path in _read_by(family)))  # the quick ones first
    runs = []
    # Most give wrong values at once, and most of the others a race.
    modes = [("plain", 1), ("thread", 1), ("plain", SCHEDULES), ("address", 1)]
    if "__atomic" in statement.text:  # without its order: ThreadSanitizer alone can tell
        modes = [("thread", 1)]
    for mode, schedules in modes:
        runs += [Run(family, mode, schedules, statement.number) for family in concerned]
    return runs


@functools.cache
def _read_by(family: str) -> set[Path]:
    return set().union(*map(included, sources(family)))


class Verdict(NamedTuple):
    """Whether a missing statement was noticed."""

    statement: mutants.Statement
    outcome: Outcome | None
    """The first run that noticed, or None."""
    proof: str | None
    """Why the statement may be missing, where redundant.json lists it."""
    complete: bool
    """Whether every family that has the statement was asked."""

    @property
    def good(self) -> bool:
        if self.outcome is None:
            return self.proof is not None or not self.complete
        return self.proof is None


def try_without(statement: mutants.Statement, names: Sequence[str]) -> Verdict:
    """Runs the kernels without a statement until a run notices."""
    noticed = None
    for run in mutant_runs(statement, names):
        outcome = perform(run)
        if outcome.noticed is not None:
            noticed = outcome
            break
    proof = next((entry.proof for entry in mutants.redundant() if entry.is_about(statement)), None)
    complete = all(family in names for family in families() if ROOT / statement.file in _read_by(family))
    return Verdict(statement, noticed, proof, complete)


def stale_entries(statements: Sequence[mutants.Statement]) -> list[mutants.Redundant]:
    """Entries of redundant.json that do not name one statement of the source."""
    return [e for e in mutants.redundant() if sum(e.is_about(statement) for statement in statements) != 1]


def _arguments() -> argparse.Namespace:
    summary, more = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary.split(":")[0] + ".",
        epilog=more.strip()
        + " Exit status: 0 all silent and every mutant noticed or proven redundant, 1 not so, 2 not built.",
    )
    parser.add_argument("--family", action="append", choices=families(), help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="two schedules, no mutants")
    parser.add_argument("--mutants", action="store_true", help="the mutants only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs and compilers at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run and verdict to FILE")
    return parser.parse_args()


def _each(console: Console, title: str, work, items: Sequence, jobs: int) -> Iterator:
    """work(item) of each, `jobs` at a time, in order, under a progress bar."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task(title, total=len(items))
        futures = [pool.submit(work, item) for item in items]
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(task))
        for future in futures:
            yield future.result()


def _print_runs(console: Console, outcomes: Sequence[Outcome]) -> None:
    table = Table(title="runs, in seconds of processor time", title_justify="left", box=None)
    for column in ("family", "program", "schedules", "seconds", "found"):
        table.add_column(column, justify="right" if column in ("schedules", "seconds") else "left", overflow="fold")
    for outcome in outcomes:
        run = outcome.run
        style = "red" if outcome.noticed else None
        found = outcome.noticed or "nothing"
        table.add_row(run.family, run.mode, str(run.schedules), f"{outcome.seconds:.1f}", found, style=style)
    console.print(table)
    for outcome in outcomes:
        if outcome.noticed:
            console.print(f"\n{' '.join(outcome.run.command)}\n{outcome.output}", style="red")


def _print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    table = Table(title="mutants: what noticed that a statement is missing", title_justify="left", box=None)
    for column in ("where", "statement", "noticed by", "what it said"):
        table.add_column(column, overflow="fold")
    for verdict in verdicts:
        statement, outcome = verdict.statement, verdict.outcome
        where = f"{statement.file}:{statement.line}"
        if outcome is not None:
            row = (f"{outcome.run.family}, {outcome.run.mode}", outcome.noticed)
            if verdict.proof is not None:
                row = (row[0], f"LISTED AS REDUNDANT, and yet: {row[1]}")
        elif verdict.proof is not None:
            row = ("nothing", f"redundant: {verdict.proof}")
        elif not verdict.complete:
            row = ("nothing here", "other families have it, too")
        else:
            row = ("nothing", "NOT NOTICED, not listed")
        table.add_row(where, statement.text.split("  //")[0], *row, style=None if verdict.good else "red")
    console.print(table)


def main() -> int:
    """Builds, runs, prints; returns the exit status."""
    args = _arguments()
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    if shutil.which(host_compiler.compiler_name()) is None:
        console.print(f"no C++ compiler {host_compiler.compiler_name()!r} here: install g++ or set CXX")
        return 2
    names = args.family or families()
    outcomes: list[Outcome] = []
    verdicts: list[Verdict] = []
    stale: list[mutants.Redundant] = []
    began = time.monotonic()
    try:
        if not args.mutants:
            runs = original_runs(names, 2 if args.quick else SCHEDULES)
            build(runs, args.jobs)
            outcomes = list(_each(console, "running", perform, runs, args.jobs))
            _print_runs(console, outcomes)
        if not args.quick:
            statements = mutants.statements()
            stale = stale_entries(statements)
            chosen = [statement for statement in statements if mutant_runs(statement, names)]
            build([run for statement in chosen for run in mutant_runs(statement, names)], args.jobs)
            verdicts = list(
                _each(console, "leaving out", lambda statement: try_without(statement, names), chosen, args.jobs)
            )
            _print_verdicts(console, verdicts)
    except subprocess.CalledProcessError:
        return 2
    for name in without_driver():
        console.print(f"no driver runs csrc/cuda/{name}: add tests/sanitize/{Path(name).stem.split('_')[0]}.cpp")
    for entry in stale:
        console.print(f"redundant.json names no statement or several: {entry.file}: {entry.text}", style="red")
    if args.json is not None:
        args.json.write_text(json.dumps(_report(outcomes, verdicts), indent=1) + "\n")
    failed = [outcome for outcome in outcomes if outcome.noticed]
    bad = [verdict for verdict in verdicts if not verdict.good]
    noticed = sum(verdict.outcome is not None for verdict in verdicts)
    console.print(
        f"\n{len(outcomes) - len(failed)} of {len(outcomes)} runs silent; {noticed} of {len(verdicts)} missing "
        f"statements noticed, {len(verdicts) - noticed} not, {len(bad)} of them without reason; "
        f"{time.monotonic() - began:.0f} s, {_processor_time():.0f} s of processor time"
    )
    return 1 if failed or bad or stale else 0


def _processor_time() -> float:
    """Of this process and what it started, compilers included, in seconds."""
    return sum(os.times()[:4])


def _report(outcomes: Sequence[Outcome], verdicts: Sequence[Verdict]) -> dict:
    """The JSON report."""
    return {
        "runs": [
            {
                "family": o.run.family,
                "mode": o.run.mode,
                "schedules": o.run.schedules,
                "seconds": round(o.seconds, 1),
                "found": o.noticed,
            }
            for o in outcomes
        ],
        "mutants": [
            {
                "file": v.statement.file,
                "line": v.statement.line,
                "statement": v.statement.text,
                "noticed_by": v.outcome and f"{v.outcome.run.family}, {v.outcome.run.mode}",
                "what": v.outcome and v.outcome.noticed,
                "proof": v.proof,
            }
            for v in verdicts
        ],
    }


if __name__ == "__main__":
    sys.exit(main())

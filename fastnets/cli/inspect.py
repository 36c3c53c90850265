"""`fastnets inspect`: what the compiler made of the CUDA kernels, what they do to memory, and what follows. No GPU."""

import argparse
import concurrent.futures
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import _library
from ..kernels import registry
from . import UsageError, _gpu, _triton, _workloads
from . import _machine_code as code
from ._common import console, dtype_name, output_file, write

COMPARED = (
    "registers",
    "spills",
    "stack",
    "shared",
    "occupancy",
    "tensor",
    "async",
    "ldsm",
    "loop_instructions",
    "instructions",
)
"""The fields of a kernel that a snapshot holds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Registers, shared memory and instructions are read from machine code: from the built CUDA library or, with "
        "--build, compiled here. Bytes, sectors and bank conflicts are counted by the SIMT device as it runs the same "
        "sources. Times are estimates by a roofline of NVIDIA's documented peaks: nothing was run on a GPU. "
        "docs/gpu.md explains every column. Exit status: 0, or 1 where --snapshot finds a difference."
    )
    parser.add_argument(
        "--build", action="store_true", help="compile the kernels for this instead of reading the library"
    )
    parser.add_argument(
        "--arch",
        action="append",
        choices=_gpu.ARCHITECTURES,
        help="only this architecture, sm_80 and so on; may be repeated",
    )
    parser.add_argument("--op", action="append", metavar="OP", help="only this family; may be repeated")
    parser.add_argument("--kernel", metavar="TEXT", help="only kernels whose name contains TEXT")
    parser.add_argument(
        "--networks",
        action="store_true",
        help="as shapes every convolution of ResNet-50, MobileNet-V2 and our networks",
    )
    parser.add_argument(
        "--triton",
        action="store_true",
        help="also compile the Triton kernels, for " + ", ".join(_triton.ARCHITECTURES) + "; exit status 1 where one "
        "spills, has no tensor-core instructions or no asynchronous copies for its products, or needs too much "
        "shared memory",
    )
    parser.add_argument("--static", action="store_true", help="machine code only, no shapes on the SIMT device")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--snapshot", type=Path, metavar="DIR", help="compare with the figures in DIR, a file a family")
    parser.add_argument("--renew", action="store_true", help="write the figures into the --snapshot DIR instead")


def run(args: argparse.Namespace) -> int:
    if args.renew and args.snapshot is None:
        raise UsageError("--renew needs --snapshot DIR")
    out, progress = console(), console(stderr=True)
    if args.triton and registry.missing is not None:
        raise UsageError(f"--triton: {registry.missing}")
    objection = _workloads.missing()
    found = _kernels(args, progress)
    counts, launches = ([], {}) if objection else _counted(args, bool(found), progress)
    kernels = [entry(kernel, launches.get(kernel.signature)) for kernel in found]
    compiled = list(_of_triton(args, progress)) if args.triton else []
    kernels += [entry(one.kernel, _workloads.Launch(one.threads, one.shared)) for one in compiled]
    if not kernels:
        raise UsageError("no kernel is left by these options")
    if args.snapshot is not None:
        return _snapshot(args, kernels, out)
    _print_kernels(kernels, out)
    if compiled and (rows := list(_triton.beside(kernels, compiled))):
        _print_beside(rows, out)
    if objection:
        out.print(f"blocks, dynamic shared memory and traffic are not known: {objection}")
    elif not args.static:
        _print_counts(counts, out)
    if args.json is not None:
        figures = {"kernels": kernels, "workloads": [_workload_entry(c) for c in counts]}
        write(args.json, json.dumps(figures, indent=1) + "\n")
    complaints = [(one.kernel, words) for one in compiled if (words := _triton.complaint(one)) is not None]
    for kernel, words in complaints:
        out.print(f"{kernel.name}, {kernel.arch}: {words}", style="red")
    if compiled:
        by = Counter(f"{one.kernel.arch} {one.multiplies}" for one in compiled if one.multiplies)
        out.print(f"Triton: {len(compiled)} kernels compiled, {len(compiled) - len(complaints)} without a complaint")
        if by:
            out.print("Products by " + ", ".join(f"{name}: {count}" for name, count in by.items()))
    return 1 if complaints else 0


def _each(progress_on: Console, items: Sequence, work, describe, jobs: int = 1) -> Iterator:
    """work(item) of each in order, under a progress bar."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        Progress(*columns, console=progress_on, transient=True) as progress,
    ):
        task = progress.add_task("", total=len(items))
        for item, result in zip(items, pool.map(work, items), strict=True):
            progress.update(task, advance=1, description=describe(item))
            yield result


def _jobs() -> int:
    """How many compilers run at a time."""
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def _counted(
    args: argparse.Namespace, launched: bool, progress_on: Console
) -> tuple[list[_workloads.Counts], dict[str, _workloads.Launch]]:
    """The counts of every stated shape and, where that is asked for, how every kernel is launched."""
    shapes = _workloads.networks if args.networks else _workloads.workloads
    stated = [] if args.static or args.snapshot else shapes()
    probes = _workloads.probes() if launched else []
    tasks = [(w, shown) for shown, ws in ((False, probes), (True, stated)) for w in ws]
    tasks = [task for task in tasks if not args.op or task[0].op in args.op]
    counts: list[_workloads.Counts] = []
    launches: dict[str, _workloads.Launch] = {}
    results = _each(progress_on, tasks, lambda task: _workloads.measured(task[0]), lambda task: task[0].name)
    for (_, shown), (found, launched) in zip(tasks, results, strict=True):
        counts += found if shown else []
        launches |= launched
    return counts, launches


def _kernels(args: argparse.Namespace, progress_on: Console) -> list[code.Kernel]:
    """Every kernel that is asked for, in every architecture."""
    if args.build:
        compiler = code.nvcc()
        tasks = [(source, arch) for source in code.sources(args.op) for arch in args.arch or _gpu.ARCHITECTURES]
        jobs = _jobs()

        def work(task: tuple[Path, str]) -> list[code.Kernel]:
            return code.read(code.compiled(*task, compiler), task[1])
    else:
        library = _library.cuda_path
        if library is None and args.triton:
            return []
        if library is None:
            raise UsageError("no CUDA library is built here: `--build` compiles the kernels (needs nvcc)")
        built = code.architectures(library)
        tasks, jobs = [(library, arch) for arch in built if arch in (args.arch or _gpu.ARCHITECTURES)], 1

        def work(task: tuple[Path, str]) -> list[code.Kernel]:
            return code.read(*task)

    found = []
    for kernels in _each(progress_on, tasks, work, lambda task: f"{task[0].name} {task[1]}", jobs):
        found += kernels
    found = [k for k in found if (not args.op or k.family in args.op) and (args.kernel or "") in k.name]
    order = list(_gpu.ARCHITECTURES)
    return sorted(found, key=lambda kernel: (kernel.name, order.index(kernel.arch)))


def _of_triton(args: argparse.Namespace, progress_on: Console) -> Iterator[_triton.Compiled]:
    """Every Triton kernel that is asked for, in every architecture that Triton's tables know."""
    archs = [arch for arch in args.arch or _triton.ARCHITECTURES if arch in _triton.ARCHITECTURES]
    wanted = [workload for workload in _triton.workloads() if not args.op or workload.op in args.op]
    found = [launch for arch in archs for launch in _triton.launches(wanted, arch)]
    found = [launch for launch in found if (args.kernel or "") in launch.name]
    return _each(progress_on, found, _triton.compiled, lambda launch: f"{launch.name} {launch.arch}", _jobs())


def entry(kernel: code.Kernel, launch: _workloads.Launch | None) -> dict[str, Any]:
    """A kernel's figures; None where they depend on a launch that is not known."""
    shared = kernel.static_shared + (launch.dynamic_shared if launch else 0)
    resident = launch and (kernel.arch, launch.threads, kernel.registers, shared)
    return {
        "name": kernel.name,
        "arch": kernel.arch,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "spill_stores": kernel.spill_stores,
        "spill_loads": kernel.spill_loads,
        "stack": kernel.stack,
        "shared": shared if launch else None,
        "static_shared": kernel.static_shared,
        "dynamic_shared": launch.dynamic_shared if launch else None,
        "threads": launch.threads if launch else None,
        "blocks": _gpu.blocks_per_multiprocessor(*resident) if resident else None,
        "occupancy": round(_gpu.occupancy(*resident), 4) if resident else None,
        "tensor": kernel.tensor,
        "async": kernel.async_copies,
        "ldsm": kernel.ldsm,
        "special": kernel.special,
        "loop_instructions": kernel.loop_instructions,
        "instructions": kernel.instructions,
    }


def _workload_entry(counts: _workloads.Counts) -> dict[str, Any]:
    workload = counts.workload
    estimates = {gpu.name: counts.estimate(gpu) for gpu in _gpu.GPUS}
    return {
        "op": workload.op,
        "name": workload.name,
        "dtype": dtype_name(workload.dtype),
        "pass": counts.direction,
        "launches": list(counts.launches),
        "bytes": counts.bytes,
        "fewest_bytes": counts.fewest_bytes,
        "sectors_per_request": counts.sectors_per_request,
        "asked_sectors_per_request": counts.asked_sectors_per_request,
        "conflicts_per_access": counts.conflicts_per_access,
        "counters": dict(counts.counters),
        "estimated_seconds": {name: seconds for name, (seconds, _) in estimates.items()},
        "limited_by": {name: limit for name, (_, limit) in estimates.items()},
    }


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_kernels(kernels: Sequence[Mapping[str, Any]], out: Console) -> None:
    columns = ("arch", "regs", "spills", "stack", "shared", "threads", "occupancy")
    table = _table("kernels", ["kernel"], [*columns, "tensor", "async", "ldsm", "loop", "all"])
    before = None
    for k in kernels:
        cells = [k[name] for name in ("arch", "registers", "spills", "stack", "shared", "threads")]
        cells.append(None if k["occupancy"] is None else f"{k['occupancy']:.0%}")
        cells += [k[name] for name in ("tensor", "async", "ldsm", "loop_instructions", "instructions")]
        style = "red" if k["spills"] or k["stack"] else None
        name = k["name"] if k["name"] != before else ""
        table.add_row(name, *("-" if cell is None else str(cell) for cell in cells), style=style)
        before = k["name"]
    out.print(table)
    spilling = sum(bool(k["spills"] or k["stack"]) for k in kernels)
    names, archs = {k["name"] for k in kernels}, {k["arch"] for k in kernels}
    out.print(
        f"{len(names)} kernels for {len(archs)} architectures, {spilling} with spills (LDL, STL) or a stack.\n"
        "tensor, async, ldsm, loop: instructions in the main loop; all: in the kernel.\n"
    )


def _print_beside(rows: Sequence[tuple[str, ...]], out: Console) -> None:
    columns = ("regs", "shared", "density", "a MFLOP")
    table = _table("CUDA C++ and Triton side by side, bfloat16", ["what", "arch"], [*columns, *columns])
    for row in rows:
        table.add_row(*row)
    out.print(table)
    out.print(
        "Of either registers, shared memory, density (tensor-core instructions an instruction of the main loop) and "
        "tensor-core instructions\na million operations: mma.sync's has 4096 of them, wgmma's and tcgen05's far more. "
        "docs/gpu.md explains.\n"
    )


def _print_counts(counts: Sequence[_workloads.Counts], out: Console) -> None:
    ratios = ("bytes", "sectors", "conflicts")
    columns = [*ratios, *(gpu.name for gpu in _gpu.GPUS), "limit"]
    table = _table("traffic, counted; microseconds, ESTIMATED", ["op", "shape", "dtype", "pass"], columns)
    for c in counts:
        if c.workload.dtype == torch.float16:  # moves what bfloat16 moves
            continue
        estimates = [c.estimate(gpu) for gpu in _gpu.GPUS]
        limits = dict.fromkeys(limit for _, limit in estimates)
        table.add_row(
            c.workload.op,
            c.workload.name,
            dtype_name(c.workload.dtype),
            c.direction,
            f"{c.bytes / c.fewest_bytes:.2f}",
            f"{c.sectors_per_request:.2f} ({c.asked_sectors_per_request:.2f})",
            f"{c.conflicts_per_access:.3f}",
            *(f"{seconds * 1e6:.1f}" for seconds, _ in estimates),
            "/".join(limits),
        )
    out.print(table)
    out.print(
        "bytes: of the sectors of 32 that requests touch, over every tensor once; sectors: a request's (bytes that "
        "lanes ask for, in sectors);\nconflicts: of banks, an access to shared memory. Times are lower bounds at "
        "NVIDIA's documented peaks, of a recurrent step\na sum of what it waits for: no GPU has run this. docs/gpu.md "
        "has the models."
    )


# Snapshots.


def _snapshot(args: argparse.Namespace, kernels: Sequence[Mapping[str, Any]], out: Console) -> int:
    compiler = code.version(code.nvcc()) if args.build else None
    families = sorted({family_of(k) for k in kernels})
    if args.renew:
        if args.kernel or args.arch or compiler is None:
            raise UsageError("--renew writes whole families: with --build, and without --arch and --kernel")
        for family in families:
            ours = [k for k in kernels if family_of(k) == family]
            lines = (json.dumps({name: k[name] for name in ("name", "arch", *COMPARED)}) for k in ours)
            text = f'{{"nvcc": "{compiler}", "kernels": [\n' + ",\n".join(lines) + "\n]}\n"
            write(args.snapshot / f"{family}.json", text)
            out.print(f"{len(ours)} entries written to {args.snapshot}/{family}.json")
        return 0
    archs = {k["arch"] for k in kernels}
    expected = []
    for family in families:
        former = read_snapshot(args.snapshot / f"{family}.json")
        if compiler is not None and compiler != former["nvcc"]:
            raise UsageError(
                f"{args.snapshot} is of nvcc {former['nvcc']}, this one is {compiler}: figures would differ"
            )
        expected += [k for k in former["kernels"] if k["arch"] in archs and (args.kernel or "") in k["name"]]
    changes = differences(expected, kernels)
    if not changes:
        out.print(f"{len(expected)} entries as in {args.snapshot}")
        return 0
    table = Table(title=f"differences from {args.snapshot}", title_justify="left", box=None)
    for column in ("kernel", "arch", "figure", "snapshot", "now"):
        table.add_column(column, overflow="fold")
    for change in changes:
        table.add_row(*change)
    out.print(table)
    changed = " ".join(f"--op {family}" for family in sorted({name.split("::")[0] for name, *_ in changes}))
    out.print(f"If that is meant: python -m fastnets inspect --build {changed} --snapshot {args.snapshot} --renew")
    return 1


def family_of(entry: Mapping[str, Any]) -> str:
    """The operator family of a kernel's entry."""
    return entry["name"].split("::")[0]


def read_snapshot(path: Path) -> dict[str, Any]:
    """A family's file of a snapshot."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def differences(
    former: Sequence[Mapping[str, Any]], kernels: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str, str, str]]:
    """(kernel, architecture, figure, former, now) of whatever differs; of kernels that came or went, once."""
    before = {(k["name"], k["arch"]): k for k in former}
    now = {(k["name"], k["arch"]): k for k in kernels}
    found = []
    for key in sorted(before.keys() | now.keys()):
        if key not in now or key not in before:
            found.append((*key, "kernel", *(("there", "gone") if key in before else ("not there", "new"))))
            continue
        for name in COMPARED:
            was, is_now = before[key][name], now[key][name]
            if was != is_now and is_now is not None:  # None: no SIMT device to ask
                found.append((*key, name, str(was), str(is_now)))
    return found

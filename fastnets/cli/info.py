"""`fastnets info`: what is installed, what this machine has, which backends run and why others do not."""

import argparse
import json
from typing import Any

from rich.table import Table

from ..bench import environment
from ._common import console

NO_GPU = "No GPU has run any of this: the CUDA kernels have been run, thread by thread, on the SIMT device alone."
FORCE_NOTE = "FASTNETS_CPU=generic|avx2|avx512|avx512_bf16 forces one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def facts() -> dict[str, Any]:
    """Everything that `info` says."""
    return {
        "versions": environment.versions(),
        "machine": environment.machine(),
        "instruction_set": environment.instruction_set(),
        "backends": environment.backends(),
        "build": environment.build(),
        "commit": environment.commit(),
    }


def run(args: argparse.Namespace) -> int:
    found = facts()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    out = console()

    def table(title: str, rows: dict[str, Any]) -> None:
        grid = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
        grid.add_column(min_width=16)
        grid.add_column(overflow="fold")
        for name, value in rows.items():
            grid.add_row(name, "-" if value is None else str(value))
        out.print(grid)
        out.print()

    table("versions", {name: value or "not installed" for name, value in found["versions"].items()})
    machine = found["machine"]
    table(
        "machine",
        {
            "processor": f"{machine['cpu']} ({machine['architecture']})",
            "cores, threads": f"{machine['cores']} usable, torch uses {machine['threads']} threads",
            "memory": f"{machine['memory_gib']} GiB" if machine["memory_gib"] else None,
            "system": machine["system"],
            "GPUs": ", ".join(machine["gpus"]) or "none that torch sees",
        },
    )
    isa = found["instruction_set"]
    forced = f", forced by FASTNETS_CPU={isa['forced_by_environment']}" if isa["forced_by_environment"] else ""
    in_use = isa["in_use"] or "none: the operator library is not built"
    table("instruction set", {"in use": f"{in_use}{forced} ({FORCE_NOTE})", "torch's": isa["torch"]})
    table(
        "backends",
        {row["backend"]: "available" if row["available"] else f"missing: {row['reason']}" for row in found["backends"]},
    )
    build = found["build"]

    def library(path: str | None, size: int | None, otherwise: str) -> str:
        return f"{path} ({size / 1e6:.2f} MB)" if path else otherwise

    table(
        "build",
        {
            "operator library": library(build["library"], build["bytes"], build["reason"]),
            "CUDA library": library(build["cuda_library"], build["cuda_bytes"], "not built"),
            "CUDA": build["cuda"] and f"{build['cuda']}, for {build['cuda_architectures']}",
            "built against": build["torch"] and f"torch {build['torch']}",
            "compiler": build["compiler"],
            "commit": found["commit"],
        },
    )
    out.print(NO_GPU)

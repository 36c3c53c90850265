"""What runs here: the facts that `fastnets info` prints and that `fastnets bench` records beside its figures."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastnets import __version__, _library, dispatch

PACKAGES = ("torch", "triton", "numpy", "transformers")


def versions() -> dict[str, str | None]:
    """fastnets', Python's and the packages' versions; None for a package that is not installed."""
    found: dict[str, str | None] = {"fastnets": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with its local part, +cpu or +cu130
    return found


def _first_match(path: str, pattern: str) -> str | None:
    """The first group of `pattern` in a file; None where either is missing."""
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return match.group(1).strip() if match else None


def cpu_model() -> str:
    return _first_match("/proc/cpuinfo", r"^model name\s*:\s*(.*)$") or platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """The processor, its cores, memory, the system, and the GPUs that torch sees."""
    memory = _first_match("/proc/meminfo", r"^MemTotal:\s*(\d+) kB$")
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int(memory) / 2**20, 1) if memory else None,
        "system": platform.platform(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def instruction_set() -> dict[str, Any]:
    """The instruction set of the CPU kernels, and whether the environment forces it."""
    return {
        "in_use": _library.cpu_capability(),
        "torch": torch.backends.cpu.get_cpu_capability(),
        "forced_by_environment": os.environ.get("FASTNETS_CPU") or None,
    }


def backends() -> list[dict[str, Any]]:
    """Every backend: whether this machine can run it, and if not, why."""
    return [
        {"backend": name, "available": reason is None, "reason": reason}
        for name, reason in ((name, dispatch.why_missing(name)) for name in dispatch.BACKENDS)
    ]


def build() -> dict[str, Any]:
    """The operator library: where it is, its size, and the compiler's own mark in it."""
    path = _library.path
    cuda = {"cuda_library": None if _library.cuda_path is None else str(_library.cuda_path)}
    if path is None:
        return {"library": None, "bytes": None, "compiler": None, "reason": _library.missing, **cuda}
    mark = re.search(rb"(GCC: \([^\0]*|clang version [^\0]*)", path.read_bytes())
    return {
        "library": str(path),
        "bytes": path.stat().st_size,
        "compiler": mark.group(1).decode(errors="replace").strip() if mark else None,
        "reason": _library.missing,
        **cuda,
    }


def commit() -> str | None:
    """The commit of the checkout that fastnets runs from, `-dirty` where files differ; None for an installed wheel."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or a checkout it does not trust
        return None


def record() -> dict[str, Any]:
    """What a figure means nothing without: machine, versions, commit, date, and what else was running."""
    return {
        "device": "cpu",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "instruction_set": instruction_set(),
        "load_average": list(os.getloadavg()),
    }

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
    """The operator libraries: where they are, their sizes, what they were built from and with."""
    path, cuda = _library.path, _library.cuda_path
    mark = re.search(rb"(GCC: \([^\0]*|clang version [^\0]*)", path.read_bytes()) if path else None
    return {
        "library": path and str(path),
        "bytes": path and path.stat().st_size,
        "compiler": mark.group(1).decode(errors="replace").strip() if mark else None,
        "reason": _library.missing,
        "cuda_library": cuda and str(cuda),
        "cuda_bytes": cuda and cuda.stat().st_size,
        **{name: _library.build.get(name) for name in ("torch", "cuda", "cuda_architectures")},
    }


def commit() -> str | None:
    """That of the checkout that fastnets runs from, `-dirty` where files differ; that which a wheel was built of."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return _library.build.get("commit")
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

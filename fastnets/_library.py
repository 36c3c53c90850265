"""Loads the operator library, `_C.abi3.so`. Without it everything runs on the reference backend."""

import importlib.machinery
import warnings
from pathlib import Path

import torch


def _load() -> str | None:
    """Loads the library; returns why it could not be, or None."""
    folder = Path(__file__).parent
    found = [folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    library = next((path for path in found if path.exists()), None)
    if library is None:
        return f"no operator library in {folder}: build it with `pip install .` (needs g++)"
    try:
        torch.ops.load_library(str(library))
        torch.ops.fastnets.cpu_capability()
    except (OSError, RuntimeError) as error:
        return f"{library.name} does not load: {error}"
    return None


missing: str | None = _load()
"""Why the operator library is not there, or None when it is."""

if missing is not None:
    warnings.warn(f"fastnets runs on its plain PyTorch reference, slowly: {missing}", stacklevel=2)


def cpu_capability() -> str | None:
    """The instruction set of the CPU kernels: generic, avx2 or avx512; None without the library."""
    return None if missing is not None else ("generic", "avx2", "avx512")[torch.ops.fastnets.cpu_capability()]

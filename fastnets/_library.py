"""Loads the operator library, `_C.abi3.so`. Without it everything runs on the reference backend.

`_C_cuda.abi3.so` beside it adds the same operators for CUDA tensors, where torch has CUDA. Builds for development have
a third one, `_simt`: the CUDA kernels on the SIMT device.
"""

import importlib
import importlib.machinery
import json
import warnings
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent


def _find(stem: str) -> Path | None:
    names = [_FOLDER / f"{stem}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((name for name in names if name.exists()), None)


path: Path | None = _find("_C")
"""Where the operator library is, or None when there is none."""

cuda_path: Path | None = _find("_C_cuda")
"""Where the CUDA operators' library is, or None when there is none."""


def _read_record() -> dict[str, Any]:
    try:
        return json.loads((_FOLDER / "_build.json").read_text())
    except FileNotFoundError:  # nothing is built here
        return {}


build: dict[str, Any] = _read_record()
"""What setup.py wrote of its build: version, commit, torch, cuda, cuda_architectures; empty where nothing is built."""


def _load() -> str | None:
    """Loads the library; returns why it could not be, or None."""
    if path is None:
        return f"no operator library in {_FOLDER}: build it with `pip install .` (needs g++)"
    try:
        torch.ops.load_library(str(path))
        torch.ops.fastnets.cpu_capability()
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load: {error}"
    return None


missing: str | None = _load()
"""Why the operator library is not there, or None when it is."""

if missing is not None:
    warnings.warn(f"fastnets runs on its plain PyTorch reference, slowly: {missing}", stacklevel=2)


def _load_cuda() -> str | None:
    """Loads the CUDA operators; returns why they could not be, or None. Asks for no GPU: CUDA stays uninitialised."""
    if missing is not None:
        return missing
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if cuda_path is None:
        return f"no CUDA library in {_FOLDER}: build it with `FASTNETS_CUDA=1 pip install .` (needs nvcc)"
    built, theirs = build.get("cuda"), torch.version.cuda
    if built is not None and _major(built) != _major(theirs):
        return (
            f"the CUDA library here is of CUDA {built} and torch {torch.__version__} of CUDA {theirs}: "
            f"install fastnets for CUDA {_major(theirs)}, or torch for CUDA {_major(built)}"
        )
    try:
        torch.ops.load_library(str(cuda_path))
    except (OSError, RuntimeError) as error:
        return f"{cuda_path.name} does not load: {error}"
    return None


def _major(version: str) -> str:
    return version.partition(".")[0]


cuda_missing: str | None = _load_cuda()
"""Why there are no CUDA operators, or None when there are. Where there are, there may still be no GPU."""


def _load_simt() -> str | None:
    """Loads the SIMT device; returns why it could not be, or None."""
    try:
        importlib.import_module("fastnets._simt")
    except ModuleNotFoundError:
        return "the SIMT device is not built: FASTNETS_SIMT=1 pip install --no-build-isolation --editable ."
    except ImportError as error:
        return f"the SIMT device does not load: {error}"
    return None


simt_missing: str | None = _load_simt()
"""Why the SIMT device is not there, or None when it is."""


CPU_CAPABILITIES = ("generic", "avx2", "avx512", "avx512_bf16")


def cpu_capability() -> str | None:
    """The instruction set of the CPU kernels, one of CPU_CAPABILITIES; None without the library."""
    return None if missing is not None else CPU_CAPABILITIES[torch.ops.fastnets.cpu_capability()]


outruns_mkl: bool = missing is None and torch.ops.fastnets.cpu_is_amd() and cpu_capability().startswith("avx512")
"""Whether torch's matrix product runs older code here than ours: MKL's for AMD's processors knows no AVX-512."""

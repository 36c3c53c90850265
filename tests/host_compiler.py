"""Compiles CUDA sources of tests/simt for the SIMT device, with the host's compiler, into build/tests; finds nvcc."""

import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
OUTPUT = HERE.parent / "build" / "tests"

DEVICE = sorted((CSRC / "simt").glob("*.cpp"))
DEVICE.remove(CSRC / "simt" / "bindings.cpp")
FLAGS = ["-std=c++20", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fvisibility=hidden"]


def compiler() -> str:
    """The host's C++ compiler; skips the test where there is none."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        pytest.skip(f"no C++ compiler {name!r} here")
    return name


def setup_module() -> dict[str, Any]:
    """What setup.py defines."""
    return runpy.run_path(str(HERE.parent / "setup.py"))


def nvcc() -> Path:
    """nvcc as the build finds it. Where there is none, the test fails: `make test` installs it."""
    found = setup_module()["find_nvcc"]()
    assert found is not None, "no nvcc: pip install -r csrc/cuda/toolchain.txt"
    return found


def outdated(target: Path) -> bool:
    """Whether a source is newer than what was built from it."""
    if not target.exists():
        return True
    sources = [path for folder in (CSRC, HERE) for path in folder.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    return target.stat().st_mtime < max(path.stat().st_mtime for path in sources)


def run(*command: object) -> None:
    """Runs a build step and shows what it says if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stderr}"


def library(name: str) -> Path:
    """tests/simt/NAME.cu with the device, as a shared library."""
    target = OUTPUT / f"lib{name}.so"
    if outdated(target):
        OUTPUT.mkdir(parents=True, exist_ok=True)
        run(
            compiler(),
            *FLAGS,
            "-O2",
            "-fPIC",
            "-shared",
            "-x",
            "c++",
            HERE / "simt" / f"{name}.cu",
            *DEVICE,
            "-o",
            target,
        )
    return target


def program(name: str, sanitizers: str) -> Path:
    """tests/simt/NAME.cu with the device, as a program under sanitizers ("address,undefined" or "thread")."""
    target = OUTPUT / f"{name}.{sanitizers.replace(',', '.')}"
    if not outdated(target):
        return target
    OUTPUT.mkdir(parents=True, exist_ok=True)
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    kernels = ["-DFASTNETS_STANDALONE", "-x", "c++", HERE / "simt" / f"{name}.cu"]
    if sanitizers != "thread":
        run(compiler(), *FLAGS, "-O1", *sanitize, *kernels, *DEVICE, "-o", target)
        return target
    # ThreadSanitizer watches the kernels; the device tells it what it has to know (csrc/simt/sanitizer.h).
    folder = OUTPUT / "thread"
    folder.mkdir(exist_ok=True)
    objects = [folder / f"{path.stem}.o" for path in (HERE / "simt" / name, *DEVICE)]
    run(compiler(), *FLAGS, "-O1", "-fno-builtin", *sanitize, *kernels, "-c", "-o", objects[0])
    for path, output in zip(DEVICE, objects[1:], strict=True):
        run(compiler(), *FLAGS, "-O2", "-DFASTNETS_SIMT_TSAN", "-c", path, "-o", output)
    run(compiler(), *sanitize, *objects, "-o", target)
    return target

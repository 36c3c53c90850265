"""Compiles CUDA sources of tests/simt for the SIMT device, with the host's compiler, into build/tests; finds nvcc."""

import contextlib
import fcntl
import os
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
OUTPUT = HERE.parent / "build" / "tests"

DEVICE = sorted((CSRC / "simt").glob("*.cpp"))
DEVICE.remove(CSRC / "simt" / "bindings.cpp")
FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fvisibility=hidden"]

# AddressSanitizer itself sees null pointers and ends of objects; UBSan's checks of them take long to compile.
_UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all"]
_ADDRESS = ["-fsanitize=address", *_UNDEFINED]
_THREAD = ["-fsanitize=thread"]
MODES = {
    "plain": (["-O1"], ["-O2"], []),
    "address": (["-O1", *_ADDRESS], ["-O1", *_ADDRESS], _ADDRESS),
    # ThreadSanitizer watches the kernels; the device tells it what it has to know (csrc/simt/sanitizer.h).
    "thread": (["-O1", "-fno-builtin", *_THREAD], ["-O2", "-DFASTNETS_SIMT_TSAN"], _THREAD),
}
"""How a program is built: flags for kernels, for the device, and to link."""


def compiler_name() -> str:
    return os.environ.get("CXX", "g++")


def compiler() -> str:
    """The host's C++ compiler, without which there is nothing to test."""
    name = compiler_name()
    if shutil.which(name) is None:
        pytest.fail(f"no C++ compiler {name!r} here: install g++ or set CXX")
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


@contextlib.contextmanager
def building_in(folder: Path) -> Iterator[None]:
    """The folder, made if need be; of several processes (the tests') one at a time is let in."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def library(name: str) -> Path:
    """tests/simt/NAME.cu with the device, as a shared library."""
    target = OUTPUT / f"lib{name}.so"
    with building_in(OUTPUT):
        if outdated(target):
            kernels = ["-x", "c++", HERE / "simt" / f"{name}.cu"]
            run(compiler(), *FLAGS, "-O2", "-fPIC", "-shared", *kernels, *DEVICE, "-o", target)
    return target


def program(name: str, mode: str) -> Path:
    """tests/simt/NAME.cu with the device, as a program built in one of MODES."""
    target, folder = OUTPUT / f"{name}.{mode}", OUTPUT / mode
    kernel_flags, device_flags, link_flags = MODES[mode]
    with building_in(folder):
        if not outdated(target):
            return target
        objects = [folder / f"{path.stem}.o" for path in (HERE / "simt" / name, *DEVICE)]
        kernels = ["-DFASTNETS_STANDALONE", "-x", "c++", HERE / "simt" / f"{name}.cu"]
        run(compiler(), *FLAGS, *kernel_flags, *kernels, "-c", "-o", objects[0])
        for path, output in zip(DEVICE, objects[1:], strict=True):
            run(compiler(), *FLAGS, *device_flags, "-c", path, "-o", output)
        run(compiler(), *link_flags, *objects, "-o", target)
    return target

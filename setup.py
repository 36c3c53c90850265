"""Builds fastnets' operator library. Metadata is in pyproject.toml.

Environment: MAX_JOBS (parallel compilers, default: the cores, one for every 2 GB of memory), CXX (the compiler),
FASTNETS_CUDA=0|1 (forces the CUDA library off or on; this release has none), FASTNETS_SIMT=1 (an editable or in-place
build gets the SIMT device too, which runs the CUDA kernels on the CPU for tests; needs pybind11).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).parent
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
# Bodies compiled once an instruction set: no trapping maths, products and sums fused.
# (g++ 12 warns of its own AVX-512 headers.)
KERNEL_FLAGS = [
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
]
INSTRUCTION_SETS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *INSTRUCTION_SETS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]
SIMT = "fastnets._simt"


def torch_folder() -> Path:
    """The installed torch, whose headers and libraries the build reads."""
    try:
        import torch
    except ImportError as error:
        raise PlatformError(
            "fastnets needs torch >= 2.10 to build. Either install it first and run pip with --no-build-isolation, "
            "or let pip fetch it into the build environment (the default)."
        ) from error
    return Path(torch.__file__).parent


def parallel_jobs() -> int:
    """How many compilers may run at once."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // (2 << 30)))


def simt_flags(compiler: str) -> tuple[str, str]:
    """How to compile and to link the SIMT device, whose module is pybind11's."""
    try:
        import pybind11
    except ImportError as error:
        raise PlatformError("FASTNETS_SIMT=1 needs pybind11: pip install pybind11") from error
    compiling = ["-DFASTNETS_LIBRARY=fastnets_simt", "-Wno-unknown-pragmas"]
    compiling += [f"-isystem {path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    # Boost.Context switches fibers where it is installed; libc's ucontext, where it is not.
    probe = ["-x", "c++", "-include", "boost/context/detail/fcontext.hpp", "-shared", "-o", os.devnull, os.devnull]
    boost = subprocess.run([compiler, *probe, "-lboost_context"], capture_output=True).returncode == 0
    if boost:
        compiling.append("-DFASTNETS_SIMT_BOOST")
    return " ".join(compiling), "-lboost_context" if boost else ""


class BuildLibrary(build_ext):
    """Builds the libraries with ninja: parallel, and incremental through the compiler's own dependency files."""

    def run(self):
        if not (self.inplace or self.editable_mode):  # never part of a wheel
            self.extensions = [ext for ext in self.extensions if ext.name != SIMT]
        super().run()

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise PlatformError(f"fastnets needs a C++20 compiler and found no {compiler!r}: install g++ or set CXX")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not pip's temporary folder: a second build compiles only what changed. (The library has no Python in it.)
        folder = ROOT.resolve() / "build" / "objects" / ("simt" if ext.name == SIMT else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(ext, compiler, target))
        try:
            command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(parallel_jobs())]
            subprocess.run([*command, "-v"] if self.verbose > 1 else command, check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"building {ext.name} failed; the compiler's message is above") from error

    def ninja_file(self, ext, compiler: str, target: Path) -> str:
        """The build: every source compiled by its rule, then one link."""
        torch = torch_folder()
        cache = "ccache " if shutil.which("ccache") else ""
        flags = [*FLAGS, f"-I{torch / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        flags += [f"-ffile-prefix-map={ROOT.resolve()}=.", "-isystem", str(torch / "include")]
        simt, libraries = simt_flags(compiler) if ext.name == SIMT else (None, "")
        lines = [
            "rule compile",
            f"  command = {cache}{compiler} -MMD -MF $out.d {' '.join(flags)} $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compiling $out",
            "rule link",
            # Only what torch already has in the process: no path to it is stored.
            f"  command = {compiler} -shared -s -o $out $in -L{torch / 'lib'} -ltorch_cpu -lc10 -pthread {libraries}",
            "  description = linking $out",
        ]
        objects = []
        for source in ext.sources:
            path = Path(source)
            # A kernel names no torch header and is compiled once an instruction set; generic comes first, so that an
            # inline function that the linker merges is taken from the version that runs everywhere.
            variants = {
                name: " ".join([*KERNEL_FLAGS, f"-DFASTNETS_ISA={name}", *extra])
                for name, extra in INSTRUCTION_SETS.items()
            }
            if path.name not in KERNELS:
                variants = {"": simt and f"{simt} -x c++"}
            for name, extra in variants.items():
                target_object = f"{path.stem}{name and '.' + name}.o"
                objects.append((0 if name in ("", "generic") else 1, target_object))
                lines.append(f"build {target_object}: compile {path.resolve()}")
                if extra is not None:
                    lines.append(f"  extra = {extra}")
        ordered = " ".join(name for _, name in sorted(objects, key=lambda item: item[0]))
        lines += [f"build {target}: link {ordered}", f"default {target}", ""]
        return "\n".join(lines)


OPERATORS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
# csrc/cpu/NAME.cpp with a NAME_op.cpp beside it is a family's kernels (NAME_*.cpp, its parts, too).
FAMILIES = [Path(source).name.removesuffix("_op.cpp") for source in OPERATORS if source.endswith("_op.cpp")]
KERNELS = {
    Path(source).name
    for source in OPERATORS
    if not source.endswith("_op.cpp") and any(Path(source).stem.split("_")[0] == family for family in FAMILIES)
}

EXTENSIONS = [Extension("fastnets._C", sources=["csrc/ops.cpp", *OPERATORS], py_limited_api=True)]
if os.environ.get("FASTNETS_SIMT") == "1":
    sources = [path for pattern in ("cuda/*.cu", "cuda/*.cpp", "simt/*.cpp") for path in (ROOT / "csrc").glob(pattern)]
    EXTENSIONS.append(Extension(SIMT, ["csrc/ops.cpp", *sorted(str(path.relative_to(ROOT)) for path in sources)]))

setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

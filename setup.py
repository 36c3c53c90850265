"""Builds fastnets' operator libraries. Metadata is in pyproject.toml.

Environment: MAX_JOBS (parallel compilers, default: the cores, one for every 2 GB of memory), CXX (the compiler),
FASTNETS_CUDA=0|1 (the CUDA library: not built, or an error where it cannot be; by default built where torch is a CUDA
build and nvcc is found), CUDA_HOME (whose bin/nvcc to use; by default that of the Python packages in
csrc/cuda/toolchain.txt, then PATH's), TORCH_CUDA_ARCH_LIST (its architectures, "8.0 9.0+PTX"), FASTNETS_SIMT=1 (an
editable or in-place build gets the SIMT device too, which runs the CUDA kernels on the CPU for tests; needs pybind11).
ccache is used where it is installed.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

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
    INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]
FAMILIES_OF = {"avx512_bf16": ("attention", "recurrent")}
"""The families that an instruction set has kernels for, where not all."""
SIMT = "fastnets._simt"
CUDA = "fastnets._C_cuda"
CUDA_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
RECORD = "_build.json"
"""Beside the libraries: what they were built from and with."""
OUT_OF_MEMORY = re.compile(r"Killed|signal 9|out of memory|memory exhausted|Cannot allocate memory")
"""What compilers say, or the shell of them."""
CUDA_TOOLCHAIN = "a CUDA toolkit with CUDA_HOME set, or `pip install -r csrc/cuda/toolchain.txt`"


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


def find_nvcc() -> Path | None:
    """nvcc: CUDA_HOME's, that of the Python packages, or PATH's."""
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.exists():
            raise PlatformError(f"CUDA_HOME is {home}, but there is no {nvcc}: set it to a CUDA toolkit, or unset it")
        return nvcc
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        for nvcc in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True):
            root = nvcc.parents[1]
            needed = ("nvvm/bin/cicc", "include/crt/host_config.h", "lib/libcudart_static.a", "include/cccl/cuda/std")
            if lacking := [name for name in needed if not (root / name).exists()]:
                raise PlatformError(f"{root} lacks {', '.join(lacking)}: pip install -r csrc/cuda/toolchain.txt")
            return nvcc
    found = shutil.which("nvcc")
    return Path(found) if found else None


def cuda_version(nvcc: Path) -> str:
    """13.0, say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", said.stdout)
    if found is None:
        raise PlatformError(f"{nvcc} --version fails: {said.stderr or said.stdout}")
    return found[1]


def commit() -> str | None:
    """That of the checkout, `-dirty` where files differ; None elsewhere, in a source archive say."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout that it does not trust
        return None


def wants_cuda() -> bool:
    """Whether the CUDA library is to be built."""
    choice = os.environ.get("FASTNETS_CUDA") or "auto"
    if choice not in ("0", "1", "auto"):
        raise PlatformError(f"FASTNETS_CUDA: expected 0 or 1, got {choice!r}")
    if choice != "auto":
        return choice == "1"
    torch_folder()
    import torch

    return torch.version.cuda is not None and find_nvcc() is not None


def cuda_architectures(nvcc: Path) -> list[str]:
    """The architectures to compile for, as nvcc's options."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = re.findall(r"compute_(\w+)", listed.stdout)
    if listed.returncode or not known:
        raise PlatformError(f"{nvcc} --list-gpu-arch fails: {listed.stderr or listed.stdout}")
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    options = []
    for name in re.split(r"[\s;,]+", (asked or CUDA_ARCHITECTURES).strip("; ,")):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None or int(parts[1]) < 8:
            raise PlatformError(
                f"TORCH_CUDA_ARCH_LIST: expected numbers from 8.0 on such as {CUDA_ARCHITECTURES!r}, got {name!r}"
            )
        if parts[1] + parts[2] not in known:
            if asked is None:  # an older nvcc: what it knows of the default
                continue
            raise PlatformError(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {name}; it knows {', '.join(known)}")
        number = parts[1] + parts[2] + parts[3]
        codes = f"[sm_{number},compute_{number}]" if parts[4] else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={codes}")
    return options


def cuda_library_folders(nvcc: Path) -> list[str]:
    """Where the CUDA runtime's library may lie: what nvcc links with, and the Python packages' folder."""
    said = subprocess.run([nvcc, "--dryrun", "-shared", "none.o"], capture_output=True, text=True).stderr
    named = re.search(r"LIBRARIES=(.*)", said)
    return [*re.findall(r'"-L([^"]+)"', named[1] if named else ""), str(nvcc.parents[1] / "lib")]


class Recipe(NamedTuple):
    """What parts the build of one library from another's."""

    compile: tuple[str, ...] = ()
    """The C++ compiler's options besides the common ones."""
    cuda: tuple[str, ...] = ()
    """How CUDA sources are compiled, where not as C++."""
    link: tuple[str, ...] = ()
    """What to link with, and its options, besides the common ones."""
    objects: str = ""
    """The folder of its objects."""


def simt_recipe(compiler: str) -> Recipe:
    """The SIMT device, whose module is pybind11's."""
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
    return Recipe((*compiling, "-x c++"), (), ("-lboost_context",) if boost else (), "simt")


def cuda_recipe(compiler: str) -> Recipe:
    """The CUDA library: kernels by nvcc, operators by the C++ compiler, the CUDA runtime inside."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise PlatformError(f"FASTNETS_CUDA=1 needs nvcc: install {CUDA_TOOLCHAIN}")
    architectures = cuda_architectures(nvcc)
    host = ",".join(flag for flag in FLAGS if flag.startswith("-f"))
    command = [str(nvcc), f"-ccbin={compiler}", "-std=c++20", "-O3", "-Xfatbin=-compress-all", *architectures]
    command.append(f"-Xcompiler={host},-ffile-prefix-map={ROOT.resolve()}=.")
    # A CUDA build's libtorch.so brings in libtorch_cuda.so; that of a CPU build, against which this links as well, does
    # not. Asked for by name it would tie the library to the former.
    linking = ["-Wl,--no-as-needed,-ltorch,--as-needed,--exclude-libs,ALL"]
    linking += [f"-L{folder}" for folder in cuda_library_folders(nvcc)]
    linking += ["-lcudart_static", "-ldl", "-lrt"]
    numbers = "-".join(re.findall(r"code=\[?sm_(\w+)", " ".join(architectures)))
    return Recipe(("-DUSE_CUDA",), tuple(command), tuple(linking), f"cuda/{numbers}")


class BuildLibrary(build_ext):
    """Builds the libraries with ninja: parallel, and incremental through the compiler's own dependency files."""

    def run(self):
        left_out = set()
        if not (self.inplace or self.editable_mode):  # never part of a wheel
            left_out.add(SIMT)
        if not wants_cuda():
            left_out.add(CUDA)
        self.extensions = [ext for ext in self.extensions if ext.name not in left_out]
        super().run()
        record = Path(self.get_ext_fullpath("fastnets._C")).with_name(RECORD)
        record.write_text(json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, str | None]:
        """What is built here."""
        nvcc = find_nvcc() if any(ext.name == CUDA for ext in self.extensions) else None
        import torch

        return {
            "version": self.distribution.get_version(),
            "commit": commit(),
            "torch": torch.__version__.partition("+")[0],
            "cuda": nvcc and cuda_version(nvcc),
            "cuda_architectures": nvcc and (os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES),
        }

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise PlatformError(f"fastnets needs a C++20 compiler and found no {compiler!r}: install g++ or set CXX")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        recipes = {SIMT: simt_recipe, CUDA: cuda_recipe}
        recipe = recipes[ext.name](compiler) if ext.name in recipes else Recipe()
        # Not pip's temporary folder: a second build compiles only what changed. (The library has no Python in it.)
        folder = ROOT.resolve() / "build" / "objects" / recipe.objects
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(ext, compiler, recipe, target))
        jobs = parallel_jobs()
        command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(jobs), *["-v"] * (self.verbose > 1)]
        killed = False
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ninja:
            for line in ninja.stdout:
                print(line, end="", flush=True)
                killed = killed or OUT_OF_MEMORY.search(line) is not None
        if ninja.returncode and killed:
            raise CompileError(
                f"building {ext.name} failed: a compiler ran out of memory. {jobs} ran at once: set MAX_JOBS to fewer, "
                "or free memory; what is built is kept."
            )
        if ninja.returncode:
            raise CompileError(f"building {ext.name} failed; the compiler's message is above")

    def ninja_file(self, ext, compiler: str, recipe: Recipe, target: Path) -> str:
        """The build: every source compiled by its rule, then one link."""
        torch = torch_folder()
        cache = "ccache " if shutil.which("ccache") else ""
        flags = [*FLAGS, f"-I{torch / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        flags += [
            f"-ffile-prefix-map={torch}=torch",
            f"-ffile-prefix-map={ROOT.resolve()}=.",
            "-isystem",
            str(torch / "include"),
            *recipe.compile,
        ]
        libraries = ["-ltorch_cpu", "-lc10", "-pthread", *recipe.link]
        commands = {"compile": (compiler, *flags, "$extra"), "compile_cuda": recipe.cuda}
        lines = []
        for rule, (program, *options) in ((rule, command) for rule, command in commands.items() if command):
            lines += [
                f"rule {rule}",
                f"  command = {cache}{program} -MMD -MF $out.d {' '.join(options)} -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = compiling $out",
            ]
        strip = "" if ext.name == SIMT else "-s "  # `inspect` reads the names of its kernels
        lines += [
            "rule link",
            # Only what torch already has in the process: no path to it is stored.
            f"  command = {compiler} -shared {strip}-o $out $in -L{torch / 'lib'} {' '.join(libraries)}",
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
                if path.stem.split("_")[0] in FAMILIES_OF.get(name, FAMILIES)
            }
            rule = "compile_cuda" if recipe.cuda and path.suffix == ".cu" else "compile"
            if path.name not in KERNELS:
                variants = {"": ""}
            for name, extra in variants.items():
                target_object = f"{path.stem}{name and '.' + name}.o"
                objects.append((0 if name in ("", "generic") else 1, target_object))
                lines += [f"build {target_object}: {rule} {path.resolve()}", f"  extra = {extra}"]
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

CSRC = ROOT / "csrc"
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for end in ("cu", "cpp") for path in (CSRC / "cuda").glob(f"*.{end}"))
SIMT_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (CSRC / "simt").glob("*.cpp"))

EXTENSIONS = [
    Extension("fastnets._C", ["csrc/ops.cpp", *OPERATORS], py_limited_api=True),
    Extension(CUDA, CUDA_SOURCES, py_limited_api=True),
]
if os.environ.get("FASTNETS_SIMT") == "1":
    EXTENSIONS.append(Extension(SIMT, ["csrc/ops.cpp", *CUDA_SOURCES, *SIMT_SOURCES]))

if __name__ == "__main__":  # tests build parts of it
    setup(
        ext_modules=EXTENSIONS,
        cmdclass={"build_ext": BuildLibrary},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )

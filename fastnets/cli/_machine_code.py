"""What nvcc made of the kernels: machine code from the built library or compiled for the purpose, read and counted.

NVIDIA's cuobjdump and nvdisasm print resources and instructions; both are Python packages too, and need no GPU.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import UsageError

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "inspect"

_TENSOR = frozenset(
    (
        "BMMA",
        "DMMA",
        "HMMA",
        "IMMA",
        "OMMA",
        "QMMA",
        "HGMMA",
        "IGMMA",
        "QGMMA",
        "UTCHMMA",
        "UTCIMMA",
        "UTCOMMA",
        "UTCQMMA",
    )
)
_ASYNC = frozenset(("LDGSTS", "UBLKCP", "UTMALDG"))
_MEMORY = frozenset(("LDG", "LDS", "LDSM", "LDGSTS", "STG", "STS", "RED", "ATOMG"))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's machine code for one architecture; counts are of instructions in the code."""

    family: str
    """The source's: attention for attention_backward.cu."""
    signature: str
    """The function without its namespaces: what tells it from every other."""
    arch: str
    registers: int
    stack: int
    """Bytes."""
    static_shared: int
    """Bytes."""
    instructions: int
    spill_loads: int
    """LDL: spilled registers, or arrays that could not be kept in registers."""
    spill_stores: int
    loop_instructions: int
    """Of the main loop; of the whole kernel where nothing loops."""
    tensor: int
    """Tensor-core instructions in the main loop, and so on."""
    async_copies: int
    ldsm: int
    special: int
    """MUFU: exponentials, reciprocals."""

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.family}::{self.signature.split('(')[0]}"

    @property
    def spills(self) -> int:
        return self.spill_loads + self.spill_stores


# Names.


@functools.cache
def _demangler():
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_void_p
    return function


@functools.cache
def demangled(symbol: str) -> str:
    """A C++ symbol's source form; the symbol itself where it is none."""
    status = ctypes.c_int()
    text = _demangler()(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    try:
        return ctypes.string_at(text).decode()
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(text))


def signature(symbol: str) -> str:
    """A kernel's name, template arguments and parameters: the same from nvcc and from the host's compiler."""
    text = demangled(symbol.replace("DF16_", "Dh"))  # g++'s _Float16, which not every demangler knows, as its `half`
    text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
    text = re.sub(r"\b_GLOBAL__N_\w*::|\bfastnets::(?:cuda::)?", "", text)
    text = re.sub(r"\((?:\w|::)+\)(?=\d)", "", text)  # an enumerator is a number of its type
    return re.sub(r"\b(?:__)?half\b", "Float16", text.replace("__nv_bfloat16", "BFloat16"))


def _family(symbol: str) -> str:
    """From the name that nvcc gives a file's anonymous namespace."""
    file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", symbol)
    return file.group(1).split("_")[0] if file else "?"


# Tools.


def _packages_folder(tool: str) -> Path | None:
    """The newest nvidia/cu*/bin of the Python packages that has a tool."""
    packages = Path(sysconfig.get_path("platlib")) / "nvidia"
    return next((path.parent for path in sorted(packages.glob(f"cu*/bin/{tool}"), reverse=True)), None)


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: that of the Python packages, or PATH's.

    Raises:
        UsageError: there is none.
    """
    folder = _packages_folder(name)
    found = folder / name if folder else shutil.which(name)
    if found is None:
        raise UsageError(f"no {name} here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return str(found)


def _run(*command: str | Path) -> str:
    environment = os.environ | {"NVDISASM_PATH": str(Path(tool("nvdisasm")).parent)}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UsageError(f"{Path(command[0]).name} fails: {said[0] if said else done.returncode}")
    return done.stdout


# Sources of machine code.


def architectures(library: Path) -> list[str]:
    """Those that a library has machine code for."""
    listed = re.findall(r"\.(sm_\d+\w?)\.cubin", _run(tool("cuobjdump"), "-lelf", library))
    return sorted(set(listed), key=lambda name: int(re.sub(r"\D", "", name)))


def nvcc() -> Path:
    """nvcc as the build finds it.

    Raises:
        UsageError: this is no checkout, or there is no nvcc.
    """
    if not (ROOT / "setup.py").exists():
        raise UsageError("--build needs the sources: run it in a checkout")
    found = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()
    if found is None:
        raise UsageError("no nvcc here: pip install -r csrc/cuda/toolchain.txt")
    return found


def version(compiler: Path) -> str:
    """nvcc's release, "13.0.88"."""
    return re.search(r"\bV(\d+\.\d+\.\d+)", _run(compiler, "--version")).group(1)


def sources(families: Sequence[str] | None = None) -> list[Path]:
    """The CUDA sources, or those of some families."""
    paths = sorted((CSRC / "cuda").glob("*.cu"))
    return [path for path in paths if not families or path.stem.split("_")[0] in families]


def included(source: Path) -> set[Path]:
    """The files of csrc that a source includes, and it itself."""
    found: set[Path] = set()
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            candidates = ((folder / name).resolve() for folder in (path.parent, CSRC))
            waiting += [candidate for candidate in candidates if candidate.exists()][:1]
    return found


def compiled(source: Path, arch: str, compiler: Path) -> Path:
    """A source's cubin, from the cache where neither sources nor compiler have changed."""
    read = hashlib.sha256(version(compiler).encode())
    for path in sorted(included(source)):
        read.update(path.read_bytes())
    target = CACHE / f"{source.stem}.{arch}.{read.hexdigest()[:16]}.cubin"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{source.stem}.{arch}.*.cubin"):
            old.unlink(missing_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        number = arch.removeprefix("sm_")
        code = f"-gencode=arch=compute_{number},code={arch}"
        _run(compiler, "-std=c++20", "-O3", code, "-cubin", "-o", unfinished, source)
        unfinished.rename(target)
    return target


# Reading.


def read(binary: Path, arch: str) -> list[Kernel]:
    """Every kernel of a cubin, or of a library for one architecture."""
    text = _run(tool("cuobjdump"), "-arch", arch, "-res-usage", "-sass", binary)
    usage = {
        symbol: tuple(map(int, figures))
        for symbol, *figures in re.findall(r"Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    }
    return [_kernel(symbol, arch, usage[symbol], code) for symbol, code in _functions(text) if symbol in usage]


Instruction = tuple[int, str, int | None]
"""Address, opcode without its modifiers, and where it branches to."""

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([^;]*);", re.MULTILINE)


def _functions(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    for part in re.split(r"^\s+Function : ", text, flags=re.MULTILINE)[1:]:
        symbol, _, body = part.partition("\n")
        code = []
        for address, opcode, rest in _INSTRUCTION.findall(body):
            target = re.findall(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else []
            code.append((int(address, 16), opcode, int(target[-1], 16) if target else None))
        yield symbol.strip(), code


def _kernel(symbol: str, arch: str, usage: tuple[int, ...], code: list[Instruction]) -> Kernel:
    loop = Counter(opcode for _, opcode, _ in main_loop(code))
    whole = Counter(opcode for _, opcode, _ in code if opcode != "NOP")
    return Kernel(
        family=_family(symbol),
        signature=signature(symbol),
        arch=arch,
        registers=usage[0],
        stack=usage[1],
        static_shared=_own_shared(usage[2], arch),
        instructions=whole.total(),
        spill_loads=whole["LDL"],
        spill_stores=whole["STL"],
        loop_instructions=loop.total(),
        tensor=_count(loop, _TENSOR),
        async_copies=_count(loop, _ASYNC),
        ldsm=loop["LDSM"],
        special=loop["MUFU"],
    )


def _own_shared(reported: int, arch: str) -> int:
    """Shared memory without the system's part, which cubins count from 9.0 on for every kernel that has some."""
    return reported - 1024 if reported and int(re.sub(r"\D", "", arch)) >= 90 else reported


def _count(opcodes: Counter, which: frozenset[str]) -> int:
    return sum(opcodes[opcode] for opcode in which)


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most tensor-core instructions; without any, with the most accesses to memory.

    A loop is what lies between a backward branch and its target. Everything, where there is none, or where no loop has
    any of the tensor-core instructions.
    """
    spans = {(target, address) for address, _, target in code if target is not None and target < address}
    loops = [(span, [i for i in code if span[0] <= i[0] <= span[1]]) for span in spans]
    for which in (_TENSOR, _MEMORY):
        weighed = [(sum(opcode in which for _, opcode, _ in body), span, body) for span, body in loops]
        weighed = [entry for entry in weighed if entry[0] > 0]
        innermost = [
            entry
            for entry in weighed
            if not any(_inside(other[1], entry[1]) for other in weighed if other is not entry)
        ]
        if innermost:
            return max(innermost, key=lambda entry: (entry[0], len(entry[2]), entry[1]))[2]
        if any(opcode in which for _, opcode, _ in code):
            break
    return code


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]

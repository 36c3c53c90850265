"""What is shipped: the library's symbols, the wheel's and the source archive's contents."""

import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import host_compiler
import pytest
from setuptools import Distribution, Extension
from setuptools.errors import PlatformError

from fastnets import _library

ROOT = Path(__file__).parents[1]

# What the library may ask of others: the stable C shims of torch, versioned symbols of the C and C++ run-time
# libraries, the C++ library's unversioned ones, and what the linker's start-up code asks for.
ALLOWED = re.compile(
    r"(aoti_torch_|torch_)\w+$"
    r"|\w+@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"
    r"|_Z(N[KRO]*S[ast]|S[ast]|T[ISV]N?S[ast])\w+$"
    r"|(_ITM_\w+|__gmon_start__)$"
)


def _run(*command: str | Path, **more) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _setup(*arguments: str | Path) -> None:
    _run(sys.executable, "-W", "ignore", "setup.py", "--quiet", *arguments, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ("build", "--build-base", folder / "build")
    _setup("egg_info", "--egg-base", folder, *build, "bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "b")
    return next(folder.glob("*.whl"))


def test_rule_knows_foreign_symbols():
    for name in ("PyInit__C", "_ZN2at6TensorC1Ev", "_ZN3c106detail14torchCheckFailEv", "_ZNK5torch3foo", "cblas_sgemm"):
        assert not ALLOWED.match(name)
    for name in ("aoti_torch_get_dim", "memcpy@GLIBC_2.14", "_ZNSt8ios_base4InitC1Ev@GLIBCXX_3.4", "__gmon_start__"):
        assert ALLOWED.match(name)


def _check_library(path: Path) -> None:
    """It asks only for the stable interface, depends on no Python and no CUDA, and holds no path of this machine."""
    lines = _run("nm", "-D", "--undefined-only", path).splitlines()
    names = [line.split()[-1] for line in lines]
    assert "torch_library_impl" in names
    assert [name for name in names if not ALLOWED.match(name)] == []
    needed = re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-d", path))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search("python|cuda", name)]
    assert str(ROOT).encode() not in path.read_bytes()


def test_library():
    _check_library(_library.path)


def _device_code(library: Path) -> set[tuple[str, int]]:
    """("ptx" or "elf", architecture) of what a CUDA library holds, as its fat binaries' headers say."""
    data, found = library.read_bytes(), set()
    for header in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), data):
        at = header.end() + 8
        end = at + struct.unpack_from("<Q", data, header.end())[0]
        while at < end:
            kind, _, size, payload = struct.unpack_from("<HHIQ", data, at)
            found.add((("ptx", "elf")[kind - 1], struct.unpack_from("<I", data, at + 28)[0]))
            at += size + payload
    return found


def test_cuda_library(tmp_path, monkeypatch):
    build = host_compiler.setup_module()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    monkeypatch.setenv("FASTNETS_CUDA", "1")
    sources = ["csrc/cuda/softmax.cu", "csrc/cuda/softmax_op.cpp"]
    extension = Extension("fastnets._C_cuda", sources, py_limited_api=True)
    made = Distribution({"ext_modules": [extension], "cmdclass": {"build_ext": build["BuildLibrary"]}})
    made.command_options["build_ext"] = {"build_lib": ("test", str(tmp_path))}
    monkeypatch.chdir(ROOT)
    host_compiler.nvcc()
    made.run_command("build_ext")
    library = tmp_path / "fastnets" / "_C_cuda.abi3.so"
    _check_library(library)
    assert _device_code(library) == {("elf", 90), ("ptx", 90)}
    # It loads beside a CPU build of torch, too, and brings the operators for CUDA tensors.
    code = (
        "import sys, torch, fastnets\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print([has(f'fastnets::{name}', 'CUDA') for name in ('softmax_forward', 'softmax_backward', 'conv_forward')])"
    )
    if _library.cuda_missing is not None:  # else it is there already
        assert _run(sys.executable, "-c", code, library).strip() == "[True, True, False]"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CUDA_HOME": "/no/such/toolkit"}, "CUDA_HOME is /no/such/toolkit, but there is no .*: set it to"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;7.5"}, "numbers from 8.0 on such as .*, got '7.5'"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "got 'Hopper'"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 31.4+PTX"}, r"does not know 31.4\+PTX; it knows .*80,"),
        ({"FASTNETS_CUDA": "yes"}, "FASTNETS_CUDA: expected 0 or 1, got 'yes'"),
    ],
)
def test_mistakes_in_the_environment(monkeypatch, variables, message):
    build = host_compiler.setup_module()
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "FASTNETS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlatformError, match=message):
        build["wants_cuda"]() or build["cuda_recipe"]("g++")


def test_no_nvcc(monkeypatch):
    build = host_compiler.setup_module()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("FASTNETS_CUDA", "1")
    assert build["wants_cuda"]()
    with pytest.raises(PlatformError, match=r"needs nvcc: install .*csrc/cuda/toolchain.txt"):
        build["cuda_recipe"]("g++")


def test_cuda_is_built_where_torch_has_it(monkeypatch):
    wants = host_compiler.setup_module()["wants_cuda"]
    host_compiler.nvcc()
    monkeypatch.delenv("FASTNETS_CUDA", raising=False)
    for version in ("13.0", None):
        monkeypatch.setattr("torch.version.cuda", version)
        assert wants() == (version is not None)
    monkeypatch.setenv("FASTNETS_CUDA", "0")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert not wants()


def test_wheel_is_for_every_python(wheel):
    assert "-cp310-abi3-" in wheel.name


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "fastnets/_C.abi3.so" in names
    for source, package in (("fastnets", "fastnets"), ("kernels", "fastnets/kernels"), ("bench", "fastnets/bench")):
        files = {path.relative_to(ROOT / source).as_posix() for path in (ROOT / source).rglob("*.py")}
        assert files
        assert {f"{package}/{name}" for name in files} <= names


def test_wheel_runs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch, fastnets, fastnets.bench, fastnets.kernels\n"
        "from fastnets import _library, functional\n"
        "with fastnets.backend('cpu'):\n"
        "    functional.softmax(torch.ones(2, 3), -1)\n"
        "print(_library.path)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    out = _run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path, env=environment)
    assert out.strip() == str(tmp_path / "fastnets" / "_C.abi3.so")


def test_source_archive_can_be_built(tmp_path):
    _setup("egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[-1] for name in opened.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert len(sources) > 10
    assert sources | {"setup.py", "pyproject.toml", "kernels/__init__.py", "bench/measure.py", "LICENSE"} <= names

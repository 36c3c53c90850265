"""What is shipped: the library's symbols, the wheel's and the source archive's contents."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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


def test_library_asks_only_for_the_stable_interface():
    lines = _run("nm", "-D", "--undefined-only", _library.path).splitlines()
    names = [line.split()[-1] for line in lines]
    assert "torch_library_impl" in names
    assert [name for name in names if not ALLOWED.match(name)] == []


def test_library_depends_on_no_python():
    needed = re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-d", _library.path))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name]


def test_library_holds_no_path_of_this_machine():
    assert str(ROOT).encode() not in _library.path.read_bytes()


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

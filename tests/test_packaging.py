"""What is shipped: the library's symbols, the wheel's and the source archive's contents."""

import fcntl
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import host_compiler
import pytest
import torch
from setuptools import Distribution, Extension
from setuptools.errors import CompileError, PlatformError

from fastnets import _library
from fastnets.cli import UsageError, main, wheel_check

ROOT = Path(__file__).parents[1]


def _run(*command: str | Path, **more) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _setup(*arguments: str | Path) -> None:
    """Runs setup.py, one at a time: builds share the folder of objects, archives are made in the root."""
    lock = ROOT / "build" / "tests.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        _run(sys.executable, "-W", "ignore", "setup.py", "--quiet", *arguments, cwd=ROOT)


def _build_wheel(folder: Path) -> Path:
    build = ("build", "--build-base", folder / "build")
    _setup(
        *("egg_info", "--egg-base", folder, "--tag-build", "+cpu", *build),
        *("bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "b"),
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patch.setenv("FASTNETS_CUDA", "0")
        return _build_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_is_the_same_twice(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("FASTNETS_CUDA", "0")
    assert _build_wheel(tmp_path).read_bytes() == wheel.read_bytes()


def _findings(wheel: Path) -> dict[str, wheel_check.Finding]:
    return {finding.check: finding for finding in wheel_check.check(wheel)}


def test_wheel_check(wheel, capsys):
    """It has nothing to object to but the tag, which only auditwheel changes."""
    found = _findings(wheel)
    assert [check for check, finding in found.items() if not finding.good] == ["platform"]
    assert {"contents", "libraries", "_C needs", "_C symbols", "torch-abi-audit", "abi3audit"} <= found.keys()
    assert main(["wheel-check", str(wheel)]) == 1
    assert re.search(r"BAD +platform +linux_\w+: not manylinux", capsys.readouterr().out)


def _changed(wheel: Path, folder: Path, change, name: str | None = None) -> Path:
    """A copy, `change(name, bytes)` of each file; None leaves a file out."""
    copy = folder / (name or wheel.name)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(copy, "w") as new:
        for entry in old.namelist():
            data = change(entry, old.read(entry))
            if data is not None:
                new.writestr(entry, data)
    return copy


def test_wheel_check_names_what_is_wrong(wheel, tmp_path):
    def without_record(name, data):
        return None if name.endswith("_build.json") else data

    def other_bytes(name, data):
        return data + b"#" if name == "fastnets/convert.py" else data

    def foreign_library(name, data):
        return data.replace(b"libc10.so\0", b"libc11.so\0") if name.endswith("_C.abi3.so") else data

    def foreign_symbol(name, data):
        return data.replace(b"aoti_torch_get_dim\0", b"aoti_other_get_dim\0") if name.endswith("_C.abi3.so") else data

    def same(name, data):
        return data

    found = _findings(_changed(wheel, tmp_path, without_record))
    assert "fastnets/_build.json" in found["contents"].text
    assert not found["build"].good
    found = _findings(_changed(wheel, tmp_path, other_bytes))
    assert (found["contents"].good, found["contents"].text) == (False, "not as recorded: fastnets/convert.py")
    assert _findings(_changed(wheel, tmp_path, foreign_library))["_C needs"] == ("_C needs", False, "libc11.so")
    found = _findings(_changed(wheel, tmp_path, foreign_symbol))
    assert (found["_C symbols"].good, found["_C symbols"].text) == (False, "aoti_other_get_dim")
    found = _findings(_changed(wheel, tmp_path, same, wheel.name.replace("cp310-abi3", "cp311-cp311")))
    assert not found["tags"].good
    assert not found["metadata"].good
    cuda = wheel.name.replace("+cpu", "+cu130")

    with pytest.raises(UsageError, match=r"it has no fastnets-.*cu130.dist-info/METADATA"):
        _findings(_changed(wheel, tmp_path, same, cuda))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.whl", None, "there is no file"),
        ("text.whl", b"text", "is not a wheel: not a zip archive"),
        ("other-1.0-py3-none-any.whl", b"PK\x05\x06" + bytes(18), "expected fastnets-VERSION"),
        (
            "fastnets-1.0-cp310-abi3-linux_x86_64.whl",
            b"PK\x05\x06" + bytes(18),
            "it has no fastnets-1.0.dist-info/METADATA",
        ),
    ],
)
def test_wheel_check_of_what_is_none(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["wheel-check", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_a_library_of_another_cuda_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "missing", None)
    monkeypatch.setattr(_library, "cuda_path", tmp_path / "_C_cuda.abi3.so")
    monkeypatch.setattr(_library, "build", {"cuda": "13.0"})
    monkeypatch.setattr("torch.version.cuda", "12.8")
    reason = _library._load_cuda()
    assert re.search(
        r"is of CUDA 13.0 and torch .* of CUDA 12.8: install fastnets for CUDA 12, or torch for CUDA 13", reason
    )
    monkeypatch.setattr("torch.version.cuda", "13.2")
    assert "does not load" in _library._load_cuda()


def test_a_compiler_that_runs_out_of_memory(monkeypatch, tmp_path, capfd):
    build = host_compiler.setup_module()
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'g++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MAX_JOBS", "2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(build, "ROOT", tmp_path)
    (tmp_path / "a.cpp").touch()
    made = Distribution(
        {"ext_modules": [Extension("fastnets._C", ["a.cpp"])], "cmdclass": {"build_ext": build["BuildLibrary"]}}
    )
    monkeypatch.setenv("FASTNETS_CUDA", "0")
    with pytest.raises(CompileError, match=r"ran out of memory. 2 ran at once: set MAX_JOBS to fewer"):
        made.run_command("build_ext")
    assert "Killed" in capfd.readouterr().out


def test_rule_knows_foreign_symbols():
    for name in ("PyInit__C", "_ZN2at6TensorC1Ev", "_ZN3c106detail14torchCheckFailEv", "_ZNK5torch3foo", "cblas_sgemm"):
        assert not wheel_check.ALLOWED_SYMBOLS.match(name)
    for name in ("aoti_torch_get_dim", "_ZNSt8ios_base4InitC1Ev", "__gmon_start__"):
        assert wheel_check.ALLOWED_SYMBOLS.match(name)
    for name in ("libtorch_cuda.so", "libcudart.so.13", "libpython3.11.so.1.0", "libgomp.so.1", "libtorch_python.so"):
        assert not wheel_check.ALLOWED_LIBRARIES.fullmatch(name)


def _check_library(path: Path) -> None:
    """It asks only for the stable interface, depends on no Python and no CUDA, and holds no path of this machine."""
    needed, foreign = wheel_check.asks(path)
    assert foreign == []
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not wheel_check.ALLOWED_LIBRARIES.fullmatch(name)] == []
    for folder in (ROOT, Path(torch.__file__).parent):
        assert str(folder).encode() not in path.read_bytes()


def test_library():
    _check_library(_library.path)


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
    assert wheel_check.device_code(library) == {("elf", 90), ("ptx", 90)}
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

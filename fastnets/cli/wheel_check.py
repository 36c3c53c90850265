"""`fastnets wheel-check`: whether a wheel of fastnets holds what its name says and runs where its tags say."""

import argparse
import base64
import csv
import hashlib
import importlib.util
import io
import json
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from . import UsageError
from ._common import console

LIMIT = 100e6
"""Bytes that a package index takes."""

ALLOWED_LIBRARIES = re.compile(
    r"libtorch(_cpu)?\.so|libc10\.so|lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d|ld-linux-[\w-]+\.so\.\d"
)
ALLOWED_SYMBOLS = re.compile(
    r"(aoti_torch_|torch_)\w+$"  # torch's stable C interface
    r"|_Z(N[KRO]*S[ast]|S[ast]|T[ISV]N?S[ast])\w+$"  # the C++ library's without a version
    r"|(_ITM_\w+|__gmon_start__)$"  # of the linker's start-up code
)
"""What a library may ask of others besides versioned symbols of the C and C++ run-time libraries."""
ALLOWED_VERSIONS = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")


class Finding(NamedTuple):
    """One line of the answer."""

    check: str
    good: bool
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 0 all is well, 1 something is not. Needs pip install 'fastnets[wheel]'."
    parser.add_argument("file", type=Path, metavar="FILE", help="a wheel, fastnets-*.whl")


def run(args: argparse.Namespace) -> int:
    for module in ("elftools", "torch_abi_audit", "abi3audit"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"no {module} here: pip install 'fastnets[wheel]'")
    if not args.file.is_file():
        raise UsageError(f"there is no file {args.file}")
    if not zipfile.is_zipfile(args.file):
        raise UsageError(f"{args.file} is not a wheel: not a zip archive")
    findings = list(check(args.file))
    table = Table(title=args.file.name, title_justify="left", box=None)
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(
            "ok" if finding.good else "BAD", finding.check, finding.text, style=None if finding.good else "red"
        )
    console().print(table)
    return 0 if all(finding.good for finding in findings) else 1


def check(wheel: Path) -> Iterator[Finding]:
    """Everything that `wheel-check` says of a wheel.

    Raises:
        UsageError: the file is no wheel of fastnets.
    """
    name = re.fullmatch(r"fastnets-([^-]+)-([^-]+)-([^-]+)-([^-]+)\.whl", wheel.name)
    if name is None:
        raise UsageError(f"{wheel.name}: expected fastnets-VERSION-PYTHON-ABI-PLATFORM.whl")
    version, python, abi, platform = name.groups()
    yield Finding("size", wheel.stat().st_size < LIMIT, f"{wheel.stat().st_size / 1e6:.1f} MB, limit {LIMIT / 1e6:.0f}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        root = Path(folder)
        archive.extractall(root)
        info = f"fastnets-{version}.dist-info"
        if lacking := {f"{info}/{part}" for part in ("RECORD", "METADATA", "WHEEL")} - set(archive.namelist()):
            raise UsageError(f"{wheel.name} is not a wheel of its name: it has no {', '.join(sorted(lacking))}")
        yield _contents(archive, info)
        yield Finding("tags", (python, abi) == ("cp310", "abi3"), f"{python}-{abi}: CPython 3.10 and newer")
        yield Finding(
            "platform", "manylinux" in platform, f"{platform}{'' if 'manylinux' in platform else ': not manylinux'}"
        )
        yield _metadata(archive, info, version, f"{python}-{abi}-")
        yield from _libraries(root, version)
        yield _audit("torch-abi-audit", "--check", "torch", *map(str, sorted(root.rglob("*.so"))))
        yield _audit("abi3audit", "--strict", "--summary", str(wheel))


def _contents(archive: zipfile.ZipFile, info: str) -> Finding:
    """Every file is there and has the hash that RECORD states."""
    recorded = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode())) if row}
    files = {entry.filename for entry in archive.infolist() if not entry.is_dir()}
    wrong = sorted(files ^ recorded.keys())
    for name in files & recorded.keys():
        method, _, expected = recorded[name].partition("=")
        if expected:
            digest = base64.urlsafe_b64encode(hashlib.new(method, archive.read(name)).digest()).rstrip(b"=").decode()
            wrong += [name] if digest != expected else []
    text = f"{len(files)} files, as recorded" if not wrong else f"not as recorded: {', '.join(wrong)}"
    return Finding("contents", not wrong, text)


def _metadata(archive: zipfile.ZipFile, info: str, version: str, tag: str) -> Finding:
    """Name, version and tags inside are those of the file's name."""
    metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
    tags = HeaderParser().parsestr(archive.read(f"{info}/WHEEL").decode()).get_all("Tag", [])
    good = metadata["Name"] == "fastnets" and metadata["Version"] == version and all(t.startswith(tag) for t in tags)
    return Finding("metadata", good, f"{metadata['Name']} {metadata['Version']}, {', '.join(tags)}")


def _libraries(root: Path, version: str) -> Iterator[Finding]:
    """What is inside, what it is for and what it asks for."""
    libraries = {path.name.split(".")[0]: path for path in sorted(root.rglob("*.so*"))}
    cuda = re.search(r"\+cu(\d+)", version)
    expected = ["_C", "_C_cuda"] if cuda else ["_C"]
    sizes = ", ".join(f"{name} {path.stat().st_size / 1e6:.1f} MB" for name, path in libraries.items())
    yield Finding("libraries", sorted(libraries) == expected, f"{sizes}; expected {' and '.join(expected)}")
    path = root / "fastnets" / "_build.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    same = (record.get("cuda") or "").replace(".", "") == (cuda[1] if cuda else "")
    yield Finding(
        "build",
        same and bool(record),
        ", ".join(f"{name} {value}" for name, value in record.items() if value) or "no record",
    )
    for name, path in libraries.items():
        needed, foreign = asks(path)
        stray = [library for library in needed if not ALLOWED_LIBRARIES.fullmatch(library)]
        yield Finding(f"{name} needs", not stray, ", ".join(stray or needed))
        yield Finding(f"{name} symbols", not foreign, ", ".join(foreign) or "torch's stable interface, libc, libstdc++")
    if "_C_cuda" in libraries:
        yield _architectures(libraries["_C_cuda"], record.get("cuda_architectures") or "")


def asks(path: Path) -> tuple[list[str], list[str]]:
    """The libraries that one depends on, and the undefined symbols that it may not ask for."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        elf = ELFFile(file)
        needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
        versions = {}
        for library, entries in elf.get_section_by_name(".gnu.version_r").iter_versions():
            versions |= {entry["vna_other"]: (library.name, entry.name) for entry in entries}
        numbers = elf.get_section_by_name(".gnu.version")
        foreign = []
        for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            if index == 0 or symbol["st_shndx"] != "SHN_UNDEF":
                continue
            number = numbers.get_symbol(index)["ndx"]
            version = versions.get(number, ("", ""))[1] if isinstance(number, int) else ""
            if not ALLOWED_VERSIONS.match(version) and not ALLOWED_SYMBOLS.match(symbol.name):
                foreign.append(symbol.name)
    return needed, foreign


def device_code(library: Path) -> set[tuple[str, int]]:
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


def _architectures(library: Path, asked: str) -> Finding:
    """Machine code, and PTX, for what the build was asked for."""
    expected = set()
    for major, minor, ptx in re.findall(r"(\d+)\.(\d)[af]?(\+PTX)?", asked):
        expected |= {(kind, int(major + minor)) for kind in ("elf", *["ptx"] * bool(ptx))}
    found = device_code(library)
    text = ", ".join(f"{'PTX ' if kind == 'ptx' else 'sm_'}{number}" for kind, number in sorted(found))
    return Finding("device code", found == expected, f"{text}; asked for {asked}")


def _audit(program: str, *arguments: str) -> Finding:
    """What another tool says."""
    beside = Path(sysconfig.get_path("scripts")) / program
    command = str(beside) if beside.exists() else shutil.which(program)
    if command is None:
        raise UsageError(f"no {program} here: pip install 'fastnets[wheel]'")
    done = subprocess.run([command, *arguments], capture_output=True, text=True)
    said = " ".join((done.stdout + done.stderr).split()) if done.returncode else "clean"
    return Finding(program, done.returncode == 0, said)

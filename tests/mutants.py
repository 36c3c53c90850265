"""A copy of the CUDA kernels in which each barrier, wait and fence can be left out, one at a time.

A copy for each would have to be compiled for each. Here every such statement gets a number and becomes
FASTNETS_STATEMENT(number, call) of tests/sanitize/mutant.h, and a program leaves out the one it is told to. What would
only hang without its statement is weakened instead: FASTNETS_INSTEAD(number, expression, another).
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
REDUNDANT = HERE / "sanitize" / "redundant.json"

NOTHING = -1
"""In place of a statement's number: none is left out."""

CALLS = (
    "__syncthreads",
    "__syncwarp",
    "__threadfence",
    "__threadfence_block",
    "copy_async_commit",
    "copy_async_wait",
    "copy_async_wait_all",
    "grid_barrier",
    "named_barrier",
    "publish",
    "wait_for",
    "wait_for_depth",
    "wait_for_gates",
)
# A call that is a statement; a qualified one (simt::grid_barrier) is the device's own body.
_STATEMENT = re.compile(rf"(?<![\w:.>])((?:{'|'.join(CALLS)})(?:<[^<>;]*>)?\([^;{{}}]*\));")
_CALL = re.compile(rf"(?<![\w:.>])(?:{'|'.join(CALLS)})\s*[<(]")
# What takes the place of an expression: a flag that orders nothing, and the other one of two buffers.
_INSTEAD = (
    (re.compile(r"__atomic_(\w+)\((.*), __ATOMIC_(?:ACQUIRE|RELEASE)\)"), r"__atomic_\1(\2, __ATOMIC_RELAXED)"),
    (re.compile(r"(?<![\w:.>])buffer_of\(([^()]*)\)(?= \*)"), r"1 - buffer_of(\1)"),
)
_DEFINITION = re.compile(r"\bvoid\s+$")


class Statement(NamedTuple):
    """One barrier, wait or fence of the source, or an expression that another can take the place of."""

    number: int
    file: str
    """From the repository's root."""
    line: int
    text: str
    """The whole line."""
    before: str
    """The line before it that is not empty: together they tell it from its like."""


class Redundant(NamedTuple):
    """A statement that may be missing, and why nothing could notice; one entry of redundant.json."""

    file: str
    before: str
    text: str
    proof: str

    def is_about(self, statement: Statement) -> bool:
        return self[:3] == (statement.file, statement.before, statement.text)


def redundant() -> list[Redundant]:
    return [Redundant(**entry) for entry in json.loads(REDUNDANT.read_text())]


def sources() -> list[Path]:
    """What is mutated: the kernels, the headers they share, and the kernels of the drivers."""
    found = [*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    return [*sorted(found), *sorted((HERE / "sanitize").glob("*.cu"))]


def number(path: Path, first: int) -> tuple[list[Statement], str]:
    """The statements of a file, numbered from `first`, and the file with those numbers in it."""
    found: list[Statement] = []
    lines, before = [], ""
    for place, line in enumerate(path.read_text().splitlines(), 1):
        code, comment = re.fullmatch(r"(.*?)(\s*//.*)?", line).groups()

        def numbered(match: re.Match, place=place, line=line, before=before, code=code) -> str:
            if _DEFINITION.search(code[: match.start()]):
                return match.group()
            this = first + len(found)
            found.append(Statement(this, str(path.relative_to(ROOT)), place, line.strip(), before))
            return f"FASTNETS_STATEMENT({this}, ({match.group(1)}));"

        def exchanged(match: re.Match, place=place, line=line, before=before, other: str = "") -> str:
            this = first + len(found)
            found.append(Statement(this, str(path.relative_to(ROOT)), place, line.strip(), before))
            return f"FASTNETS_INSTEAD({this}, ({match.group()}), ({match.expand(other)}))"

        copied = _STATEMENT.sub(numbered, code)
        for pattern, other in _INSTEAD:
            copied = pattern.sub(functools.partial(exchanged, other=other), copied)
        for call in _CALL.finditer(re.sub(r"FASTNETS_STATEMENT\(.*?\);", "", copied)):
            if not _DEFINITION.search(copied[: copied.index(call.group())]):
                raise ValueError(f"{path}:{place}: a statement by itself, on one line, is what can be left out")
        lines.append(copied + (comment or ""))
        before = line.strip() or before
    return found, "\n".join(lines) + "\n"


def statements() -> list[Statement]:
    """Every barrier, wait and fence, in the order of their numbers."""
    found: list[Statement] = []
    for path in sources():
        found += number(path, len(found))[0]
    return found


def write_copy(target: Path) -> None:
    """Writes the copy, with every header that it needs, under `target`."""
    first = 0
    for path in sources():
        found, text = number(path, first)
        first += len(found)
        _write(target / path.relative_to(ROOT), text)
    for path in (ROOT / "csrc").rglob("*.h"):
        if path.parent.name != "cuda":
            _write(target / path.relative_to(ROOT), path.read_text())


def _write(path: Path, text: str) -> None:
    """Leaves a file that is the same as it is, so that nothing is compiled anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)

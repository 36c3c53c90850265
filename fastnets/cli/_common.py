"""What the commands share: options, dtypes' names, output."""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from .. import testing
from . import UsageError

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in testing.DTYPES}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def console(*, stderr: bool = False) -> Console:
    """Where a command prints; wide enough for a table where the output is a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 200)


def output_file(name: str) -> Path:
    """A file that can be written: checked before the work that fills it."""
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def write(path: Path, text: str) -> None:
    """Writes a whole file or raises UsageError."""
    try:
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def add_selection(parser: argparse.ArgumentParser, families: tuple[str, ...] = testing.FAMILIES) -> None:
    """--op (one of `families`), --match and --dtype: which rows."""
    parser.add_argument(
        "--op",
        action="append",
        choices=families,
        metavar="OP",
        help=f"only this family ({', '.join(families)}); may be repeated",
    )
    parser.add_argument("--match", metavar="TEXT", help="only rows whose name contains TEXT")
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, metavar="DTYPE", help=f"only this dtype ({', '.join(DTYPES)})"
    )


def selects(args: argparse.Namespace, name: str, dtype: torch.dtype) -> bool:
    """Whether --match and --dtype leave a row."""
    return (args.match or "") in name and (not args.dtype or dtype_name(dtype) in args.dtype)

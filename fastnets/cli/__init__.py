"""The command line: `fastnets COMMAND`, or `python -m fastnets COMMAND`.

Every command is a module of this package with `add_arguments(parser)` and `run(args) -> int`, the exit status. It is
imported only when it is asked for.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["UsageError", "main"]

COMMANDS = {
    "info": "versions, the machine, the instruction set in use, and which backends run here and why others do not",
    "verify": "check every operator, forwards and backwards, on every backend here against float64",
    "bench": "time every operator and network beside PyTorch's own, in one process",
    "inspect": "what the compiler made of the CUDA kernels, what they do to memory, and estimates: all without a GPU",
    "wheel-check": "check a wheel: contents, architectures, tags, and what it asks of other libraries",
    "train": "train one of the networks on real data, alone or beside its torch.nn twin",
}
INTERRUPTED = 130


class UsageError(Exception):
    """What the user asked for cannot be done; the message says in one line what and why. The exit status is 2."""


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """The whole command line; only the command that was asked for gets its options (and its module imported)."""
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="fastnets",
        description="fastnets: convolution, recurrent and attention layers for PyTorch on kernels of their own.",
        epilog="`fastnets COMMAND --help` says more. FASTNETS_BACKEND forces a backend, "
        "FASTNETS_CPU=generic|avx2|avx512|avx512_bf16 an instruction set.",
    )
    parser.add_argument("--version", action="version", version=f"fastnets {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == asked:
            module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 well, 1 a check failed, 2 a mistake in what was asked."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = arguments[0] if arguments else None
    try:
        args = _parser(asked).parse_args(arguments)
        return args.run(args)
    except UsageError as error:
        print(f"fastnets {asked}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastnets {asked}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

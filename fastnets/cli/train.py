"""`fastnets train NAME`: trains one of the networks on real data, alone or beside its torch.nn twin."""

import argparse
import json
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__, dispatch
from .. import nn as fast
from ..integrations.distributed import Processes, launched, leave, processes
from ..networks import NETWORKS, MissingPackageError, Network, checkpoint, get
from ..networks.trainer import DivergedError, Settings, Trainer
from . import UsageError
from ._common import console, output_file, write
from ._curves import comparison

LAYERS = {"fastnets": fast, "torch": torch.nn}
FILES = {"fastnets": "checkpoint.pt", "torch": "twin.pt"}
# On a GPU a step's loss is fetched with those of the next few, so that the device is never kept waiting.
STEPS_AT_ONCE = {"cpu": 1}
STEPS_AT_ONCE_ELSEWHERE = 8


def _number(kind: type, least: float, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number of `kind`, at least (or above) `least`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (value > least if above else value >= least):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {noun} {'above' if above else 'from'} {least}, got {text!r}")
        return value

    return parse


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu or cuda, got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"this machine has {torch.cuda.device_count()} CUDA devices, got {text!r}")
    return device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = _number(int, 1)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the network; --list names them")
    parser.add_argument("--list", action="store_true", help="say what there is to train, and stop")
    parser.add_argument("--epochs", type=count, help="passes over the data (default: the network's own)")
    parser.add_argument("--steps", type=count, help="stop after so many steps in all")
    parser.add_argument("--batch-size", type=count, help="samples a step, over all processes (default: the network's)")
    parser.add_argument("--lr", type=_number(float, 0, above=True), help="learning rate (default: the network's)")
    parser.add_argument("--seed", type=_number(int, 0), help="decides every random number (default: 0)")
    parser.add_argument("--no-dropout", action="store_true", help="train without dropout")
    parser.add_argument("--compare", action="store_true", help="also train the torch.nn twin from the same seed")
    parser.add_argument("--resume", action="store_true", help="continue bit for bit where the last run stopped")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where checkpoints go (default: runs/NAME)")
    parser.add_argument("--device", type=_device, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=count, help="threads a process uses on the CPU")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write losses, scores and speeds to FILE")


def run(args: argparse.Namespace) -> int:
    rank, _ = launched()
    try:
        status = _run(args)
    except (MissingPackageError, checkpoint.CheckpointError, DivergedError, dispatch.Unsupported) as error:
        if rank == 0:
            raise UsageError(str(error)) from error
        return 2
    except UsageError:
        if rank == 0:  # the others found the same, and need not say so again
            raise
        return 2
    leave(status)
    return status


def _run(args: argparse.Namespace) -> int:
    if args.list:
        _print_networks()
        return 0
    if args.name is None:
        raise UsageError("which network? `fastnets train NAME`; `fastnets train --list` names them")
    try:
        network = get(args.name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with processes(device) as group:
        session = _Session(args, network, group)
        with _signals() as caught:
            stopped = session.train(caught)
        if stopped:
            return 128 + (caught[0] if caught else signal.SIGINT)
        session.report()
    return 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within, the first SIGINT or SIGTERM is noted in the list; a second one has its usual effect."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        for handled, former in formers.items():
            signal.signal(handled, former)

    formers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, former in formers.items():
            signal.signal(number, former)


class _Session:
    """One call of the command: the trainers side by side, their checkpoints, and what is printed."""

    def __init__(self, args: argparse.Namespace, network: Network, group: Processes):
        self.args, self.network, self.group = args, network, group
        self.folder = args.output or Path("runs") / network.name
        self.epochs = args.epochs or network.epochs
        self.out = console()
        self.out.quiet = not group.first
        names = ["fastnets", "torch"] if args.compare else ["fastnets"]
        states = {name: checkpoint.load(self.folder / FILES[name]) for name in names} if args.resume else {}
        settings = self._settings(states)
        try:
            self.trainers = {name: Trainer(network, LAYERS[name], settings, group) for name in names}
        except ValueError as error:
            raise UsageError(str(error)) from error
        for name, state in states.items():
            self.trainers[name].load(state)
        self._prepare_folder(names)
        self.settings = settings

    def _say(self, line: str) -> None:
        self.out.print(line, soft_wrap=True)

    def _settings(self, states: dict[str, dict[str, Any]]) -> Settings:
        """The command line's over the checkpoint's or the network's; a resumed run must be the run that it resumes."""
        args = self.args
        asked = {
            "seed": args.seed,
            "batch_size": args.batch_size,
            "learning_rate": args.lr,
            "dropout": False if args.no_dropout else None,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        own = Settings(0, self.network.batch_size, self.network.learning_rate, dropout=True)
        if not states:
            return own._replace(**given)
        stored = [Settings(**state["settings"]) for state in states.values()]
        for name, value in given.items():
            if any(getattr(settings, name) != value for settings in stored):
                was = getattr(stored[0], name)
                raise UsageError(f"--resume continues a run with {name.replace('_', ' ')} {was}, not {value}")
        if stored[0] != stored[-1]:
            raise UsageError("--resume: the checkpoint and its twin come from different runs")
        return stored[0]

    def _prepare_folder(self, names: list[str]) -> None:
        """Makes sure of the folder before an hour's work, and keeps the last run's checkpoints aside."""
        if not self.group.first:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in () if self.args.resume else names:
                path = self.folder / FILES[name]
                if path.exists():
                    kept = path.replace(path.with_name(f"previous-{path.name}"))
                    self._say(f"{path} is of an earlier run (--resume would go on with it): kept as {kept.name}")
        except OSError as error:
            raise UsageError(f"cannot write to {self.folder}: {error.strerror}") from error

    def _steps_left(self, trainer: Trainer) -> int:
        limit = self.epochs * trainer.steps_an_epoch
        return max(0, min(limit, self.args.steps or limit) - trainer.steps_done)

    def train(self, caught: list[int]) -> bool:
        """Trains until done, or until a process caught a signal, which it returns.

        Side by side, step by step, so that a busy machine slows both alike.
        """
        at_once = STEPS_AT_ONCE.get(self.group.device.type, STEPS_AT_ONCE_ELSEWHERE)
        stop = False
        with _Progress(self) as progress:
            while not stop:
                name, trainer = min(self.trainers.items(), key=lambda item: item[1].steps_done)
                left = self._steps_left(trainer)
                if left == 0:
                    break
                epoch = trainer.epoch
                stop = trainer.advance(min(at_once, left), stop=bool(caught))
                progress.show(name, trainer)
                if trainer.epoch > epoch:
                    self._save(name)
                    progress.epoch_done(name, trainer)
        for name, trainer in self.trainers.items():
            if trainer.step > 0:
                self._save(name)
        if stop:
            where = f"epoch {trainer.epoch + 1}, step {trainer.step}"
            self._say(f"stopped in {where}, and saved: the same command with --resume goes on from there")
        return stop

    def _save(self, name: str) -> None:
        state = self.trainers[name].state()
        if self.group.first:
            try:
                checkpoint.save(state, self.folder / FILES[name])
            except OSError as error:
                raise UsageError(f"cannot write {self.folder / FILES[name]}: {error.strerror}") from error
        self.group.wait()

    def report(self) -> None:
        """The score, the samples, the comparison, the file."""
        scores = {
            name: trainer.scores[-1] if trainer.step == 0 and trainer.scores else trainer.score()
            for name, trainer in self.trainers.items()
        }
        if not self.group.first:
            return
        trainer = self.trainers["fastnets"]
        if trainer.losses:
            self._say(
                f"{self.network.name}: {self.network.metric} {scores['fastnets']:.2%} "
                f"after {trainer.steps_done} steps, loss {trainer.losses[-1]:.4f}, "
                f"{trainer.samples_per_second:,.0f} samples/s; checkpoint in {self.folder / FILES['fastnets']}"
            )
        if self.network.show:
            for line in self.network.show(trainer.model):
                self._say(f"  {line}")
        if len(self.trainers) == 2:
            comparison(self.out, self.trainers, scores, self.network.metric)
        if self.args.json:
            write(self.args.json, json.dumps(self._results(scores), indent=2) + "\n")

    def _results(self, scores: dict[str, float]) -> dict[str, Any]:
        return {
            "network": self.network.name,
            "settings": self.settings._asdict(),
            "processes": self.group.size,
            "device": str(self.group.device),
            "threads": torch.get_num_threads(),
            "versions": {"fastnets": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "metric": self.network.metric,
            "runs": {
                name: {
                    "epoch": trainer.epoch,
                    "steps": trainer.steps_done,
                    "losses": trainer.losses,
                    "scores": trainer.scores,
                    "score": scores[name],
                    "samples_per_second": trainer.samples_per_second,
                }
                for name, trainer in self.trainers.items()
            },
        }


class _Progress:
    """A moving bar for each trainer on a terminal; elsewhere one line an epoch."""

    def __init__(self, session: _Session):
        self.session, self.out = session, session.out
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} samples/s"),
            TimeRemainingColumn(),
            console=self.out,
            disable=not self.out.is_terminal or not session.group.first,
            transient=True,
        )
        self.tasks = {}

    def __enter__(self) -> "_Progress":
        self.bars.__enter__()
        for name, trainer in self.session.trainers.items():
            total = trainer.steps_done + self.session._steps_left(trainer)
            self.tasks[name] = self.bars.add_task(name, total=total, completed=trainer.steps_done, loss="-", speed="-")
        return self

    def __exit__(self, *details) -> None:
        self.bars.__exit__(*details)

    def show(self, name: str, trainer: Trainer) -> None:
        """Moves the bar."""
        self.bars.update(
            self.tasks[name],
            completed=trainer.steps_done,
            description=f"{name} {min(trainer.epoch + 1, self.session.epochs)}/{self.session.epochs}",
            loss=f"{trainer.losses[-1]:.4f}",
            speed=f"{trainer.speeds[-1]:,.0f}",
        )

    def epoch_done(self, name: str, trainer: Trainer) -> None:
        """Prints the epoch's line."""
        losses = trainer.losses[-trainer.steps_an_epoch :]
        self.out.print(
            f"{name:8}  epoch {trainer.epoch}/{self.session.epochs}  loss {sum(losses) / len(losses):.4f}  "
            f"{self.session.network.metric} {trainer.scores[-1]:.2%}  {trainer.samples_per_second:,.0f} samples/s"
        )


def _print_networks() -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "network", "trained on", "optimiser", "batch", "epochs", "score"):
        table.add_column(title, justify="right" if title in ("batch", "epochs") else "left")
    for network in NETWORKS.values():
        table.add_row(
            network.name,
            network.description,
            network.trained_on,
            f"{network.optimiser.__name__} {network.learning_rate:g}",
            str(network.batch_size),
            str(network.epochs),
            network.metric,
        )
    console().print(table)

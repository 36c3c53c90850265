"""Recurrent modules beside torch.nn's: outputs, states, gradients over the whole space of options."""

import itertools

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastnets

STEPS, BATCH, INPUT, HIDDEN = 6, 3, 4, 5
LENGTHS = {"sorted": (True, [6, 4, 1]), "unsorted": (False, [2, 6, 3])}


def _flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value if item is not None for t in _flat(item)]


def _twins(name: str, *args, **options):
    """torch's module and ours, made from the same seed."""
    modules = []
    for library in (torch.nn, fastnets.nn):
        torch.manual_seed(7)
        modules.append(getattr(library, name)(*args, **options))
    return modules


def _layers(name: str):
    """Every combination of constructor options of a layer."""
    switches = (False, True)
    nonlinearities = [{"nonlinearity": "tanh"}, {"nonlinearity": "relu"}] if name == "RNN" else [{}]
    for layers, bias, batch_first, bidirectional, more in itertools.product(
        (1, 2), switches, switches, switches, [{"proj_size": 0}, {"proj_size": 3}] if name == "LSTM" else nonlinearities
    ):
        yield {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, **more}


def _states(name: str, options, batch: int):
    count = options["num_layers"] * (2 if options["bidirectional"] else 1)
    h = torch.randn(count, batch, options.get("proj_size") or HIDDEN)
    return (h, torch.randn(count, batch, HIDDEN)) if name == "LSTM" else h


def _results(module, x, hx, seed=3):
    """Output, states, and the gradients of everything."""
    leaves = [
        t.requires_grad_()
        for t in _flat(x.data if isinstance(x, PackedSequence) else x) + _flat([] if hx is None else hx)
    ]
    torch.manual_seed(seed)
    y, state = module(x, hx)
    outputs = [y.data if isinstance(y, PackedSequence) else y, *_flat(state)]
    weights = [torch.randn(out.shape).to(out) for out in outputs]
    total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return outputs + list(torch.autograd.grad(total, leaves + list(module.parameters())))


def _assert_same(theirs, ours, **tolerance):
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, **tolerance)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", ["batched", "unbatched", *LENGTHS])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_layers_match_torch(name, kind):
    for options in _layers(name):
        stock, ours = _twins(name, INPUT, HIDDEN, **options)
        assert repr(stock) == repr(ours)
        for (key, a), (other, b) in zip(stock.state_dict().items(), ours.state_dict().items(), strict=True):
            assert key == other
            assert torch.equal(a, b)
        for given in (False, True):
            shape = (BATCH, STEPS, INPUT) if options["batch_first"] else (STEPS, BATCH, INPUT)
            x = torch.randn(shape)
            hx = _states(name, options, BATCH) if given else None
            if kind == "unbatched":
                x = x[0] if options["batch_first"] else x[:, 0]
                hx = None if hx is None else hx[:, 0] if name != "LSTM" else tuple(state[:, 0] for state in hx)
            if kind in LENGTHS:
                in_order, lengths = LENGTHS[kind]
                x = pack_padded_sequence(x, torch.tensor(lengths), options["batch_first"], enforce_sorted=in_order)
            _assert_same(_results(stock, x, hx), _results(ours, x, hx), rtol=1e-5, atol=1e-5)

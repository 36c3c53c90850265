"""Hugging Face transformers on our attention, on tiny randomly initialised models."""

import copy
import pickle

import pytest
import torch
from modules import assert_within_rule
from torch.testing import assert_close

import fastnets
from fastnets.integrations import transformers as fastnets_transformers

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True, scope="module")
def _registered():
    fastnets_transformers.register()


SIZES = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=48),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=32, n_head=4, n_layer=2),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "gemma2": lambda: transformers.Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "t5": lambda: transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48),
}
# transformers' own "eager" takes the softmax in float32 whatever the model's dtype, and has no finite mask in float64.
PEERS = {"bert": "sdpa", "gpt2": "sdpa", "llama": "sdpa", "t5": "sdpa", "gemma2": "eager"}


def _model(name: str, implementation: str, dtype: torch.dtype) -> torch.nn.Module:
    config = CONFIGS[name]()
    config.pad_token_id, config.bos_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 1, None, 0
    auto = {"bert": transformers.AutoModel, "t5": transformers.AutoModelForSeq2SeqLM}
    auto = auto.get(name, transformers.AutoModelForCausalLM)
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=implementation).to(dtype).eval()
    for module in model.modules():  # T5 and GPT-2 begin with weights so small that attention hardly matters
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    return model


def _batch(name: str, padded: bool, side: str = "right") -> dict:
    ids = torch.randint(2, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row, count in ((0, 4), (2, 7)):
            mask[row, -count:] = 0
        mask = mask if side == "right" else mask.flip(1)
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    return {**inputs, "labels": ids} if name == "t5" else inputs


def _hidden(name: str, implementation: str, inputs: dict, dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last hidden states, or logits, where they are not padding; and the parameters' gradients of their sum."""
    model = _model(name, implementation, dtype)
    out = model(**inputs)[1 if name == "t5" else 0]
    out = out if name == "t5" else out[inputs["attention_mask"].bool()]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    grads = torch.autograd.grad((out * weights).sum(), list(model.parameters()), materialize_grads=True)
    return out, list(grads)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_equals_transformers(name: str, padded: bool):
    inputs = _batch(name, padded)
    dtype, tolerance = (torch.float64, 1e-9) if PEERS[name] == "sdpa" else (torch.float32, 2e-4)
    ours, theirs = (_hidden(name, implementation, inputs, dtype) for implementation in ("fastnets", PEERS[name]))
    assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_single_precision(name: str, padded: bool):
    inputs = _batch(name, padded)
    runs = [_hidden(name, implementation, inputs, torch.float32) for implementation in ("fastnets", "eager")]
    truth = _hidden(name, "sdpa", inputs, torch.float64)
    (out, grads), (peer, peer_grads) = runs
    assert_within_rule([out], [peer], [truth[0]], torch.float32)
    assert_within_rule(grads, peer_grads, truth[1], torch.float32)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_generation_with_a_cache(name: str, padded: bool):
    inputs = _batch(name, padded, side="left")
    dtype = torch.float64 if PEERS[name] == "sdpa" else torch.float32
    runs = [
        _model(name, implementation, dtype).generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            use_cache=cached,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for implementation, cached in (("fastnets", True), ("fastnets", False), (PEERS[name], True))
    ]
    for run in runs[1:]:
        assert runs[0].sequences.equal(run.sequences)
        assert_close(runs[0].logits, run.logits, rtol=1e-4, atol=1e-4)


def test_our_attention_runs():
    found = fastnets.explain(_model("bert", "fastnets", torch.float32), **_batch("bert", True))
    assert [(row.family, row.layer) for row in found.operators] == [
        ("attention", f"encoder.layer.{i}.attention.self") for i in range(2)
    ]


def test_dropout_is_handed_on():
    model = _model("bert", "fastnets", torch.float32).train()
    seen = []
    with fastnets.dispatch.recording(lambda case, *_: seen.append("dropout" in case.options)):
        model(**_batch("bert", False))
    assert seen == [True, True]


def test_sinks_are_refused():
    from fastnets.integrations.transformers import attention

    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="s_aux"):
        attention(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(2))


def test_linear_layers_become_ours():
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=32, n_head=2, n_layer=1)
    stock = transformers.GPT2LMHeadModel(config).eval()
    model = copy.deepcopy(stock)
    assert fastnets_transformers.convert(model) is model
    layer, theirs = (net.transformer.h[0].mlp.c_fc for net in (model, stock))
    assert type(layer) is not type(theirs)
    assert isinstance(layer, type(theirs))
    assert repr(layer) == repr(theirs)
    assert type(model.transformer.h[0].mlp.act) is not type(stock.transformer.h[0].mlp.act)
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    ids, seen = torch.arange(16)[None], []
    with fastnets.backend("cpu"), fastnets.dispatch.recording(lambda case, *_: seen.append(case.family)):
        found = model(ids).logits
    assert seen == ["linear"] * 5  # two of attention, two of the feed-forward network, the head
    assert_close(found, stock(ids).logits)
    assert model.state_dict().keys() == stock.state_dict().keys()

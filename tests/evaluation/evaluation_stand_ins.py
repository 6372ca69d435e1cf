"""Tiny models, readings of them that share no code with evaluation, and documents to read."""

import numpy as np
import torch

from new_llm import TransformerLM
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokenizer import padded_vocab_size, tokenize_documents, train_tokenizer
from tiny import make_model

VOCAB_SIZE = 11
SENTENCES = [pair.forward for pair in get_reversal_pairs()]
TEXTS = [" ".join(SENTENCES[begin : begin + count]) for begin, count in ((0, 9), (9, 30), (40, 14), (60, 2), (70, 15))]
TOKENIZER = train_tokenizer(TEXTS, 400)
REAL = tokenize_documents(TEXTS, TOKENIZER)
"""Documents of sentences, the shortest of them of less than 40 tokens."""


def make_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCAB_SIZE, size=length).tolist() for length in lengths]


def read_naively(model: TransformerLM, tokens: list[int]) -> list[float]:
    """The loss of each token but the first, all read in one call from an empty memory."""
    ids = torch.tensor([tokens])
    with model.fresh_memory(), torch.no_grad():
        return model.token_losses(ids[:, :-1], ids)[0].tolist() if len(tokens) > 1 else []


def make_tiny_model(kind, vocab_size, segment_length, *, spread=0.2, **options) -> TransformerLM:
    return make_model(kind, vocab_size, segment_length=segment_length, spread=spread, **options).eval()


def make_reader(kind: str, segment_length: int = 16, **options) -> TransformerLM:
    return make_tiny_model(kind, padded_vocab_size(TOKENIZER), segment_length, **options)


def make_exact(segment_length: int = 8, kind: str = "infini", **options) -> TransformerLM:
    """A tiny model in float64 of `VOCAB_SIZE` tokens, which holds a memory that no measurement may change."""
    model = make_tiny_model(kind, VOCAB_SIZE, segment_length, spread=0.5, **options).double()
    model(torch.arange(VOCAB_SIZE)[None], update_memory=True)
    return model

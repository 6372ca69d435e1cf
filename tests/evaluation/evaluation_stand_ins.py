"""A model whose losses are known in closed form, readings of it that share no code with evaluation, and real ones."""

import contextlib
import re

import numpy as np
import torch
from torch import nn

from new_llm import TransformerLM
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokenizer import TokenSplit, padded_vocab_size, tokenize_documents, train_tokenizer
from new_llm.models.inputs import IGNORE_INDEX, align_labels
from tiny import make_model

VOCAB_SIZE = 11
SENTENCES = [pair.forward for pair in get_reversal_pairs()]
TEXTS = [" ".join(SENTENCES[begin : begin + count]) for begin, count in ((0, 9), (9, 30), (40, 14), (60, 2), (70, 15))]
TOKENIZER = train_tokenizer(TEXTS, 400)
REAL = tokenize_documents(TEXTS, TOKENIZER)
"""Documents of sentences, the shortest of them of less than 40 tokens."""


def make_split(documents: list[list[int]], texts: list[str] | None = None) -> TokenSplit:
    texts = texts or ["word " * len(document) for document in documents]
    return TokenSplit(
        tokens=np.array([token for document in documents for token in document], dtype=np.uint16),
        offsets=np.cumsum([0, *map(len, documents)]).astype(np.int64),
        num_bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
        num_words=np.array([len(re.split(r"\s+", text)) for text in texts], dtype=np.int64),
    )


def make_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCAB_SIZE, size=length).tolist() for length in lengths]


class BigramModel(nn.Module):
    """−ln p(next | token) from a table, raised by what the memory of the earlier segments holds.

    The memory is a number that depends on every token read and on where the segments were cut.
    """

    def __init__(self, segment_length: int = 8, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator, dtype=torch.float64)
        self.nll = nn.Parameter(-logits.log_softmax(-1))
        self.segment_length = segment_length
        self.held = torch.full((1,), 5)
        self.per_row = False

    def token_losses(self, input_ids, labels, attention_mask=None, *, update_memory=False):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        targets = align_labels(labels, input_ids.shape[1])
        assert self.held.shape[0] == len(input_ids) if self.per_row else not update_memory
        if attention_mask is not None:  # a masked token is neither read nor a target
            masked = ~attention_mask | ~torch.nn.functional.pad(attention_mask[:, 1:], (0, 1), value=True)
            assert (targets[masked] == IGNORE_INDEX).all()
        losses = torch.zeros(targets.shape, dtype=torch.float64)
        for row, ids in enumerate(input_ids.tolist()):
            real = len(ids) if attention_mask is None else int(attention_mask[row].sum())
            memory = int(self.held[row if self.per_row else 0])
            for position in range(real):
                target = int(targets[row, position])
                if target != IGNORE_INDEX:
                    losses[row, position] = self.nll[ids[position], target] + memory / 97
                last = position == real - 1
                if last or (position + 1) % self.segment_length == 0:
                    begin = position // self.segment_length * self.segment_length
                    memory = (31 * memory + sum(ids[begin : position + 1]) + 1) % 97
            if update_memory:
                self.held[row] = memory
        return losses

    @contextlib.contextmanager
    def fresh_memory(self, batch_size=None):
        held, per_row = self.held, self.per_row
        self.held = torch.zeros(batch_size or 1, dtype=torch.int64)
        self.per_row = batch_size is not None
        yield self
        self.held, self.per_row = held, per_row

    def reset_rows(self, rows):
        self.held[rows] = 0


def read_naively(model: BigramModel, tokens: list[int]) -> list[float]:
    """The loss of each token but the first, all read in one go from an empty memory."""
    nll = model.nll.detach().numpy()
    losses, memory = [], 0
    for begin in range(0, len(tokens) - 1, model.segment_length):
        for index in range(begin, min(begin + model.segment_length, len(tokens) - 1)):
            losses.append(float(nll[tokens[index], tokens[index + 1]]) + memory / 97)
        memory = (31 * memory + sum(tokens[begin : begin + model.segment_length]) + 1) % 97
    return losses


def make_tiny_model(
    kind: str, vocab_size: int, segment_length: int, *, spread: float = 0.2, **options
) -> TransformerLM:
    """Two layers of width 32, with weights far enough apart for memories to matter."""
    return make_model(kind, vocab_size, segment_length=segment_length, spread=spread, **options).eval()


def make_reader(kind: str, segment_length: int = 16, **options) -> TransformerLM:
    """A tiny model that reads the real text."""
    return make_tiny_model(kind, padded_vocab_size(TOKENIZER), segment_length, **options)

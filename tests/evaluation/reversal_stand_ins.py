"""A model that knows some sentences by heart, and pairs to ask it for."""

import torch
from torch import nn

from new_llm.data.reversal_pairs import ReversalPair, get_reversal_pairs
from new_llm.data.tokenizer import train_tokenizer
from new_llm.models.loss import IGNORE_INDEX, align_labels

PAIRS = [pair for pair in get_reversal_pairs() if pair.relation in ("capital", "novel")][::3]
PAIRS += [pair for pair in get_reversal_pairs() if pair.kind == "invented"][:7]


def make_pair(relation, subject, object_, kind="real", verb=" likes"):
    forward_prompt, backward_prompt = f"{subject}{verb}", f"{object_} is liked by"
    return ReversalPair(
        relation=relation,
        subject=subject,
        object=object_,
        kind=kind,
        forward=f"{forward_prompt} {object_}.",
        backward=f"{backward_prompt} {subject}.",
        forward_prompt=forward_prompt,
        forward_answer=f" {object_}.",
        backward_prompt=backward_prompt,
        backward_answer=f" {subject}.",
    )


class KnownTexts(nn.Module):
    """A token costs 0.1 nats where some known text goes on with it, else 4 nats and a little by its id."""

    segment_length = 64

    def __init__(self, texts, encode):
        super().__init__()
        ids = [tuple(encode(text)) for text in texts]
        self.prefixes = {text[:end] for text in ids for end in range(1, len(text) + 1)}
        self.held = "untouched"

    def token_loss(self, prefix, token):
        return 0.1 if (*prefix, token) in self.prefixes else 4.0 + token / 1000

    def token_losses(self, input_ids, labels, attention_mask=None, *, update_memory=False):
        assert not update_memory
        assert self.held == "empty"
        targets = align_labels(labels, input_ids.shape[1])
        losses = torch.zeros(targets.shape)
        for row, position in (targets != IGNORE_INDEX).nonzero().tolist():
            prefix = input_ids[row, : position + 1].tolist()
            losses[row, position] = self.token_loss(tuple(prefix), int(targets[row, position]))
        return losses

    def fresh_memory(self, batch_size=None):
        model = self

        class Fresh:
            def __enter__(self):
                model.held = "empty"

            def __exit__(self, *error):
                model.held = "untouched"

        return Fresh()


def make_tokenizer():
    return train_tokenizer([text for pair in PAIRS for text in (pair.forward, pair.backward)] * 3, 700)


def total_loss(model, ids):
    return sum(model.token_loss(tuple(ids[:end]), ids[end]) for end in range(1, len(ids)))

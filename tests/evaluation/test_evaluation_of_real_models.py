from itertools import pairwise

import pytest
import torch
from evaluation_stand_ins import make_tiny_model

from model_cases import assert_states_equal
from new_llm.config import EvalConfig
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.tokenizer import padded_vocab_size, tokenize_documents, train_tokenizer
from new_llm.evaluation import (
    Positions,
    Subject,
    evaluate_independent,
    evaluate_reversal_curse,
    evaluate_sliding_window,
    evaluate_streaming,
)

SENTENCES = [pair.forward for pair in get_reversal_pairs()]
TEXTS = [" ".join(SENTENCES[begin:end]) for begin, end in pairwise([0, 9, 10, 24, 27])]
TOKENIZER = train_tokenizer(TEXTS, 400)
SPLIT = tokenize_documents(TEXTS, TOKENIZER)


def make_model(kind, segment_length=16):
    return make_tiny_model(kind, padded_vocab_size(TOKENIZER), segment_length)


@pytest.mark.parametrize(("kind", "rows"), [("infini", None), ("multi_memory", 2)])
def test_held_memory_is_bit_for_bit_unchanged_and_unread(kind, rows):
    model = make_model(kind)
    subject = Subject(model, TOKENIZER, SPLIT, EvalConfig(position_edges=(0, 16), batch_size=3), seq_length=32)

    def measure():
        return (
            evaluate_sliding_window(model, SPLIT, context=40, stride=11, batch_size=3).loss,
            evaluate_streaming(model, SPLIT, batch_size=3).loss,
            evaluate_independent(model, SPLIT, batch_size=3).loss,
            Positions().run(subject),
            evaluate_reversal_curse(model, TOKENIZER, get_reversal_pairs()[:5]),
        )

    empty = measure()
    model.reset_memory(rows)
    tokens = torch.from_numpy(SPLIT.tokens[:128].astype("int64"))
    model(tokens.view(2, 64), update_memory=True)
    before = model.get_memory_state()
    assert measure() == empty
    assert_states_equal(model.get_memory_state(), before)


def learn(model, ids, labels):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _ = model.compute_loss(ids, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class DoublyShifted:
    """A model that is handed labels shifted once before the model itself shifts them."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def token_losses(self, input_ids, labels, attention_mask=None, *, update_memory=False):
        shifted = torch.cat([labels[:, 1:], labels[:, :1]], dim=1)
        return self.model.token_losses(input_ids, shifted, attention_mask, update_memory=update_memory)


@pytest.mark.parametrize("kind", ["pythia", "infini"])
def test_a_model_that_has_learned_a_sentence_scores_near_one(kind):
    model = make_model(kind, segment_length=64)
    split = tokenize_documents(["The novel Moby-Dick was written by Herman Melville in the year 1851."], TOKENIZER)
    ids = torch.from_numpy(split.tokens.astype("int64"))[None]
    evaluate_streaming(model, split, batch_size=1)  # what it leaves behind must not hinder training
    learn(model, ids, ids)
    for result in (
        evaluate_sliding_window(model, split, context=64, stride=16, batch_size=4),
        evaluate_streaming(model, split, batch_size=4),
        evaluate_independent(model, split, batch_size=4),
    ):
        assert result.num_tokens == ids.shape[1] - 1
        assert 1 <= result.perplexity < 1.05
    wrong = evaluate_sliding_window(DoublyShifted(model), split, context=64, stride=16, batch_size=4)
    assert wrong.perplexity > 1000

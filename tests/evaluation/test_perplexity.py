import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from evaluation_stand_ins import VOCAB_SIZE, make_documents, make_exact, make_tiny_model, read_naively
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from model_cases import assert_states_equal
from new_llm import evaluation
from new_llm.config import EvalConfig, UserError
from new_llm.data.tokenizer import padded_vocab_size, tokenize_documents
from new_llm.evaluation.scoring import choose_rows, plan_windows
from new_llm.evaluation.statistics import DocumentLosses, compare_models, find_share_interval, find_t_interval
from tiny import make_split
from tokenizer_families import TEXT, train_family

DOCUMENTS = make_documents([37, 1, 2, 64, 65, 130, 3, 16, 17])
SPLIT = make_split(DOCUMENTS)
NUM_SCORED = sum(len(document) - 1 for document in DOCUMENTS)


def naive_sliding(model, documents, context, stride):
    losses = []
    for document in documents:
        previous_end = 1
        for begin in range(0, len(document), stride):
            end = min(begin + context, len(document))
            if previous_end < end:
                losses += read_naively(model, document[begin:end])[previous_end - begin - 1 :]
                previous_end = end
    return losses


def check(result, losses, protocol):
    assert result.protocol == protocol
    assert result.num_tokens == len(losses)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    lengths = [len(document) - 1 for document in DOCUMENTS if len(document) > 1]
    totals = [part.sum() for part in np.split(np.array(losses), np.cumsum(lengths)[:-1])]
    assert result.documents["num_tokens"] == lengths
    assert result.documents["total_nll"] == pytest.approx(totals, rel=1e-6)
    # Clustered by document: the spread of what the documents' losses are above the mean's.
    residuals = np.array(totals) - np.array(lengths) * np.mean(losses)
    error = math.sqrt(len(lengths) / (len(lengths) - 1) * (residuals**2).sum()) / len(losses)
    assert result.standard_error == pytest.approx(result.perplexity * error, rel=1e-6)


@pytest.mark.parametrize(("context", "stride"), [(16, 4), (16, 15), (7, 3), (200, 50), (3, 2)])
@pytest.mark.parametrize("batch_size", [2, 50])
def test_sliding_window_and_independent_equal_naive_loops(context, stride, batch_size):
    model = make_exact()
    result = evaluation.evaluate_sliding_window(model, SPLIT, context=context, stride=stride, batch_size=batch_size)
    check(result, naive_sliding(model, DOCUMENTS, context, stride), "sliding")
    assert (result.context, result.stride) == (context, stride)
    model = make_exact(context)
    result = evaluation.evaluate_independent(model, SPLIT, batch_size=batch_size)
    check(result, naive_sliding(model, DOCUMENTS, context + 1, context), "independent")
    assert (result.context, result.stride, result.num_tokens) == (context, context, NUM_SCORED)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(lambda lengths: max(lengths) > 1),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_streaming_equals_one_document_at_a_time(lengths, segment_length, batch_size, segments_per_call):
    model = make_exact(segment_length)
    documents = make_documents(lengths, seed=sum(lengths))
    result = evaluation.evaluate_streaming(
        model, make_split(documents), batch_size=batch_size, segments_per_call=segments_per_call
    )
    losses = [loss for document in documents for loss in read_naively(model, document)]
    assert result.num_tokens == sum(max(0, length - 1) for length in lengths)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-9)


def test_bits_a_byte_and_word_perplexity_rest_on_the_raw_text_and_unigrams_on_tokens():
    texts = ["Über die Brücke", "  two\nwords ", "one"]
    model = make_exact()
    documents = make_documents([9, 5, 1])  # the last one has nothing to score and doesn't count
    result = evaluation.evaluate_independent(model, make_split(documents, texts), batch_size=2)
    total = sum(naive_sliding(model, documents, model.segment_length + 1, model.segment_length))
    assert (result.num_documents, result.num_bytes, result.num_words) == (2, 17 + 12, 3 + 4)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / 29, rel=1e-9)
    assert result.word_perplexity == pytest.approx(math.exp(total / 7), rel=1e-9)
    for documents, expected in (
        ([[*range(VOCAB_SIZE)]] * 2, VOCAB_SIZE),
        ([[3] * 10], 1),
        ([[3, 3, 3], [7]], 4 / 27**0.25),
    ):
        assert evaluation.unigram_perplexity(make_split(documents)) == pytest.approx(expected)
    with pytest.raises(UserError, match="no token"):
        evaluation.unigram_perplexity(make_split([]))


@pytest.mark.parametrize(
    ("family", "added", "loses"),
    [
        *((family, "", False) for family in ("byte-level", "gpt-neox", "metaspace", "llama")),
        ("metaspace", " Ж", True),  # unknown
        ("wordpiece", "", True),  # white space
        ("lower-case", "", True),
    ],
)
def test_figures_per_byte_are_left_out_if_the_tokenizer_loses_text(family, added, loses):
    if family == "lower-case":
        tokenizer = Tokenizer.from_str(train_family("byte-level").to_str())
        tokenizer.normalizer = normalizers.Lowercase()
    else:
        tokenizer = train_family(family)
    model = make_tiny_model("pythia", padded_vocab_size(tokenizer), 16)
    subject = evaluation.Subject(model, tokenizer, tokenize_documents([TEXT + added], tokenizer))
    measured = evaluation.MEASURES["streaming"]
    result = measured.run(subject)
    assert [result[key] is None for key in ("bits_per_byte", "word_perplexity", "num_bytes")] == [loses] * 3
    assert ("the tokenizer loses part of the text" in measured.describe(result)) == loses


PROTOCOLS = [
    partial(evaluation.evaluate_sliding_window, context=16, stride=5),
    partial(evaluation.evaluate_streaming, segments_per_call=1),
    evaluation.evaluate_independent,
]


@pytest.mark.parametrize("evaluate", PROTOCOLS)
def test_what_is_scored_and_what_is_not(evaluate):
    """At a limit whole documents, of an only one its beginning, whose bytes are unknown; nothing and NaN are told."""

    def read(documents, **options):
        return evaluate(make_exact(), make_split(documents), batch_size=4, **options)

    whole, cut = read(DOCUMENTS[:3]), read(DOCUMENTS, max_tokens=36 + 1 + 62)
    assert (cut.num_documents, cut.num_bytes) == (2, whole.num_bytes)
    assert cut.perplexity == pytest.approx(whole.perplexity, rel=1e-9)
    assert read(DOCUMENTS, max_tokens=NUM_SCORED).num_tokens == NUM_SCORED
    cut = read(DOCUMENTS, max_tokens=20)
    assert (cut.num_tokens, cut.num_documents) == (20, 1)
    assert cut.num_bytes is cut.num_words is cut.bits_per_byte is cut.word_perplexity is None
    assert cut.perplexity == pytest.approx(read([DOCUMENTS[0][:21]]).perplexity, rel=1e-9)
    for documents in ([], [[3]], [[], [1]]):
        with pytest.raises(UserError, match="nothing to score"):
            read(documents)
    for value in (math.nan, 1e9):
        model = make_exact()
        model.embed_out.weight.data.mul_(value)
        assert not math.isfinite(evaluate(model, SPLIT, batch_size=2).perplexity)


@pytest.mark.parametrize("evaluate", PROTOCOLS)
def test_modes_and_held_memory_come_back_and_progress_is_told(evaluate):
    model = make_exact()
    held = model.get_memory_state()
    model.train().extra = torch.nn.Dropout().eval()  # a part that is frozen in evaluation mode stays so
    told, entered = [], []

    def check_modes(*arguments):
        assert not model.training
        assert torch.is_inference_mode_enabled()

    def autocast():
        entered.append(True)
        return torch.autocast("cpu", enabled=False)

    model.embed_in.register_forward_pre_hook(check_modes)
    evaluate(model, SPLIT, batch_size=3, autocast=autocast, on_progress=lambda *x: told.append(x))
    assert model.training
    assert not model.extra.training
    assert_states_equal(model.get_memory_state(), held)
    assert told[-1] == (NUM_SCORED, NUM_SCORED)
    assert told == sorted(told)
    assert entered == [True]


def test_positions_equal_a_naive_loop():
    model = make_exact()
    settings = EvalConfig(position_edges=(0, 4, 16, 32), batch_size=4, max_tokens=None)
    found = evaluation.Positions().run(evaluation.Subject(model, None, SPLIT, settings, seq_length=20))["ranges"]
    by_position = {}
    for document in DOCUMENTS:
        for begin in range(0, len(document), 20):
            for position, loss in enumerate(read_naively(model, document[begin : begin + 20]), start=1):
                by_position.setdefault(position, []).append(loss)
    assert [(entry["start"], entry["end"]) for entry in found] == [(0, 4), (4, 16), (16, 20)]
    for entry in found:
        losses = [x for p in range(entry["start"], entry["end"]) for x in by_position.get(p, [])]
        assert entry["num_tokens"] == len(losses)
        assert entry["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("perplexity", "level", "range_", "text"),
    [
        (4.99, "abnormal", "< 5", "the model sees the tokens it should predict"),
        (5, "suspicious", "5–30", "overfit, or trained on this text"),
        (30, "normal", "30–100", "normal for small data: train on more text to lower it"),
        (100, "normal", "100–500", "normal for a model trained from scratch: train longer to lower it"),
        (500, "training", "500–1000", "still training"),
        (14204, "undertrained", "> 1000", "undertrained: train longer"),
        (math.inf, "abnormal", "not finite", "training diverged"),
    ],
)
def test_verdicts(perplexity, level, range_, text):
    verdict = evaluation.diagnose_perplexity(perplexity)
    assert (verdict.level, verdict.range) == (level, range_)
    assert verdict.text.startswith(text)


@pytest.mark.parametrize("evaluate", [*PROTOCOLS, partial(evaluation.evaluate_rolling, context=8, prefix_token=4)])
def test_a_stopped_measurement_is_partial_and_says_so(evaluate):
    evaluate = partial(evaluate, make_exact(), SPLIT)
    whole = evaluate(batch_size=2)
    assert whole.is_complete
    assert whole.to_dict()["is_complete"]
    stopped = evaluate(batch_size=2, should_stop=iter([False, False, True]).__next__)
    assert 0 < stopped.num_tokens < stopped.num_planned == whole.num_planned
    assert not stopped.is_complete
    assert stopped.num_bytes is stopped.num_words is stopped.bits_per_byte is stopped.word_perplexity is None
    assert math.isfinite(stopped.perplexity)


@pytest.mark.parametrize("context", [1, 7, 24, 200])
def test_rolling_scores_every_token_in_the_harness_s_windows(context):
    model, prefix, losses = make_exact(), 4, []
    for document in DOCUMENTS:
        for begin in range(0, len(document), context):  # disjoint scores, before each a context of at least one token
            end = min(begin + context, len(document))
            window = document[end - context - 1 : end] if begin else [prefix, *document[:end]]
            losses += read_naively(model, window)[begin - end :]
    result = evaluation.evaluate_rolling(model, SPLIT, context=context, prefix_token=prefix, batch_size=5)
    assert result.num_tokens == result.num_planned == sum(map(len, DOCUMENTS))
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-9)
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / SPLIT.num_bytes.sum(), rel=1e-9)
    assert (result.protocol, result.context, result.prefix_token) == ("rolling", context, prefix)


@pytest.mark.parametrize(
    ("freedom", "confidence", "quantile"),
    [(2, 0.95, 4.303), (4, 0.99, 4.604), (10, 0.9, 1.812), (120, 0.95, 1.980)],
)
def test_the_intervals_of_student_and_of_wilson_have_the_printed_quantiles(freedom, confidence, quantile):
    """Student's from printed tables."""
    values = np.random.default_rng(freedom).normal(size=freedom + 1)
    low, high = find_t_interval(values, confidence)
    half = quantile * values.std(ddof=1) / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=4e-4)
    assert (high + low) / 2 == pytest.approx(values.mean())
    for hits, expected in ((10, (0.2993, 0.7007)), (0, (0, 0.1611)), (20, (0.8389, 1))):
        assert find_share_interval(hits, 20, 0.95) == pytest.approx(expected, abs=1e-4)
    assert find_t_interval([3.0], 0.95) == find_t_interval([3.0, 4.0], 0.95) == (None, None)


def make_losses(seed_spread, document_spread, effect, draw, seeds=5, documents=8):
    """Two models' losses by seed, whose differences vary by seed and by document, and documents by a whole nat."""
    rng = np.random.default_rng(draw)
    counts = rng.integers(50, 200, size=documents)
    hard = rng.normal(5, 1, size=documents)
    worth = rng.normal(0, document_spread, documents) + rng.normal(0, seed_spread, seeds)[:, None] + effect
    one, other = (
        {seed: DocumentLosses.read(counts, (hard + own) * counts) for seed, own in enumerate(differences)}
        for differences in (worth, np.zeros((seeds, documents)))
    )
    return one, other


@pytest.mark.parametrize(("seed_spread", "document_spread"), [(0.02, 0.001), (0.001, 0.05), (0.02, 0.05)])
def test_an_interval_covers_and_an_effect_is_seen_as_often_as_said(seed_spread, document_spread):
    def compare(effect):
        return [compare_models(*make_losses(seed_spread, document_spread, effect, draw)) for draw in range(300)]

    nulls = compare(0.0)
    effects = compare(float(np.mean([found.smallest_visible for found in nulls])))
    assert sum(found.low <= 0 <= found.high for found in nulls) / 300 == pytest.approx(0.95, abs=0.035)
    assert sum(found.is_clear for found in effects) / 300 == pytest.approx(0.8, abs=0.12)


def test_too_few_seeds_or_documents_and_other_splits_give_no_interval():
    def read(**numbers):
        return compare_models(*make_losses(0.01, 0.01, -0.05, 0, **numbers))

    assert read().relative.value == pytest.approx(np.expm1(read().nats))
    assert read(seeds=1).high < 0  # over documents alone
    assert read(seeds=2)[1:4] == read(documents=4)[1:4] == (None, None, None)
    one, other = make_losses(0.01, 0.01, -0.05, 0)
    assert compare_models(one, {7: other[0]}) is None
    moved = DocumentLosses.read(other[1].num_tokens[:, 0] + 1, other[1].total_nll[:, 0])
    assert compare_models(one, other | {1: moved}) is None


@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_every_token_but_the_first_is_scored_once_with_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    windows = plan_windows(length, context, stride)
    scored = [index for window in windows for index in range(window.first_scored, window.end)]
    assert scored == list(range(1, length))
    for window in windows:
        assert 0 <= window.begin < window.first_scored < window.end <= length
        assert window.end - 1 - window.begin <= context  # what the model reads
        assert window.begin % stride == 0
        assert window.first_scored - window.begin >= min(window.first_scored, context - stride)


def test_rows_of_a_batch_are_as_many_as_idle_least_on_a_cpu_and_all_on_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_rows([8000] * 4, 512, 16, cpu) == 4
    assert choose_rows([8000, *[1000] * 8], 512, 16, cpu) == 2  # eight short ones beside the long one
    assert choose_rows([8000, *[1000] * 8], 512, 16, gpu) == 9
    assert choose_rows([8000] * 4, 512, 3, gpu) == 3
    assert choose_rows([], 512, 16, cpu) == 0

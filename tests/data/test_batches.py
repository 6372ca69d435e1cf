"""Plans of batches: every sample once, labels unshifted, rows that carry memory; curricula of segments."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from new_llm.config import DataConfig, UserError
from new_llm.data.batches import IGNORED_LABEL, Batch, BatchPlan, list_shapes, plan_batches
from new_llm.data.tokenizer import TokenSplit, count_samples
from training_cases import make_trainer


def make_split(lengths: list[int], num_pinned: int = 0) -> TokenSplit:
    """Documents whose token at position p of the split is p itself: a token tells where it is from."""
    return tiny.make_split(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]), num_pinned=num_pinned)


def expected_samples(split: TokenSplit, seq_length: int) -> list[tuple[int, ...]]:
    samples = []
    for document in range(split.num_documents):
        tokens = split.document(document).tolist()
        pieces = [tokens[i : i + seq_length] for i in range(0, len(tokens), seq_length)]
        samples += [tuple(piece) for piece in pieces if len(piece) >= 2]
    return samples


def find_document(split: TokenSplit, sample: tuple[int, ...]) -> int:
    return int(np.searchsorted(split.offsets, sample[0], "right"))


def mask_of(batch: Batch) -> torch.Tensor:
    return batch.input_ids >= 0 if batch.attention_mask is None else batch.attention_mask


def read_plan(plan: BatchPlan) -> list[list[tuple[int, ...]]]:
    pairs = [zip(batch.input_ids, mask_of(batch), strict=True) for batch in plan]
    return [[tuple(ids[real].tolist()) for ids, real in rows] for rows in pairs]


plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 23), min_size=1, max_size=12).filter(lambda sizes: max(sizes) >= 2),
        "seq_length": st.integers(2, 7),
        "batch_size": st.integers(1, 5),
        "seed": st.integers(0, 99),
        "epoch": st.integers(0, 5),
    }
)


@pytest.mark.parametrize("order", ["stream", "shuffled"])
@given(arguments=plans)
def test_every_sample_is_used_once_and_its_labels_are_its_tokens_and_the_document_s_next_one(order, arguments):
    split = make_split(arguments.pop("lengths"))
    T, used = arguments["seq_length"], []
    ends = set((split.offsets[1:] - 1).tolist())
    for batch in plan_batches(split, order=order, **arguments):
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        assert batch.labels.shape == (len(batch.resets), T + 1)
        assert batch.attention_mask is None or not batch.attention_mask.all()
        for ids, labels, real in zip(batch.input_ids, batch.labels, mask_of(batch), strict=True):
            size = int(real.sum())
            assert real[:size].all()
            assert not ids[size:].any()
            used += [tuple(ids[:size].tolist())] * bool(size)
            assert torch.equal(labels[:size], ids[:size])
            if size and int(ids[size - 1]) not in ends:
                assert size == T
                assert labels[T] == ids[T - 1] + 1
                size += 1
            assert (labels[size:] == IGNORED_LABEL).all()
    assert sorted(used) == sorted(expected_samples(split, T))
    assert count_samples(np.diff(split.offsets), T).sum() == len(used)


@given(arguments=plans)
def test_stream_rows_read_documents_in_order_and_reset_between_them(arguments):
    split = make_split(arguments.pop("lengths"))
    T, B = arguments["seq_length"], arguments["batch_size"]
    plan = plan_batches(split, order="stream", **arguments)
    batches = read_plan(plan)
    resets = [batch.resets.tolist() for batch in plan]
    assert all(len(rows) == B for rows in batches)
    assert all(resets[0])
    sizes = []
    for row in range(B):
        samples = [rows[row] for rows in batches]
        real = [sample for sample in samples if sample]
        assert samples[: len(real)] == real, "only a row's end may be empty"
        sizes.append(len(real))
        for step, (before, after) in enumerate(pairwise(real), start=1):
            same = find_document(split, before) == find_document(split, after)
            assert resets[step][row] == (not same)
            assert not same or after[0] == before[0] + T, "a row that keeps its memory reads on where it was"
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == len(plan)


@given(arguments=plans)
def test_shuffled_samples_all_start_from_empty_memory(arguments):
    split = make_split(arguments.pop("lengths"))
    batches = list(plan_batches(split, order="shuffled", **arguments))
    assert all(batch.resets.all() for batch in batches)
    assert [len(batch.resets) for batch in batches[:-1]] == [arguments["batch_size"]] * (len(batches) - 1)


@pytest.mark.parametrize("order", ["stream", "shuffled"])
@given(arguments=plans, num_samples=st.integers(1, 30), num_pinned=st.integers(0, 3))
def test_a_subset_is_the_same_in_every_epoch_and_holds_the_pinned_documents(order, arguments, num_samples, num_pinned):
    lengths = arguments.pop("lengths")
    num_pinned = min(num_pinned, len(lengths))
    split = make_split(lengths, num_pinned)
    epoch = arguments.pop("epoch")

    def used(epoch: int) -> list[tuple[int, ...]]:
        plan = plan_batches(split, order=order, num_samples=num_samples, epoch=epoch, **arguments)
        return sorted(sample for rows in read_plan(plan) for sample in rows if sample)

    everything = expected_samples(split, arguments["seq_length"])
    chosen = used(epoch)
    assert chosen == used(epoch) == used(epoch + 1)
    assert len(chosen) == len(set(chosen)) == min(num_samples, len(everything))
    assert set(chosen) <= set(everything)
    pinned = [sample for sample in everything if sample[0] < split.offsets[num_pinned]]
    assert set(pinned[:num_samples]) <= set(chosen)
    # Whole documents but the last one, which is cut at its end.
    documents = {find_document(split, sample) for sample in chosen}
    cut = {find_document(split, sample) for sample in set(everything) - set(chosen)} & documents
    assert len(cut) <= 1


SHUFFLED = {"order": "shuffled", "seq_length": 16, "segments_per_sample": 8}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"segment_curriculum": (1, 8)}, [(16, 2), (16, 2), (2, 16), (2, 16)]),
        ({"mixed_samples": 0.4}, [(1, 16), (8, 2)] * 4),
    ],
)
def test_training_follows_the_plan_in_its_shapes(options, expected, tmp_path, monkeypatch):
    mixed = DataConfig(**SHUFFLED, num_samples=100, mixed_samples=0.25)
    assert list_shapes(mixed, 8) == ((16, 6, 100), (2, 16, 800))
    with pytest.raises(UserError, match="mixed_samples: a batch of 1 sample"):
        list_shapes(mixed, 1)
    trainer = make_trainer(tmp_path, lengths=(64,), **SHUFFLED, **options)
    forward, shapes = trainer._forward, []

    def watch(batch) -> torch.Tensor:
        shapes.append(tuple(batch.input_ids.shape))
        return forward(batch)

    monkeypatch.setattr(trainer, "_forward", watch)
    result = trainer.run()
    assert shapes == expected
    assert result.steps == 4
    assert result.tokens == pytest.approx(2 * 63, abs=2)  # a document's last token has no target

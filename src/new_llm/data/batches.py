"""Batches: which samples each row reads, in what order, and where its memory is reset."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from new_llm.config import DataConfig, UserError
from new_llm.data.recall_facts import SamplePlanter
from new_llm.data.tokenizer import TokenSplit, count_samples

IGNORED_LABEL = -100
SUBSET_STREAM = 2**32 - 1  # a random stream that no epoch's order uses


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T tokens; each row contains tokens of one document, padded on the right."""

    input_ids: Tensor
    """[B, T] int64; 0 for padding."""
    labels: Tensor
    """[B, T + 1] int64, unshifted: the input ids, then the document's next token; -100 for padding."""
    attention_mask: Tensor | None
    """[B, T] bool, true for real tokens; None if there is no padding."""
    resets: Tensor
    """[B] bool, true where a row starts a document or an independent sample and so needs an empty memory."""
    num_targets: int
    """Tokens to predict in the whole batch, including the rows of other processes."""
    label_weights: Tensor | None = None
    """[B, T + 1] float32: each label's weight in the loss; None: all are 1."""


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """One epoch's batches, each built from the memory-mapped tokens when it is indexed."""

    split: TokenSplit
    seq_length: int
    starts: NDArray[np.int64]
    """[num_samples]: where each sample begins in split.tokens."""
    counts: NDArray[np.int64]
    """[num_samples]: each sample's tokens, 2 to seq_length, plus its document's next token if any (the last target)."""
    rows: NDArray[np.int64]
    """[num_batches, batch_size]: the sample of each row; -1: none."""
    resets: NDArray[np.bool_]
    """[num_batches, batch_size]: `Batch.resets`."""
    num_targets: NDArray[np.int64]
    """[num_batches]: `Batch.num_targets`; `take_rows` leaves it unchanged."""
    keep_empty_rows: bool
    """Whether a row without a sample is kept, fully masked (stream), or dropped (shuffled)."""
    epoch: int
    planter: SamplePlanter | None = None
    """Plants facts into samples, except those of pinned documents."""
    planted_weights: tuple[float, float] = (1.0, 1.0)
    """The loss weights of planted statements and of answers, the tokens that they make predictable."""

    def take_rows(self, rows: slice) -> "BatchPlan":
        """Return the same batches with only these rows, for one of several processes."""
        return replace(self, rows=self.rows[:, rows], resets=self.resets[:, rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        samples, resets = self.rows[index], self.resets[index]
        if not self.keep_empty_rows:
            kept = samples >= 0
            kept[0] |= not kept.any()  # a process without samples in the last batch reads one fully masked row
            samples, resets = samples[kept], resets[kept]
        starts = np.where(samples >= 0, self.starts[samples], 0)
        counts = np.where(samples >= 0, self.counts[samples], 0)
        columns = np.arange(self.seq_length + 1)
        has_token = columns < counts[:, None]
        positions = np.minimum(starts[:, None] + columns, len(self.split.tokens) - 1)
        tokens = np.asarray(self.split.tokens[positions]).astype(np.int64)
        weights = None if self.planter is None else self._plant(self.planter, tokens, starts, counts)
        mask = has_token[:, :-1]
        return Batch(
            input_ids=torch.from_numpy(np.where(mask, tokens[:, :-1], 0)),
            labels=torch.from_numpy(np.where(has_token, tokens, IGNORED_LABEL)),
            attention_mask=None if mask.all() else torch.from_numpy(mask),
            resets=torch.from_numpy(resets.copy()),
            num_targets=int(self.num_targets[index]),
            label_weights=None if weights is None else torch.from_numpy(weights),
        )

    def _plant(
        self, planter: SamplePlanter, tokens: NDArray[np.int64], starts: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Plant facts into the first `counts` tokens of each row, in place; return the labels' weights."""
        weights = np.ones(tokens.shape, np.float32)
        pinned_end = self.split.offsets[self.split.num_pinned_documents]
        for row, (begin, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            if begin >= pinned_end:
                tokens[row, :count], kinds = planter.plant(tokens[row, :count], self.epoch, begin)
                weights[row, :count] = np.array([1.0, *self.planted_weights])[kinds]
        return weights


def plan_batches(
    split: TokenSplit,
    *,
    seq_length: int,
    batch_size: int,
    order: Literal["stream", "shuffled"],
    seed: int,
    epoch: int,
    num_samples: int | None = None,
    planter: SamplePlanter | None = None,
    planted_weights: tuple[float, float] = (1.0, 1.0),
) -> BatchPlan:
    """Plan one epoch, in which every sample is used exactly once.

    A pure function of its arguments, so that a run can resume at any batch. A sample is seq_length tokens of one
    document; a document's tail is a shorter sample if it has at least 2 tokens.

    Args:
        seq_length: tokens per sample, T.
        batch_size: rows, B.
        order: `stream` shuffles the documents each epoch, lays their samples end to end and cuts this list
            into B contiguous ranges, one per row; if the ranges differ by one sample, shorter rows end fully masked.
            `shuffled` permutes the samples: each starts from an empty memory, and the last batch may have fewer
            rows.
        seed: chooses the subset and, together with the epoch, the order.
        num_samples: use this many samples, the same in every epoch: the pinned documents first, then whole
            documents in a seeded order, the last one cut; None: all.
        planter: plants facts into the samples; needs `shuffled`, because the end of a sample is lost.
        planted_weights: the loss weights of planted statements and of answers; see `BatchPlan`.

    Raises:
        ValueError: the split has no sample.
    """
    rng = np.random.default_rng([seed, epoch])
    documents, num_each = _choose_samples(split, seq_length, seed, num_samples)
    shuffled = rng.permutation(len(documents))
    documents, num_each = documents[shuffled], num_each[shuffled]

    document = np.repeat(documents, num_each)
    total = len(document)
    if not total:
        raise ValueError(f"the split has no sample: none of its {split.num_documents} documents has 2 tokens or more")
    sample_in_document = np.arange(total) - np.repeat(np.cumsum(num_each) - num_each, num_each)
    starts = split.offsets[document] + sample_in_document * seq_length
    counts = np.minimum(split.offsets[document + 1] - starts, seq_length + 1)

    rows = np.full((-(-total // batch_size), batch_size), -1, dtype=np.int64)
    if order == "stream":
        for row, samples in enumerate(np.array_split(np.arange(total), batch_size)):
            rows[: len(samples), row] = samples
        resets = np.append(sample_in_document == 0, False)[rows]  # the appended entry serves rows of -1
        resets[0] = True
    else:
        rows.reshape(-1)[:total] = rng.permutation(total)
        resets = np.ones_like(rows, dtype=bool)
    return BatchPlan(
        split,
        seq_length,
        starts,
        counts,
        rows,
        resets,
        num_targets=np.append(counts - 1, 0)[rows].sum(axis=1),
        keep_empty_rows=order == "stream",
        epoch=epoch,
        planter=planter,
        planted_weights=planted_weights,
    )


def _choose_samples(
    split: TokenSplit, seq_length: int, seed: int, num_samples: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the documents of the subset and the number of samples of each; the same for every epoch."""
    counts = count_samples(split.lengths, seq_length)
    documents = np.arange(split.num_documents)
    if num_samples is not None:
        pinned = split.num_pinned_documents
        others = np.random.default_rng([seed, SUBSET_STREAM]).permutation(documents[pinned:])
        documents = np.concatenate([documents[:pinned], others])
        before = np.cumsum(counts[documents]) - counts[documents]
        counts = np.minimum(counts[documents], np.maximum(num_samples - before, 0))
    return documents[counts > 0], counts[counts > 0]


class BatchShape(NamedTuple):
    """How the text of an epoch is cut into samples and batches."""

    seq_length: int
    """Tokens per sample."""
    batch_size: int
    """Rows per batch."""
    num_samples: int | None
    """Samples per epoch; None: all."""


def shape_batches(data: DataConfig, batch_size: int, segments: int) -> BatchShape:
    """Return the shape of batches whose samples have `segments` segments; tokens per batch and epoch stay the same."""
    share = data.segments_per_sample // segments
    num_samples = None if data.num_samples is None else data.num_samples * share
    return BatchShape(data.seq_length // share, batch_size * share, num_samples)


def count_singles(data: DataConfig, batch_size: int) -> int:
    """Return how many of a batch's whole samples `data.mixed_samples` replaces by single segments."""
    if batch_size < 2:
        raise UserError(
            f"data.mixed_samples: a batch of {batch_size} sample can't be mixed; train.batch_size must be 2 or more"
        )
    return min(batch_size - 1, max(1, round(data.mixed_samples * batch_size)))


def list_shapes(data: DataConfig, batch_size: int) -> tuple[BatchShape, ...]:
    """List the batch shapes that training uses: mixed samples, the curriculum's stages, or whole samples alone."""
    if data.mixed_samples:
        singles = count_singles(data, batch_size)
        whole = shape_batches(data, batch_size - singles, data.segments_per_sample)
        return whole, shape_batches(data, singles, 1)
    stages = dict.fromkeys(data.segment_curriculum or (data.segments_per_sample,))
    return tuple(shape_batches(data, batch_size, segments) for segments in stages)


@dataclass(frozen=True, eq=False)
class JoinedPlan:
    """One epoch's batches from several plans; `turns` holds each batch's plan and its number in that plan.

    With `data.mixed_samples` a step takes two batches: whole samples, and single segments from many documents.

    Each plan has its own order, so that within an epoch some text is read twice and some not at all. Samples of
    different lengths leave different tails, so a plan may have a few batches fewer than needed; its first ones are then
    read again.
    """

    turns: tuple[tuple[BatchPlan, int], ...]

    def __len__(self) -> int:
        return len(self.turns)

    def __getitem__(self, index: int) -> Batch:
        plan, number = self.turns[index]
        return plan[number % len(plan)]


def plan_curriculum(
    stages: Sequence[int], epoch: int, num_epochs: int, num_batches: int, plan: Callable[[int], BatchPlan]
) -> JoinedPlan:
    """Plan one epoch of a training whose batches are divided evenly among the stages (segments per sample, in order).

    `plan` returns the epoch's batches of samples with a given number of segments; all have equal tokens per batch.
    """
    total, first = num_epochs * num_batches, epoch * num_batches
    last = len(stages) - 1  # for epochs beyond num_epochs, where training ends by the clock
    chosen = [stages[min(last, (first + number) * len(stages) // total)] for number in range(num_batches)]
    plans = {stage: plan(stage) for stage in set(chosen)}
    return JoinedPlan(tuple((plans[stage], number) for number, stage in enumerate(chosen)))

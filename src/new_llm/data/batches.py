"""Batches: which samples per row reads, in what order, and where its memory must be emptied."""

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
SUBSET_STREAM = 2**32 - 1  # keeps the choice of samples apart from every epoch's order


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T tokens; a row holds tokens of one document, padded at the right."""

    input_ids: Tensor
    """[B, T] int64; 0 where padded."""
    labels: Tensor
    """[B, T + 1] int64, unshifted: the input ids, then the document's next token; -100 where none is."""
    attention_mask: Tensor | None
    """[B, T] bool: real tokens; None where all are."""
    resets: Tensor
    """[B] bool: this row starts a document or an independent sample, from an empty memory."""
    num_targets: int
    """Tokens to predict in the whole batch, those in other processes' rows among them."""
    label_weights: Tensor | None = None
    """[B, T + 1] float32: the weight in the loss of each label; None: all weigh 1."""


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """One epoch's batches, each built from the memory-mapped tokens when it is asked for by its index."""

    split: TokenSplit
    seq_length: int
    starts: NDArray[np.int64]
    """[num_samples]: where each sample begins in split.tokens."""
    counts: NDArray[np.int64]
    """[num_samples]: its tokens, 2 to seq_length, and the next one where its document goes on: the last target."""
    rows: NDArray[np.int64]
    """[num_batches, batch_size]: the sample of each row; -1: none."""
    resets: NDArray[np.bool_]
    """[num_batches, batch_size]: `Batch.resets`."""
    num_targets: NDArray[np.int64]
    """[num_batches]: `Batch.num_targets`; taking some of the rows leaves it as it is."""
    keep_empty_rows: bool
    """A row without a sample stays, all masked (stream), or is left out (shuffled)."""
    epoch: int
    """Which pass this is."""
    planter: SamplePlanter | None = None
    """Plants facts into the samples, but into none of the pinned documents."""
    answer_weight: float = 1.0
    """The weight in the loss of tokens that a planted fact lets one know."""

    def take_rows(self, rows: slice) -> "BatchPlan":
        """The same batches with some of their rows: what one of several processes reads."""
        return replace(self, rows=self.rows[:, rows], resets=self.resets[:, rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        samples, resets = self.rows[index], self.resets[index]
        if not self.keep_empty_rows:
            kept = samples >= 0
            kept[0] |= not kept.any()  # a process whose rows of the last batch are all empty reads one, all masked
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
        """Plant facts into the first `counts` tokens of each row, in place; the labels' weights."""
        weights = np.ones(tokens.shape, np.float32)
        pinned_end = self.split.offsets[self.split.num_pinned_documents]
        for row, (begin, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            if begin >= pinned_end:
                tokens[row, :count], is_answer = planter.plant(tokens[row, :count], self.epoch, begin)
                weights[row, :count][is_answer] = self.answer_weight
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
    answer_weight: float = 1.0,
) -> BatchPlan:
    """Plan one epoch: every sample is used exactly once.

    A pure function of its arguments, so that a run resumes at any batch. A sample is seq_length tokens of one
    document; the document's tail is a shorter one, if it has at least 2 tokens.

    Args:
        seq_length: tokens in a sample, T.
        batch_size: rows, B.
        order: `stream` shuffles the documents each epoch, lays their samples end to end and cuts the list
            into B contiguous ranges, one per row; where ranges differ by one, the shorter rows end all masked.
            `shuffled` permutes the samples: each starts from empty memory, and the last batch may have fewer
            rows.
        seed: of the subset and, with the epoch, of the order.
        num_samples: take this many samples, the same in every epoch: the pinned documents first, then whole
            documents in a seeded order, the last one cut; None: all.
        planter: plants facts into the samples, which must be shuffled: a sample's end is lost.
        answer_weight: the weight in the loss of tokens that a planted fact lets one know.

    Raises:
        ValueError: the split holds no sample.
    """
    rng = np.random.default_rng([seed, epoch])
    documents, num_each = _choose_samples(split, seq_length, seed, num_samples)
    shuffled = rng.permutation(len(documents))
    documents, num_each = documents[shuffled], num_each[shuffled]

    document = np.repeat(documents, num_each)
    total = len(document)
    if not total:
        raise ValueError(
            f"the split holds no sample: no document has 2 tokens or more ({split.num_documents} documents)"
        )
    sample_in_document = np.arange(total) - np.repeat(np.cumsum(num_each) - num_each, num_each)
    starts = split.offsets[document] + sample_in_document * seq_length
    counts = np.minimum(split.offsets[document + 1] - starts, seq_length + 1)

    rows = np.full((-(-total // batch_size), batch_size), -1, dtype=np.int64)
    if order == "stream":
        for row, samples in enumerate(np.array_split(np.arange(total), batch_size)):
            rows[: len(samples), row] = samples
        resets = np.append(sample_in_document == 0, False)[rows]  # the last entry is that of row -1: none
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
        answer_weight=answer_weight,
    )


def _choose_samples(
    split: TokenSplit, seq_length: int, seed: int, num_samples: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The documents of the subset and how many samples of each, the same for every epoch."""
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
    """Tokens in a sample."""
    batch_size: int
    """Rows of a batch."""
    num_samples: int | None
    """Samples of an epoch; None: all."""


def shape_batches(data: DataConfig, batch_size: int, segments: int) -> BatchShape:
    """Samples of this many segments, with as many tokens per batch and epoch as whole samples have."""
    share = data.segments_per_sample // segments
    num_samples = None if data.num_samples is None else data.num_samples * share
    return BatchShape(data.seq_length // share, batch_size * share, num_samples)


def count_singles(data: DataConfig, batch_size: int) -> int:
    """How many of a batch's whole samples `data.mixed_samples` replaces by as many tokens in single segments."""
    if batch_size < 2:
        raise UserError(
            f"data.mixed_samples: a batch of {batch_size} sample can't be mixed; train.batch_size must be 2"
        )
    return min(batch_size - 1, max(1, round(data.mixed_samples * batch_size)))


def list_shapes(data: DataConfig, batch_size: int) -> tuple[BatchShape, ...]:
    """The shapes of all batches of a training: those of the curriculum's stages, of mixed samples, or of whole ones."""
    if data.mixed_samples:
        singles = count_singles(data, batch_size)
        whole = shape_batches(data, batch_size - singles, data.segments_per_sample)
        return whole, shape_batches(data, singles, 1)
    stages = dict.fromkeys(data.segment_curriculum or (data.segments_per_sample,))
    return tuple(shape_batches(data, batch_size, segments) for segments in stages)


@dataclass(frozen=True, eq=False)
class JoinedPlan:
    """One epoch's batches from several plans: of which plan each is, and its number there.

    With `data.mixed_samples` a step is two of them, samples of all segments and single segments from many documents.

    Each plan reads its part in an order of its own, so that in an epoch some text is read twice and some not at all.
    Samples of other lengths end in other tails, so that a plan may have a few batches fewer than it is asked for: its
    first ones are then read again.
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
    """Plan one epoch of a training whose batches are divided evenly over the stages (segments of a sample, in order).

    `plan` makes the epoch's batches of samples with this many segments, with equal tokens per batch for each number.
    """
    total, first = num_epochs * num_batches, epoch * num_batches
    last = len(stages) - 1  # for epochs beyond num_epochs, where training ends by the clock
    chosen = [stages[min(last, (first + number) * len(stages) // total)] for number in range(num_batches)]
    plans = {stage: plan(stage) for stage in set(chosen)}
    return JoinedPlan(tuple((plans[stage], number) for number, stage in enumerate(chosen)))

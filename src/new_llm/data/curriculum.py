"""A curriculum in segments: training begins with short samples of many documents and goes on to longer ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from new_llm.config import DataConfig
from new_llm.data.batches import Batch, BatchPlan, BatchSequence


class BatchShape(NamedTuple):
    """How the text of an epoch is cut into samples and batches."""

    seq_length: int
    """Tokens in a sample."""
    batch_size: int
    """Rows of a batch."""
    num_samples: int | None
    """Samples of an epoch; None: all."""


def shape_batches(data: DataConfig, batch_size: int, segments: int) -> BatchShape:
    """Samples of so many segments, at the tokens a batch and an epoch that whole samples have.

    Args:
        data: says what a whole sample is.
        batch_size: whole samples in a batch.
        segments: a divisor of the segments of a whole sample.
    """
    share = data.segments_per_sample // segments
    num_samples = None if data.num_samples is None else data.num_samples * share
    return BatchShape(data.seq_length // share, batch_size * share, num_samples)


def list_shapes(data: DataConfig, batch_size: int) -> tuple[BatchShape, ...]:
    """The shapes of all batches of a training: those of the curriculum's stages, or the one of whole samples."""
    stages = dict.fromkeys(data.segment_curriculum or (data.segments_per_sample,))
    return tuple(shape_batches(data, batch_size, segments) for segments in stages)


@dataclass(frozen=True, eq=False)
class CurriculumPlan(BatchSequence):
    """One epoch's batches, each of the samples that its stage asks for.

    A stage of k segments reads samples of k segments, as many tokens a batch as without a curriculum. Samples of
    other lengths end in other tails, so that an epoch of a stage may have a few batches more or fewer than the plain
    one: what is over is left out, and what is missing is read again from the epoch's first batches. Where two stages
    share an epoch, each reads its part of an order of its own: some text is read twice and some not at all.
    """

    plans: Mapping[int, BatchPlan]
    """By segments of a sample, the epoch's batches."""
    stages: tuple[int, ...]
    """Segments of each batch's samples."""

    def __len__(self) -> int:
        return len(self.stages)

    def build(self, index: int) -> Batch:
        """The batch of the plan whose turn it is."""
        plan = self.plans[self.stages[index]]
        return plan[index % len(plan)]


def plan_curriculum(
    stages: Sequence[int], epoch: int, num_epochs: int, num_batches: int, plan: Callable[[int], BatchPlan]
) -> CurriculumPlan:
    """Plan one epoch of a training whose batches are divided evenly over the stages.

    Args:
        stages: segments of a sample in each stage, in order.
        epoch: which pass this is, from 0.
        num_epochs: passes in all.
        num_batches: batches of an epoch.
        plan: makes the epoch's batches of samples of so many segments.
    """
    total = num_epochs * num_batches
    first = epoch * num_batches
    chosen = tuple(stages[(first + number) * len(stages) // total] for number in range(num_batches))
    return CurriculumPlan({stage: plan(stage) for stage in set(chosen)}, chosen)

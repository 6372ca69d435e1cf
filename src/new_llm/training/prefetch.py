"""Batches made ahead of the step that needs them, by a thread."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from new_llm.data.batches import Batch


@contextmanager
def prefetch_batches(plan: Sequence[Batch], first: int, num_ahead: int, *, pin: bool) -> Iterator[Iterator[Batch]]:
    """Inside the block: an iterator over the plan's batches from `first` on, in their order.

    Args:
        plan: an epoch's batches.
        first: where to begin.
        num_ahead: batches that the thread makes ahead; 0: none, each is made when it is asked for.
        pin: put tensors in page-locked memory, from which a GPU copies while it computes.
    """

    def make(number: int) -> Batch:
        batch = plan[number]
        return pin_batch(batch) if pin else batch

    numbers = iter(range(first, len(plan)))
    if num_ahead == 0:
        yield map(make, numbers)
        return
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    ahead: deque[Future[Batch]] = deque()

    def take() -> Iterator[Batch]:
        for _ in range(first, len(plan)):
            while len(ahead) < num_ahead and (number := next(numbers, None)) is not None:
                ahead.append(executor.submit(make, number))
            yield ahead.popleft().result()

    try:
        yield take()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def pin_batch(batch: Batch) -> Batch:
    """The batch in page-locked memory; `resets` stays, since the host reads it."""
    mask, weights = batch.attention_mask, batch.label_weights
    return replace(
        batch,
        input_ids=batch.input_ids.pin_memory(),
        labels=batch.labels.pin_memory(),
        attention_mask=None if mask is None else mask.pin_memory(),
        label_weights=None if weights is None else weights.pin_memory(),
    )

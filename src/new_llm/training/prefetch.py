"""Batches made ahead of the step that needs them, by a thread."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

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
        return map_tensors(batch, Tensor.pin_memory) if pin else batch

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


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with its tensors changed, but for `resets`, which the host reads."""
    mask, weights = batch.attention_mask, batch.label_weights
    return replace(
        batch,
        input_ids=change(batch.input_ids),
        labels=change(batch.labels),
        attention_mask=None if mask is None else change(mask),
        label_weights=None if weights is None else change(weights),
    )

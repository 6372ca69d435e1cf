"""Reading a text in pieces of any size, with the same result as reading it whole."""

from typing import Any

import torch
from torch import Tensor

from new_llm.models.inputs import check_input_ids, mark_valid, plan_packing
from new_llm.models.layers import Layer, ReadTokens, Step


class MemoryStream:
    """Reads token by token in constant memory; the logits equal the parallel path's however the text is cut.

    Softmax layers keep keys and values of the open segment (at most S tokens), memory layers running sums of constant
    size. At a segment's end the memory is written and a new segment begins. Rows may be at different positions:
    masked tokens take none. No gradients flow through a stream; training uses the parallel path.

    A stream starts from the model's held memory and does not change it before `close(update_memory=True)`.

    Args:
        model: the `TransformerLM` that reads.
        batch_size: rows B.
        use_selective: False: a single pass, also for a model with several.
    """

    def __init__(self, model: Any, batch_size: int = 1, *, use_selective: bool = True) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is not positive")
        self.model = model
        self.batch_size = batch_size
        self.device = model.embed_in.weight.device
        self.memories, self._start = model._begin_call(batch_size, self.device)
        self._start_rows = model.memory_rows
        self.num_passes: int = model.count_passes(use_selective)
        self.opened: list[list[Any]] = [[None] * len(model.layers) for _ in range(self.num_passes)]
        self._head_weight: Tensor | None = None  # computed once per stream: calling a wrapped head is slow
        self.offsets = torch.zeros(batch_size, dtype=torch.int64)  # planned on the host, like the pieces below
        self.num_tokens = torch.zeros(batch_size, dtype=torch.int64)
        self._is_closed = False
        self._is_reset = False

    @torch.no_grad()
    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read the next tokens [B, T] and return their logits [B, T, Z]; masked tokens are skipped."""
        return self.model.embed_out(self.feed_hidden(input_ids, attention_mask))

    @torch.no_grad()
    def feed_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """As `feed`, but returns the hidden states before the head, [B, T, D]."""
        if self._is_closed:
            raise ValueError("the stream is closed: open another")
        check_input_ids(input_ids, self.model.vocab_size)
        if input_ids.shape[0] != self.batch_size:
            raise ValueError(f"{input_ids.shape[0]} rows of tokens for a stream of {self.batch_size}")
        packing = plan_packing(attention_mask, input_ids)
        if packing is None:
            lengths = torch.full((self.batch_size,), input_ids.shape[1])
            return self._feed_packed(input_ids, lengths)
        assert attention_mask is not None
        lengths = attention_mask.to(torch.bool).sum(1).cpu()  # of a mask on the host, without waiting for the device
        return packing.unpack(self._feed_packed(packing.pack(input_ids), lengths))

    def _feed_packed(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Feed rows up to their segment's end, repeatedly; whole segments take the parallel path."""
        segment_length = self.model.segment_length
        hidden: Tensor | None = None
        fed = torch.zeros_like(lengths)
        while bool((fed < lengths).any()):
            left = lengths - fed
            whole = int(left[0]) // segment_length * segment_length
            if whole and not self.offsets.any() and bool((left == left[0]).all()) and bool((fed == fed[0]).all()):
                begin = int(fed[0])
                piece = self._run_whole(input_ids[:, begin : begin + whole])
                taken = torch.full_like(fed, whole)
            else:
                taken = torch.minimum(left, segment_length - self.offsets)
                piece = self._run_open(input_ids, fed, taken)
            if hidden is None:
                hidden = piece.new_zeros(*input_ids.shape, piece.shape[-1])
            self._put(hidden, piece, fed, taken)
            fed = fed + taken
        self.num_tokens = self.num_tokens + lengths
        if hidden is None:  # every token was masked
            hidden = torch.zeros_like(self.model.embed_in(input_ids))
        return hidden

    @torch.no_grad()
    def reset_rows(self, rows: Tensor) -> None:
        """Restart some rows, [B] bool, from empty memory, as where a row's next document begins."""
        if rows.shape != (self.batch_size,):
            raise ValueError(f"reset_rows of shape {tuple(rows.shape)} for a stream of {self.batch_size} rows")
        chosen = rows.to(self.device, torch.bool, non_blocking=True)
        for index, layer in enumerate(self.model.layer_list):
            memory = self.memories[index]
            for opened in self.opened:
                opened[index], _ = layer.end_segments(opened[index], memory, chosen)
            if memory is not None:
                self.memories[index] = memory.emptied().select_rows(chosen, memory)
        self.offsets = torch.where(rows.cpu().to(torch.bool), 0, self.offsets)
        self._is_reset = True

    def close(self, *, update_memory: bool = False) -> None:
        """End the stream; with `update_memory` also write open segments and add what was read to the held memory.

        What the model has written in the meantime is kept.

        Raises:
            ValueError: the number of rows of the model's memory has changed since the stream began, or rows of this
                stream were reset while the memory is shared, so that their changes can't be separated.
        """
        if self._is_closed:
            return
        if update_memory and self._is_reset and self._start_rows is None:
            raise ValueError("a stream whose rows were reset can't be added to a shared memory: use one memory per row")
        if update_memory and self.model.memory_rows != self._start_rows:
            raise ValueError(
                f"the model holds {describe_rows(self.model.memory_rows)}, but {describe_rows(self._start_rows)} "
                f"when this stream of {self.batch_size} rows began: it can't take what the stream read"
            )
        self._is_closed = True
        if update_memory:
            self._end_segments(self.offsets > 0)
            self.model._hold(self.memories, self._start)

    def _run_whole(self, input_ids: Tensor) -> Tensor:
        passes, self.memories = self.model.run_segments(
            input_ids, self.memories, write_last=True, num_passes=self.num_passes
        )
        return passes[-1]

    def _run_open(self, input_ids: Tensor, fed: Tensor, taken: Tensor) -> Tensor:
        longest, begin, start = int(taken.max()), int(fed[0]), int(self.offsets[0])
        is_level = self._is_level(taken)
        if is_level and bool((fed == begin).all()):  # as when text is generated: nothing to send to a device
            tokens = input_ids[:, begin : begin + longest]
            offsets, counts = torch.full((self.batch_size,), start, device=self.device), None
        else:
            columns = (fed.unsqueeze(1) + torch.arange(longest)).clamp(max=input_ids.shape[1] - 1)
            plan = torch.cat((columns, self.offsets.unsqueeze(1), taken.unsqueeze(1)), dim=1)
            plan = plan.to(self.device, non_blocking=True)
            tokens, offsets, counts = input_ids.gather(1, plan[:, :longest]), plan[:, -2].contiguous(), plan[:, -1]
        step = Step(
            offsets=offsets,
            positions=offsets.unsqueeze(1) + torch.arange(longest, device=self.device),
            valid=None if counts is None or bool((taken == longest).all()) else mark_valid(counts, longest),
            longest=int((self.offsets + taken).max()),
            segment_length=self.model.segment_length,
            start=start if is_level else None,
            tokens=self._describe_tokens(tokens),
        )
        hidden = embedded = self.model.embed_in(tokens)
        for number, opened in enumerate(self.opened):

            def run(index: int, layer: Layer, entering: Tensor, opened: list[Any] = opened) -> Tensor:
                entering, opened[index] = layer.step(entering, opened[index], self.memories[index], step)
                return entering

            hidden = self.model.run_layers(self.model.begin_pass(hidden, embedded) if number else hidden, run)
        self.offsets = self.offsets + taken
        self._end_segments(self.offsets == self.model.segment_length)
        return self.model.finish_pass(hidden)

    def _describe_tokens(self, input_ids: Tensor) -> ReadTokens | None:
        if self.model.first_before_head is None:
            return None
        weight = self.model.read_head_weight() if self._head_weight is None else self._head_weight
        self._head_weight = weight
        return ReadTokens(input_ids, weight)

    def _is_level(self, taken: Tensor) -> bool:
        """Whether all rows are at the same position and take the same number of tokens."""
        return bool(((taken == taken[0]) & (self.offsets == self.offsets[0])).all())

    def _end_segments(self, ended: Tensor) -> None:
        if not bool(ended.any()):
            return
        rows = ended.to(self.device, non_blocking=True)
        for index, (layer, memory) in enumerate(zip(self.model.layer_list, self.memories, strict=True)):
            for opened in self.opened:  # every pass starts a new segment; the last pass's write is the memory
                opened[index], self.memories[index] = layer.end_segments(opened[index], memory, rows)
        self.offsets = torch.where(ended, 0, self.offsets)

    def _put(self, hidden: Tensor, piece: Tensor, fed: Tensor, taken: Tensor) -> None:
        if bool((taken == taken[0]).all()) and bool((fed == fed[0]).all()):
            begin = int(fed[0])
            hidden[:, begin : begin + piece.shape[1]] = piece
            return
        for row in range(self.batch_size):
            begin, count = int(fed[row]), int(taken[row])
            hidden[row, begin : begin + count] = piece[row, :count]


def describe_rows(rows: int | None) -> str:
    """How many memories a model holds, in words."""
    return "one memory shared by all rows" if rows is None else f"a memory for each of {rows} rows"

"""Reading text in pieces of any size, with the same result as reading it whole."""

import operator
from typing import Any

import torch
from torch import Tensor

from new_llm.formats import format_plural
from new_llm.models.inputs import check_input_ids, mark_valid, plan_packing
from new_llm.models.layers import Layer, ReadTokens, Step
from new_llm.models.state import keep_places, list_tensors, map_tensors

CACHE_STEP = 64
"""The cache capacity for steps in place is a multiple of this many tokens."""


class MemoryStream:
    """Reads text token by token in constant memory; however it is cut, logits equal those of `TransformerLM.forward`.

    Softmax layers hold the keys and values of the open segment (at most S tokens), memory layers hold running sums of
    constant size. At a segment's end, memory is written and a new segment starts. Rows may be at different positions,
    since masked tokens take none. A stream records no gradients.

    A stream starts from the model's held memory, and changes it only with `close(update_memory=True)`.

    Args:
        model: a `TransformerLM`.
        batch_size: number of rows B.
        use_selective: False: a single pass, even if the model has several.
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
        self._head_weight: Tensor | None = None  # cached, since reading a wrapped head is slow
        self.offsets = [0] * batch_size  # number of tokens in each row's open segment; a list, to plan without the GPU
        self.num_tokens = [0] * batch_size
        self._places: Tensor | None = None  # `offsets` on the device, [B]; only between calls of `read_token`
        self._capacity = 0
        self._is_closed = False
        self._is_reset = False
        self._is_inference = False  # whether the last call ran under inference_mode

    @torch.no_grad()
    def feed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read the next tokens [B, T] and return their logits [B, T, Z]; masked tokens are skipped."""
        return self.model.embed_out(self.feed_hidden(input_ids, attention_mask))

    @torch.no_grad()
    def feed_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Like `feed`, but returns the hidden states before the head, [B, T, D]."""
        if self._is_closed:
            raise ValueError("the stream is closed; open another one")
        check_input_ids(input_ids, self.model.vocab_size)
        if input_ids.shape[0] != self.batch_size:
            raise ValueError(f"{format_plural(input_ids.shape[0], 'row')} of tokens for a stream of {self.batch_size}")
        if self._is_inference and not torch.is_inference_mode_enabled():
            # Tensors made under inference_mode can't be changed in place outside.
            self.opened = map_tensors(self.opened, torch.clone)
        self._is_inference = torch.is_inference_mode_enabled()
        packing = plan_packing(attention_mask, input_ids)
        if packing is None:
            return self._feed_packed(input_ids, [input_ids.shape[1]] * self.batch_size)
        assert attention_mask is not None
        lengths = attention_mask.to(torch.bool).sum(1).tolist()  # does not synchronise if the mask is on the CPU
        return packing.unpack(self._feed_packed(packing.pack(input_ids), lengths))

    def _feed_packed(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """Feed each row up to its segment's end, repeatedly; whole segments take the parallel path."""
        segment_length = self.model.segment_length
        hidden: Tensor | None = None
        fed = [0] * self.batch_size
        while fed != lengths:
            left = list(map(operator.sub, lengths, fed))
            taken = [min(rest, segment_length - at) for rest, at in zip(left, self.offsets, strict=True)]
            is_level = len({*zip(self.offsets, fed, taken, strict=True)}) == 1
            begin, whole = fed[0], left[0] // segment_length * segment_length
            if whole and is_level and not self.offsets[0] and len({*left}) == 1:
                taken, one = [whole] * self.batch_size, input_ids[:, begin : begin + whole]
                passes, self.memories = self.model.run_segments(
                    one, self.memories, write_last=True, num_passes=self.num_passes
                )
                piece: Tensor = passes[-1]
            else:
                piece = self._run_open(input_ids, fed, taken, is_level=is_level)
            if is_level and piece.shape[1] == input_ids.shape[1]:
                hidden = piece
            else:
                hidden = piece.new_zeros(*input_ids.shape, piece.shape[-1]) if hidden is None else hidden
                rows = [slice(None)] if is_level else range(self.batch_size)
                for row, start, count in zip(rows, fed, taken, strict=False):
                    hidden[row, start : start + count] = piece[row, :count]
            fed = list(map(operator.add, fed, taken))
        self.num_tokens = list(map(operator.add, self.num_tokens, lengths))
        if hidden is None:  # every token was masked
            hidden = torch.zeros_like(self.model.embed_in(input_ids))
        return hidden

    # Steps in place, which a CUDA graph can hold

    @property
    def can_step_in_place(self) -> bool:
        """Whether all layers support steps in place; see `Layer.can_step_in_place`."""
        return all(layer.can_step_in_place for layer in self.model.layer_list)

    @torch.no_grad()
    def begin_steps(self, num_tokens: int) -> None:
        """Prepare `num_tokens` calls of `read_token`: allocate all tensors that they change in place."""
        longest = -(-(max(self.offsets) + num_tokens) // CACHE_STEP) * CACHE_STEP
        self._capacity = min(longest, self.model.segment_length)
        self._places = torch.tensor(self.offsets).to(self.device, non_blocking=True)
        for index, layer in enumerate(self.model.layer_list):
            memory = self.memories[index]
            if layer.has_memory and memory is None:
                memory = self.model._empty(index, self.batch_size)
            self.memories[index] = None if memory is None else memory.clone()  # keep the model's held memory unchanged
        self.opened = map_tensors(self.opened, torch.clone)

    @torch.no_grad()
    def read_token(self, tokens: Tensor) -> Tensor:
        """Read one token per row, [B, 1], and return the hidden states before the head, [B, 1, D].

        Every call performs the same operations on tensors at the same addresses, so that a CUDA graph can replay it.
        Call `count_token` after each call.
        """
        assert self._places is not None
        before = [list(opened) for opened in self.opened]
        step = Step(
            offsets=self._places,
            positions=self._places.unsqueeze(1),
            valid=None,
            longest=self._capacity,
            segment_length=self.model.segment_length,
            tokens=self._describe_tokens(tokens),
        )
        hidden = self._run_step(tokens, step)
        self.opened = keep_places(before, self.opened)
        self._places.add_(1)
        return hidden

    @torch.no_grad()
    def count_token(self) -> bool:
        """Count the token of `read_token` and end full segments; False if that replaced tensors of a captured graph."""
        self.offsets, self.num_tokens = ([count + 1 for count in counts] for counts in (self.offsets, self.num_tokens))
        if max(self.offsets) < self.model.segment_length:
            return True
        before = list_tensors((self.opened, self.memories))
        self._end_segments(self.model.segment_length)
        after = list_tensors((self.opened, self.memories))
        return len(before) == len(after) and all(map(operator.is_, before, after))

    @torch.no_grad()
    def reset_rows(self, rows: Tensor) -> None:
        """Restart some rows, [B] bool, with empty memory, e.g. where a row's next document begins."""
        if rows.shape != (self.batch_size,):
            raise ValueError(f"reset_rows: the shape is {list(rows.shape)}, not [{self.batch_size}]")
        chosen = rows.to(self.device, torch.bool, non_blocking=True)
        for index, layer in enumerate(self.model.layer_list):
            memory = self.memories[index]
            for opened in self.opened:
                if opened[index] is not None:
                    opened[index], _ = layer.end_segments(opened[index], memory, chosen)
            if memory is not None:
                self.memories[index] = memory.emptied().select_rows(chosen, memory)
        self.offsets = [0 if is_reset else at for is_reset, at in zip(rows.tolist(), self.offsets, strict=True)]
        self._places, self._is_reset = None, True

    @torch.no_grad()
    def close(self, *, update_memory: bool = False) -> None:
        """End the stream; with `update_memory`, write open segments and add what was read to the held memory.

        What the model itself has written to memory in the meantime is kept.

        Raises:
            ValueError: the number of rows of the model's memory has changed since the stream began; or rows of this
                stream were reset although all rows share one memory, so that their changes can't be told apart.
        """
        if self._is_closed:
            return
        if update_memory and self._is_reset and self._start_rows is None:
            raise ValueError("a stream with reset rows can't be added to a shared memory: give each row its own memory")
        if update_memory and self.model.memory_rows != self._start_rows:
            now, before = (
                "one memory shared by all rows" if rows is None else f"a memory per row ({rows})"
                for rows in (self.model.memory_rows, self._start_rows)
            )
            raise ValueError(
                f"the model holds {now}, but held {before} when this stream began: the stream's memory can't be added"
            )
        self._is_closed = True
        if update_memory:
            self._end_segments(1)
            self.model._hold(self.memories, self._start)

    def _run_open(self, input_ids: Tensor, fed: list[int], taken: list[int], *, is_level: bool) -> Tensor:
        """Feed the `taken` tokens of each row that follow the first `fed`; `is_level`: all rows are at one position."""
        self._places = None
        longest, valid = max(taken), None
        columns = torch.arange(longest, device=self.device)
        if is_level:  # the usual case in generation: nothing to copy to the device
            tokens = input_ids[:, fed[0] : fed[0] + longest]
            offsets = torch.full((self.batch_size,), self.offsets[0], device=self.device)
        else:
            plan = torch.tensor([self.offsets, taken, fed]).to(self.device, non_blocking=True)
            offsets, counts, begun = plan.unbind()
            tokens = input_ids.gather(1, (begun.unsqueeze(1) + columns).clamp(max=input_ids.shape[1] - 1))
            valid = None if min(taken) == longest else mark_valid(counts, longest)
        ends = list(map(operator.add, self.offsets, taken))
        step = Step(
            offsets=offsets,
            positions=offsets.unsqueeze(1) + columns,
            valid=valid,
            longest=max(ends),
            segment_length=self.model.segment_length,
            start=self.offsets[0] if is_level else None,
            tokens=self._describe_tokens(tokens),
        )
        hidden = self._run_step(tokens, step)
        self.offsets = ends
        self._end_segments(self.model.segment_length)
        return hidden

    def _run_step(self, tokens: Tensor, step: Step) -> Tensor:
        """Run all passes over tokens [B, T] that continue open segments; returns the head's input, [B, T, D]."""
        hidden = embedded = self.model.embed_in(tokens)
        for number, opened in enumerate(self.opened):

            def run(index: int, layer: Layer, entering: Tensor, opened: list[Any] = opened) -> Tensor:
                entering, opened[index] = layer.step(entering, opened[index], self.memories[index], step)
                return entering

            hidden = self.model.run_layers(self.model.begin_pass(hidden, embedded) if number else hidden, run)
        return self.model.finish_pass(hidden)

    def _describe_tokens(self, input_ids: Tensor) -> ReadTokens | None:
        if self.model.first_before_head is None:
            return None
        weight = self.model.read_head_weight() if self._head_weight is None else self._head_weight
        self._head_weight = weight
        return ReadTokens(input_ids, weight)

    def _end_segments(self, least: int) -> None:
        """Write and clear open segments with at least `least` tokens."""
        ended = [at >= least for at in self.offsets]
        if not any(ended):
            return
        rows = torch.tensor(ended).to(self.device, non_blocking=True)
        before = [list(opened) for opened in self.opened], list(self.memories)
        for index, (layer, memory) in enumerate(zip(self.model.layer_list, self.memories, strict=True)):
            for opened in self.opened:  # end the segment in every pass; only the last pass's write is kept
                if opened[index] is not None:
                    opened[index], self.memories[index] = layer.end_segments(opened[index], memory, rows)
        self.offsets = [0 if is_over else at for is_over, at in zip(ended, self.offsets, strict=True)]
        if self._places is not None:
            self.opened, self.memories = keep_places(before, (self.opened, self.memories))
            self._places.masked_fill_(rows, 0)

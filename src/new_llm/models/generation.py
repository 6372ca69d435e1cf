"""Continuing a text: the prompt read whole, then one token per step, in constant memory at any length."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from new_llm.config.model import GenerationConfig
from new_llm.models.cache import TextCache
from new_llm.models.decoding import CapturedCall, DecodingWeights
from new_llm.models.inputs import check_input_ids, check_mask, mark_valid, plan_packing
from new_llm.models.sampling import StoppingText, TokenSampler

PACK_FROM = 16
"""Fewest new tokens for which packing the weights pays off."""
LOOK_EVERY = {"cpu": 1, "cuda": 16}
"""How many tokens are made between two looks at whether a row has ended: a look waits for the device. Tokens that a row
made after its end are thrown away. Where text or tokens are shown, or memory is kept, each token is looked at."""
STEPS_IN_PLACE = {"cuda"}
"""Devices where a token is read and the next one chosen by one call that changes tensors in place."""
OnText = Callable[[int, str], None]
"""Called with a row and its new text."""


@dataclass(frozen=True)
class GenerationStatistics:
    """Counts, times and texts of a generation.

    Attributes:
        num_tokens: new tokens of all rows.
        seconds: total wall time.
        passes: passes through the layers for each token.
        num_prompt_tokens: tokens of the prompts.
        prompt_seconds: the part of `seconds` spent reading the prompts.
        row_tokens: new tokens of each row, including a stop token or the tokens of a stop string.
        finish_reasons: for each row `stop` (a stop token or string) or `length` (max_new_tokens were made).
        texts: for each row the text of its new tokens before the stop; None: no tokenizer was given.
    """

    num_tokens: int
    seconds: float
    passes: int
    num_prompt_tokens: int
    prompt_seconds: float
    row_tokens: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    texts: tuple[str, ...] | None

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of wall time."""
        return self.num_tokens / self.seconds if self.seconds else 0.0


def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    config: GenerationConfig | None = None,
    tokenizer: Tokenizer | None = None,
    on_text: OnText | None = None,
    update_memory: bool = False,
    use_selective: bool = True,
    **options: Any,
) -> tuple[Tensor, GenerationStatistics]:
    """Continue each row's text, starting from the held memory, which changes only with `update_memory`.

    Each row continues as it would alone, wherever its padding is: masked tokens take no position.

    Args:
        model: any model of the family.
        input_ids: the prompts, [B, T].
        attention_mask: [B, T], 1 or True at real tokens.
        config: the settings; None: the defaults, which are greedy.
        tokenizer: needed for stop strings and `on_text`; adds the texts to the statistics.
        on_text: called with text as it is made, whole characters only.
        update_memory: keep what was read, prompts and all new tokens, as `model(ids, update_memory=True)` does.
        use_selective: False: a single pass per token, also for a model with several.
        options: fields of `GenerationConfig` that override the config's, such as `max_new_tokens`.

    Returns:
        Ids [B, T + N], N the new tokens of the longest row, and the statistics. Columns 0 … T − 1 are `input_ids`; each
        row's new tokens begin in column T and are followed by `pad_token_id`.

    Raises:
        ValueError: an empty prompt, a row without real tokens, ids outside the vocabulary, a setting out of range,
            stop strings or `on_text` without a tokenizer, or rows that do not fit the held memory's.
    """
    config = dataclasses.replace(config or GenerationConfig(), **options)
    if tokenizer is None and on_text is not None:
        raise ValueError("on_text: a tokenizer is needed to make text")
    run = GenerationRun(
        model, input_ids, attention_mask, config, tokenizer, update_memory=update_memory, use_selective=use_selective
    )
    for _ in run.run():
        for row, piece in enumerate(run.pieces):
            if piece and on_text is not None:
                on_text(row, piece)
    return run.collect()


def encode_prompts(tokenizer: Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, T], padded with 0 on the right, and a mask of real tokens [B, T] bool; an empty one is an
    error.
    """
    rows = [torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64) for text in prompts]
    if not rows or not all(map(len, rows)):
        raise ValueError("the prompt is empty: at least one token is needed")
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, mark_valid(torch.tensor([len(row) for row in rows]), ids.shape[1])


class GenerationRun:
    """What one call of `generate` keeps from token to token."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        config: GenerationConfig,
        tokenizer: Tokenizer | None,
        *,
        update_memory: bool,
        use_selective: bool = True,
    ) -> None:
        if input_ids.numel() == 0:
            raise ValueError(f"the prompt is empty: input_ids of shape {tuple(input_ids.shape)} have no token")
        check_input_ids(input_ids.cpu(), model.vocab_size)
        check_mask(attention_mask, input_ids)
        if attention_mask is not None and not (is_real := attention_mask.to(torch.bool).any(1)).all():
            row = int(is_real.logical_not().nonzero()[0])
            raise ValueError(f"attention_mask: row {row} has no real token; its prompt is empty")
        for name, ids in (("pad_token_id", (config.pad_token_id,)), ("eos_token_id", config.eos_token_id)):
            if any(token >= model.vocab_size for token in ids):
                raise ValueError(f"{name}: {max(ids)}; the model knows 0 to {model.vocab_size - 1}")
        if config.stop_strings and tokenizer is None:
            raise ValueError("stop_strings: a tokenizer is needed to find them in the text")
        self.model, self.config, self.update_memory = model, config, update_memory
        device = model.embed_in.weight.device
        self.input_ids = input_ids.to(device)
        self.mask = None if attention_mask is None else attention_mask.to(device, torch.bool)
        rows = len(input_ids)
        self.texts: list[StoppingText] | None = None
        if tokenizer is not None:
            real = [ids if self.mask is None else ids[self.mask[row]] for row, ids in enumerate(self.input_ids)]
            self.texts = [StoppingText(tokenizer, config.stop_strings, ids.tolist()) for ids in real]
        self.parts: list[list[str]] = [[] for _ in range(rows)]
        self.pieces = [""] * rows  # of text that the last step completed
        self.num_new = [0] * rows
        self.is_done = [False] * rows
        self.new_ids = torch.full((rows, config.max_new_tokens), config.pad_token_id, device=device)
        self.stream = model.open_stream(rows, use_selective=use_selective)
        self.caches = [TextCache(config.cache) for _ in range(rows)] if config.cache.is_on else None

    def run(self) -> Iterator[None]:
        """Read the prompts, then make one token per row between two yields; updates the memory at the end if asked."""
        begin = time.perf_counter()
        self.step: CapturedCall | None = None
        self.tracks = self.texts is not None or bool(self.config.eos_token_id)
        needs_each = self.texts is not None or self.caches is not None or self.update_memory
        self.look_every = 1 if needs_each else LOOK_EVERY.get(self.input_ids.device.type, 1)
        self.num_looked = 0
        packs = self.config.max_new_tokens >= PACK_FROM
        weights = DecodingWeights(self.model, num_rows=len(self.input_ids), packs=packs)
        with torch.no_grad(), weights.in_use():
            logits = self._read_prompts()
        # One call, which a CUDA graph replays, makes a token; hooks would not be called then.
        steps_in_place = (
            packs
            and self.input_ids.device.type in STEPS_IN_PLACE
            and self.caches is None
            and self.stream.can_step_in_place
            and not any(part._forward_hooks or part._forward_pre_hooks for part in self.model.modules())
        )
        unread = making = [True] * len(self.is_done)
        self.prompt_seconds = self.seconds = time.perf_counter() - begin
        for number in range(self.config.max_new_tokens):
            # Between two yields the caller runs: untimed, with its own gradient mode, and with the model unpatched.
            begin = time.perf_counter()
            with torch.no_grad(), weights.in_use():
                if number and steps_in_place and (not self.update_memory or all(unread)):
                    tokens = self._make_token(number)
                else:
                    logits = self._read(unread) if number else logits
                    tokens = self.sampler.choose(logits)
                self._keep(tokens, number, making)
                # A row's last token needs to be read only for the memory.
                left = [not is_done for is_done in self.is_done]
                unread, making = making if self.update_memory else left, left
                is_last = number + 1 == self.config.max_new_tokens or all(self.is_done)
                if is_last:
                    if self.update_memory:
                        self.stream.feed_hidden(self.last_tokens, torch.tensor(unread).unsqueeze(1))
                    self.stream.close(update_memory=self.update_memory)
                if is_last and self.input_ids.device.type == "cuda":
                    torch.cuda.synchronize()  # count the work that is still running
            self.seconds += time.perf_counter() - begin
            yield
            if is_last:
                return

    def collect(self) -> tuple[Tensor, GenerationStatistics]:
        """What `generate` returns."""
        return torch.cat((self.input_ids, self.new_ids[:, : max(self.num_new)]), dim=1), GenerationStatistics(
            num_tokens=sum(self.num_new),
            seconds=self.seconds,
            passes=self.stream.num_passes,
            num_prompt_tokens=self.input_ids.numel() if self.mask is None else int(self.mask.sum()),
            prompt_seconds=self.prompt_seconds,
            row_tokens=tuple(self.num_new),
            finish_reasons=tuple("stop" if done else "length" for done in self.is_done),
            texts=None if self.texts is None else tuple("".join(parts) for parts in self.parts),
        )

    def _read_prompts(self) -> Tensor:
        """Feed the prompts in pieces of whole segments and return the logits after each row's last token, [B, Z]."""
        ids, mask = self.input_ids, self.mask
        self.sampler = TokenSampler(
            self.config, ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, self.model.vocab_size
        )
        packing = plan_packing(mask, ids)
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        if packing is not None:
            ids, lengths = packing.pack(ids), packing.lengths
        segment_length, last = self.model.segment_length, lengths - 1
        piece_length = max(1, self.config.prompt_tokens_per_call // segment_length) * segment_length
        ends: Tensor | None = None
        for begin in range(0, int(lengths.max()), piece_length):
            piece = ids[:, begin : begin + piece_length]
            valid = None if packing is None else mark_valid(lengths - begin, piece.shape[1])
            hidden = self.stream.feed_hidden(piece, valid)
            ends = torch.zeros_like(hidden[:, 0]) if ends is None else ends
            for row, cache in enumerate(self.caches or ()):
                count = max(0, min(int(last[row]) - begin, piece.shape[1]))  # the last token is added by _mix
                cache.add(hidden[row, :count], piece[row, :count])
            places = (last - begin).clamp(0, piece.shape[1] - 1)
            found = hidden[torch.arange(len(ids), device=ids.device), places]
            is_here = (last >= begin) & (last < begin + piece_length)
            ends = torch.where(is_here.unsqueeze(1), found, ends)
        assert ends is not None  # a prompt has a token
        return self._mix(ends, ids.gather(1, last.unsqueeze(1)), [True] * len(ids))

    def _read(self, rows: list[bool]) -> Tensor:
        """Feed the last tokens of the rows that are True and return the logits of all rows, [B, Z]."""
        mask = None if all(rows) else torch.tensor(rows).unsqueeze(1)  # on the host, where the stream plans
        return self._mix(self.stream.feed_hidden(self.last_tokens, mask)[:, 0], self.last_tokens, rows)

    def _make_token(self, number: int) -> Tensor:
        """Read all rows' last tokens and choose the next ones, [B], on the device alone."""

        def read_and_choose() -> None:
            hidden = self.stream.read_token(self.tokens)
            self.tokens[:, 0] = self.sampler.pick(self.model.embed_out(hidden[:, 0]))

        if self.step is None:
            self.tokens = self.last_tokens.clone()
            self.stream.begin_steps(self.config.max_new_tokens - number)
            self.step = CapturedCall(self.input_ids.device)
        self.sampler.draw()
        self.step(read_and_choose)
        if not self.stream.count_token():
            self.step = CapturedCall(self.input_ids.device)
        return self.tokens[:, 0]

    def _mix(self, hidden: Tensor, tokens: Tensor, rows: list[bool]) -> Tensor:
        """Logits [B, Z] after tokens [B, 1] whose states are [B, D]; the rows that are True are read on by caches."""
        logits = self.model.embed_out(hidden)
        for row, cache in enumerate(self.caches or ()):
            if rows[row]:
                read = hidden[row : row + 1], tokens[row]
                logits[row] = cache.mix(*read, logits[row : row + 1].double().softmax(-1))[0].log()
                cache.add(*read)
        return logits

    def _keep(self, tokens: Tensor, number: int, rows: list[bool]) -> None:
        """Record the tokens that the rows that are True made, and mark the rows that they end."""
        if not all(rows):
            is_over = torch.tensor(rows).logical_not().to(tokens.device, non_blocking=True)
            tokens = tokens.masked_fill(is_over, self.config.pad_token_id)
        self.last_tokens = tokens.unsqueeze(1)
        self.new_ids[:, number] = tokens
        if (number + 1) % self.look_every and number + 1 < self.config.max_new_tokens:
            return
        begin, self.num_looked = self.num_looked, number + 1
        if tokens.device.type != "cpu":  # there `choose` has looked
            self.sampler.check()
        if not self.tracks:
            self.num_new = [number + 1] * len(rows)
            return
        found = tokens.unsqueeze(1) if self.look_every == 1 else self.new_ids[:, begin : number + 1]
        for row, (ids, is_made) in enumerate(zip(found.tolist(), rows, strict=True)):
            self.pieces[row] = ""
            for token in ids if is_made else ():
                self.num_new[row] += 1
                self._add_token(row, token)
                if self.is_done[row]:
                    self.new_ids[row, self.num_new[row] : number + 1] = self.config.pad_token_id
                    break

    def _add_token(self, row: int, token: int) -> None:
        is_end = token in self.config.eos_token_id
        self.is_done[row] = is_end
        if self.texts is None:
            return
        text = self.texts[row]
        piece = "" if is_end else text.push(token)
        if text.is_stopped:
            self.is_done[row] = True
        elif is_end or self.num_new[row] == self.config.max_new_tokens:
            piece += text.finish()
            self.is_done[row] = is_end or text.is_stopped
        self.pieces[row] = piece
        self.parts[row].append(piece)

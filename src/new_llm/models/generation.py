"""Text generation: read the prompt, then make one token per step, in constant memory at any length."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from new_llm.config.model import GenerationConfig
from new_llm.data.tokenizer import encode_text
from new_llm.models.cache import TextCache
from new_llm.models.decoding import CapturedCall, DecodingWeights
from new_llm.models.inputs import check_input_ids, check_mask, mark_valid, plan_packing
from new_llm.models.sampling import StoppingText, TokenSampler

PACK_FROM = 16
"""Minimum number of new tokens for which packing the weights pays off."""
LOOK_EVERY = {"cpu": 1, "cuda": 16}
"""Number of tokens between two checks of whether rows have ended; a check synchronises. What a row generates after its
end is discarded. With a tokenizer, caches or `update_memory`, every token is checked."""
STEPS_IN_PLACE = {"cuda"}
"""Devices on which a single call, which changes tensors in place, reads a token and chooses the next one."""
OnText = Callable[[int, str], None]
"""Called with a row's index and its new text."""


@dataclass(frozen=True)
class GenerationStatistics:
    """Counts, times and texts of a generation.

    Attributes:
        num_tokens: number of new tokens in all rows.
        seconds: total wall time.
        passes: number of passes through the layers per token.
        num_prompt_tokens: number of tokens in all prompts.
        prompt_seconds: the part of `seconds` spent reading the prompts.
        row_tokens: number of new tokens in each row, including a stop token or the tokens of a stop string.
        finish_reasons: for each row, `stop` (a stop token or string) or `length` (max_new_tokens were generated).
        texts: for each row, the text of its new tokens before the stop; None: no tokenizer was given.
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

    Each row continues as it would alone, wherever its padding is, since masked tokens take no position.

    Args:
        model: a `TransformerLM`.
        input_ids: the prompts, [B, T].
        attention_mask: [B, T], 1 or True at real tokens.
        config: the settings; None: the defaults, which are greedy.
        tokenizer: needed for stop strings and `on_text`; adds the texts to the statistics.
        on_text: called with new text as it is generated, in whole characters.
        update_memory: keep in memory what was read, prompts and all new tokens, as `model(ids, update_memory=True)`
            does.
        use_selective: False: a single pass per token, even if the model has several.
        options: fields of `GenerationConfig`, such as `max_new_tokens`; they override `config`.

    Returns:
        Ids [B, T + N], where N is the largest number of new tokens in a row, and the statistics. Columns 0 … T − 1 are
        `input_ids`; each row's new tokens start at column T and are followed by `pad_token_id`.

    Raises:
        ValueError: a prompt is empty or has no real tokens, ids are outside the vocabulary, a setting is out of range,
            there are stop strings or `on_text` but no tokenizer, or the batch size differs from the held memory's rows.
    """
    config = dataclasses.replace(config or GenerationConfig(), **options)
    if tokenizer is None and on_text is not None:
        raise ValueError("on_text: a tokenizer is needed to decode tokens")
    run = GenerationRun(
        model, input_ids, attention_mask, config, tokenizer, update_memory=update_memory, use_selective=use_selective
    )
    for _ in run.run():
        for row, piece in enumerate(run.pieces):
            if piece and on_text is not None:
                on_text(row, piece)
    return run.collect()


def encode_prompts(tokenizer: Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, T], padded with 0 on the right, and their mask [B, T]. Raises ValueError if one is empty."""
    rows = [torch.from_numpy(encode_text(tokenizer, text)) for text in prompts]
    if not rows or not all(map(len, rows)):
        raise ValueError("the prompt is empty: at least one token is needed")
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, mark_valid(torch.tensor([len(row) for row in rows]), ids.shape[1])


class GenerationRun:
    """The state of one call of `generate`."""

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
            raise ValueError(f"the prompt is empty: input_ids have shape {tuple(input_ids.shape)}")
        check_input_ids(input_ids.cpu(), model.vocab_size)
        check_mask(attention_mask, input_ids)
        if attention_mask is not None and not (is_real := attention_mask.to(torch.bool).any(1)).all():
            row = int(is_real.logical_not().nonzero()[0])
            raise ValueError(f"attention_mask: row {row} has no real token; its prompt is empty")
        for name, ids in (("pad_token_id", (config.pad_token_id,)), ("eos_token_id", config.eos_token_id)):
            if any(token >= model.vocab_size for token in ids):
                raise ValueError(f"{name}: {max(ids)}; the model's vocabulary is 0 to {model.vocab_size - 1}")
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
        self.pieces = [""] * rows  # the text that the last step completed
        self.num_new = [0] * rows
        self.is_done = [False] * rows
        self.new_ids = torch.full((rows, config.max_new_tokens), config.pad_token_id, device=device)
        self.stream = model.open_stream(rows, use_selective=use_selective)
        self.caches = [TextCache(config.cache) for _ in range(rows)] if config.cache.is_on else None

    def run(self) -> Iterator[None]:
        """Read the prompts, then generate one token per row before each yield; finally update memory, if asked to."""
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
        # One call, replayed as a CUDA graph, makes a token. A replay calls no hooks, so a model with hooks can't use
        # it.
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
            # At a yield the caller runs: outside the timing, in its own gradient mode, and with the model unpatched.
            begin = time.perf_counter()
            with torch.no_grad(), weights.in_use():
                if number and steps_in_place and (not self.update_memory or all(unread)):
                    tokens = self._make_token(number)
                else:
                    logits = self._read(unread) if number else logits
                    tokens = self.sampler.choose(logits)
                self._keep(tokens, number, making)
                # a row's last token only has to be read if memory is updated
                left = [not is_done for is_done in self.is_done]
                unread, making = making if self.update_memory else left, left
                is_last = number + 1 == self.config.max_new_tokens or all(self.is_done)
                if is_last:
                    if self.update_memory:
                        self.stream.feed_hidden(self.last_tokens, torch.tensor(unread).unsqueeze(1))
                    self.stream.close(update_memory=self.update_memory)
                if is_last and self.input_ids.device.type == "cuda":
                    torch.cuda.synchronize()  # include work that is still running in the time
            self.seconds += time.perf_counter() - begin
            yield
            if is_last:
                return

    def collect(self) -> tuple[Tensor, GenerationStatistics]:
        """The result of `generate`."""
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
                count = max(0, min(int(last[row]) - begin, piece.shape[1]))  # `_mix` adds the last token
                cache.add(hidden[row, :count], piece[row, :count])
            places = (last - begin).clamp(0, piece.shape[1] - 1)
            found = hidden[torch.arange(len(ids), device=ids.device), places]
            is_here = (last >= begin) & (last < begin + piece_length)
            ends = torch.where(is_here.unsqueeze(1), found, ends)
        assert ends is not None  # every prompt has a token
        return self._mix(ends, ids.gather(1, last.unsqueeze(1)), [True] * len(ids))

    def _read(self, rows: list[bool]) -> Tensor:
        """Feed the last tokens of the rows that are True, and return the logits of all rows, [B, Z]."""
        mask = None if all(rows) else torch.tensor(rows).unsqueeze(1)  # on the CPU, where the stream reads it
        return self._mix(self.stream.feed_hidden(self.last_tokens, mask)[:, 0], self.last_tokens, rows)

    def _make_token(self, number: int) -> Tensor:
        """Read all rows' last tokens and choose the next ones, [B], without synchronising."""

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
        """Logits [B, Z] after tokens [B, 1] with states [B, D]; caches add the tokens of the rows that are True."""
        logits = self.model.embed_out(hidden)
        for row, cache in enumerate(self.caches or ()):
            if rows[row]:
                read = hidden[row : row + 1], tokens[row]
                logits[row] = cache.mix(*read, logits[row : row + 1].double().softmax(-1))[0].log()
                cache.add(*read)
        return logits

    def _keep(self, tokens: Tensor, number: int, rows: list[bool]) -> None:
        """Record the new tokens of the rows that are True, and mark the rows that end with them."""
        if not all(rows):
            is_over = torch.tensor(rows).logical_not().to(tokens.device, non_blocking=True)
            tokens = tokens.masked_fill(is_over, self.config.pad_token_id)
        self.last_tokens = tokens.unsqueeze(1)
        self.new_ids[:, number] = tokens
        if (number + 1) % self.look_every and number + 1 < self.config.max_new_tokens:
            return
        begin, self.num_looked = self.num_looked, number + 1
        if tokens.device.type != "cpu":  # on a CPU, `choose` has already checked
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

"""Filling a memory with texts of any length, in constant memory.

Where memory adds (no delta rule, no decay) each file is read from an empty memory, and the files' memories
are summed: the result is that of one call that reads the files as rows of one batch with a shared memory, and
several processes can share the work. Where it does not add, the files are read one after another, in their
order, into one memory. A document always begins a new segment.
"""

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from new_llm.config import UserError
from new_llm.config.evaluation import FillConfig
from new_llm.experiments.text_blocks import OnBytes, check_text_files, read_documents
from new_llm.models import TransformerLM, merge_memory_states

State = dict[int, dict[str, Any]]
"""What `get_memory_state` returns."""


@dataclass(frozen=True)
class FillResult:
    """What was read into a memory.

    Attributes:
        num_files: text files.
        num_tokens: their tokens.
        num_segments: segments they were cut into; each document's last one may be short.
        num_processes: processes that read.
        seconds: wall time of reading, where there are several processes with their start.
    """

    num_files: int
    num_tokens: int
    num_segments: int
    num_processes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of wall time."""
        return self.num_tokens / self.seconds if self.seconds else 0.0


def memory_adds(model: TransformerLM) -> bool:
    """Whether memories of different texts add: no memory layer has the delta rule or decay."""
    return all(layer.memory_facts.additive for layer in model.memory_layers.values())


def fill_memory(
    model: TransformerLM,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    *,
    config: FillConfig | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> FillResult:
    """Replace the model's memory by one that texts have filled, in this process; no gradients are held.

    After an error the model holds what it held before. Frozen banks stay.

    Args:
        model: a model with memory layers, which will hold one memory shared by all rows.
        tokenizer: the model's.
        paths: text files (.txt, .jsonl and what else `new_llm.data` reads).
        config: sizes of what is held at once.
        on_bytes: told of the bytes read since the last call.

    Returns:
        What was read.

    Raises:
        UserError: no memory layer, no files, or a file that holds no text.
    """
    if not model.memory_layers:
        raise UserError("this model has no memory layer to fill")
    if not paths:
        raise UserError("no text file is given")
    check_text_files(paths)
    config = config or FillConfig()
    reader = take_memory_part(model)
    adds = memory_adds(model)
    state: State | None = None
    num_tokens = num_segments = 0
    began = time.perf_counter()
    reader.reset_memory()
    for path in paths:
        for document in read_documents(path, config, on_bytes):
            tokens = read_document(reader, tokenizer, document, config)
            num_tokens += tokens
            num_segments += -(-tokens // model.segment_length)
        if adds:
            state = add_state(state, reader.get_memory_state())
            reader.reset_memory()
    model.set_memory_state(state or reader.get_memory_state())
    return FillResult(len(paths), num_tokens, num_segments, 1, time.perf_counter() - began)


def add_state(total: State | None, state: State) -> State:
    """The sum of the files read so far, file by file: no more than two states are ever held."""
    return state if total is None else merge_memory_states([total, state])


def read_document(model: TransformerLM, tokenizer: Tokenizer, pieces: Iterable[str], config: FillConfig) -> int:
    """Stream one document into the memory that a model holds; returns its tokens.

    Args:
        model: holds one memory for all rows.
        tokenizer: the model's.
        pieces: the text, cut where tokens end; see `cut_at_white_space`.
        config: tokens that are read at once.
    """
    stream = model.open_stream(1)
    for ids in gather_calls(tokenizer, pieces, count_call_tokens(model.segment_length, config)):
        stream.feed_hidden(ids.to(stream.device))
    stream.close(update_memory=True)
    return int(stream.num_tokens)


def count_call_tokens(segment_length: int, config: FillConfig) -> int:
    """Tokens of a call: whole segments, which the model reads in parallel."""
    return max(1, config.tokens_per_call // segment_length) * segment_length


def gather_calls(tokenizer: Tokenizer, pieces: Iterable[str], num_tokens: int) -> Iterator[torch.Tensor]:
    """Tokenise a text piece by piece, into ids [1, num_tokens]; the last may be shorter."""
    held = torch.empty(0, dtype=torch.int64)
    for piece in pieces:
        # The fast form leaves out character offsets, which nothing here reads.
        encoding = tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0]
        held = torch.cat([held, torch.tensor(encoding.ids, dtype=torch.int64)])
        while len(held) >= num_tokens:
            yield held[:num_tokens].unsqueeze(0)
            held = held[num_tokens:]
    if len(held):
        yield held.unsqueeze(0)


def take_memory_part(model: TransformerLM) -> TransformerLM:
    """The part of a model that its memory depends on, sharing its weights: no layers above the last memory.

    A subclass may use its layers in another way, and is taken whole.
    """
    part = copy.copy(model)
    part._modules = dict(model._modules)  # its own list of the same modules
    part._held = list(model._held)
    if type(model) is TransformerLM:
        part.layers = model.layers[: max(model.memory_layers) + 1]
        part._held = part._held[: len(part.layers)]
    return part

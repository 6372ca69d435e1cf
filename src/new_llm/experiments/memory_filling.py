"""Fill a memory with texts of any length, in constant working memory.

If memories of different texts can be added (no delta rule, no decay), each file is read into an empty memory and the
memories are summed. The result equals one call that reads the files as rows of a batch with a shared memory, and
several machines can share the work. Otherwise the files are read one after another into one memory, in the order given.
Every document begins a new segment.

Files are read in blocks, cut where the tokenizer would cut anyway. A byte-level BPE (GPT-NeoX's, or one trained here)
splits text before it merges, and never joins a visible character to white space after it. So a cut before white space
that follows a visible character changes no token. A single space between two visible characters is preferred: there the
cut is also safe for tokenizers that put a prefix in front of a text. Only a run without white space that is longer than
`max_run_characters` is cut elsewhere.
"""

import copy
import io
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from new_llm.config import UserError
from new_llm.config.evaluation import FillConfig
from new_llm.config.files import check_regular_file, describe_os_error
from new_llm.data.local_files import choose_reader, read_file
from new_llm.data.tokenizer import refuse_unknown_text
from new_llm.models import TransformerLM, merge_memory_states

PLAIN_EXTENSIONS = (".txt", ".raw", ".tokens")
"""Files with a single text, read in blocks; other formats hold documents, read one by one."""

OnBytes = Callable[[int], None]


class FillResult(NamedTuple):
    """What was read into a memory. The last segment of each document may be short."""

    num_files: int
    num_tokens: int
    num_segments: int
    seconds: float


def check_output(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Reject a path where a memory file can't be written, before the work begins."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out: {out} must end in .safetensors")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder")
    if out.exists() and any(out.samefile(path) for path in inputs):
        raise UserError(f"--out: {out} is one of the files to read")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"--out: {describe_os_error(error)}") from None


def memory_adds(model: TransformerLM) -> bool:
    """Whether memories of different texts can be added, in every layer."""
    return all(layer.memory_facts.additive for layer in model.memory_layers.values())


def fill_memory(
    model: TransformerLM,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    *,
    config: FillConfig | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> FillResult:
    """Replace the model's memory by one filled with texts, shared by all rows; no gradients are kept.

    After an error the model holds the memory that it held before. `on_bytes` is called with the number of bytes read
    since the last call.
    """
    if not model.memory_layers:
        raise UserError("this model has no memory layer to fill")
    if not paths:
        raise UserError("no text file is given")
    check_text_files(paths)
    config = config or FillConfig()
    reader = take_memory_part(model)
    adds = memory_adds(model)
    state: dict[int, dict[str, Any]] | None = None
    num_tokens = num_segments = 0
    began = time.perf_counter()
    reader.reset_memory()
    for path in paths:
        for document in read_documents(path, config, on_bytes):
            tokens = read_document(reader, tokenizer, document, config)
            num_tokens += tokens
            num_segments += -(-tokens // model.segment_length)
        if adds:
            own = reader.get_memory_state()
            state = own if state is None else merge_memory_states([state, own])
            reader.reset_memory()
    model.set_memory_state(state or reader.get_memory_state())
    return FillResult(len(paths), num_tokens, num_segments, time.perf_counter() - began)


def read_document(model: TransformerLM, tokenizer: Tokenizer, pieces: Iterable[str], config: FillConfig) -> int:
    """Read a document, in pieces of `cut_at_white_space`, into a model's memory; returns its number of tokens."""
    stream = model.open_stream(1)
    # Each call reads whole segments, which run in parallel.
    num_tokens = max(1, config.tokens_per_call // model.segment_length) * model.segment_length
    held = torch.empty(0, dtype=torch.int64)
    for piece in pieces:
        # The fast form leaves out character offsets, which are not needed.
        with refuse_unknown_text():
            encoding = tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0]
        held = torch.cat([held, torch.tensor(encoding.ids, dtype=torch.int64)])
        while len(held) >= num_tokens:
            stream.feed_hidden(held[:num_tokens].unsqueeze(0).to(stream.device))
            held = held[num_tokens:]
    if len(held):
        stream.feed_hidden(held.unsqueeze(0).to(stream.device))
    stream.close(update_memory=True)
    return sum(stream.num_tokens)


def take_memory_part(model: TransformerLM) -> TransformerLM:
    """The part of a model that its memory depends on, without the layers above the last memory; weights are shared.

    A subclass is kept whole, because it may use its layers in another way.
    """
    part = copy.copy(model)
    part._modules = dict(model._modules)  # its own list of the same modules
    part._held = list(model._held)
    if type(model) is TransformerLM:
        part.layers = model.layers[: max(model.memory_layers) + 1]
        part._held = part._held[: len(part.layers)]
    return part


# Texts in blocks


def check_text_files(paths: Iterable[Path]) -> None:
    """Reject files that can't hold text, before any is read."""
    for path in paths:
        check_regular_file(path)
        choose_reader(path)
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")


def is_plain(path: Path) -> bool:
    """Whether a file is a single text, so that progress can be measured in bytes of the file."""
    return path.name.lower().endswith(PLAIN_EXTENSIONS)


def read_documents(path: Path, config: FillConfig, on_bytes: OnBytes) -> Iterator[Iterator[str]]:
    """Yield each document of a file as pieces that can be tokenised separately; consume one before the next.

    `on_bytes` is called with the bytes of text read since the last call; for a plain file, the bytes of the file.
    """
    limit = config.max_run_characters
    if is_plain(path):
        yield cut_at_white_space(_read_plain(path, config.block_bytes, on_bytes), limit)
        return
    found = False
    for _, text in read_file(path, config.text_field):
        found = True
        blocks = (text[i : i + config.block_bytes] for i in range(0, len(text), config.block_bytes))
        yield cut_at_white_space(blocks, limit)
        on_bytes(len(text.encode("utf-8")))
    if not found:
        raise UserError(f"{path}: holds no text, only white space")


def cut_at_white_space(blocks: Iterable[str], max_run_characters: int) -> Iterator[str]:
    """Recut a text so that all pieces but the first begin with white space after a visible character.

    If there is no such place in more than `max_run_characters`, the cut is at the end of what has been read.
    """
    held = ""
    for block in blocks:
        held += block
        cut = find_cut(held) or (len(held) if len(held) > max_run_characters else 0)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def find_cut(text: str) -> int:
    """The last position where a text can be cut without changing tokens; 0: none."""
    for mark, is_single in ((" ", True), ("\n", False), (" ", False), ("\t", False)):
        at = len(text)
        while (at := text.rfind(mark, 1, at)) > 0:
            ends = at + 1 == len(text)
            if not text[at - 1].isspace() and not (is_single and (ends or text[at + 1].isspace())):
                return at
    return 0


def _read_plain(path: Path, block_size: int, on_bytes: OnBytes) -> Iterator[str]:
    """Read UTF-8 text in blocks, without a byte order mark, and with every line end as \\n."""
    is_visible, num_read = False, 0
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        try:
            while text := file.read(block_size):
                if "\0" in text:
                    raise UserError(f"{path}: a binary file (it contains a NUL); expected UTF-8 text")
                is_visible = is_visible or not text.isspace()
                yield text
                on_bytes(raw.tell() - num_read)
                num_read = raw.tell()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text: it contains 0x{error.object[error.start]:02x}") from None
    if not is_visible:
        raise UserError(f"{path}: holds no text, only white space")

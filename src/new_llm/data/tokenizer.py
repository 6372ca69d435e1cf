"""Tokenizers, loaded from a file or the hub or trained on the training split, and tokenised documents."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from new_llm.config import DataConfig, UserError
from new_llm.config.files import read_text_file
from new_llm.data.hub import describe_failure, hub_answers, hub_endpoint

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 1 << 28  # the largest vocabularies have some tens of megabytes
SPECIAL_TOKENS = {
    "eos_token": (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]"),
    "bos_token": (END_OF_TEXT, "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "[CLS]"),
    "pad_token": ("<|padding|>", "<|pad|>", "<pad>", "[PAD]"),
    "unk_token": ("<|unk|>", "<unk>", "[UNK]"),
}
"""By Hugging Face's role names, the tokens in GPT-NeoX and GPT-2, SentencePiece, Llama and BERT."""
VOCAB_MULTIPLE = 128  # of embedding rows: 50,277 entries become Pythia's 50,304 rows


def find_tokenizer(config: DataConfig, *, is_hub_source: bool) -> tuple[str, Tokenizer] | None:
    """Return the configured tokenizer and its name, or None if one must be trained."""
    if config.tokenizer != "auto":
        return config.tokenizer, get_tokenizer(config.tokenizer, config.hub_timeout_seconds)
    if is_hub_source:
        with suppress(UserError):
            return config.hub_tokenizer, get_tokenizer(config.hub_tokenizer, config.hub_timeout_seconds)
    return None


def get_tokenizer(name_or_file: str | Path, hub_timeout_seconds: float = 5.0, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer from a tokenizer.json, a folder that contains one, or the hub (or its local cache) by name.

    `revision` is a branch, tag or commit of the hub's repository.

    Raises:
        UserError: the file is missing or not a tokenizer, or the hub does not answer within `hub_timeout_seconds` and
            the tokenizer is not cached.
    """
    name = str(name_or_file)
    path = Path(name).expanduser()
    if path.is_dir():
        path /= TOKENIZER_FILE
    if path.is_file():
        return read_tokenizer_file(path)
    if path.suffix == ".json" or path.is_absolute() or path.name == TOKENIZER_FILE or name.startswith((".", "~")):
        raise UserError(
            f"{path}: no such tokenizer file; give a tokenizer.json, a folder that contains one, or a name on the hub"
        )
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        reachable = hub_answers(f"{name}/resolve/{revision or 'main'}/{TOKENIZER_FILE}", hub_timeout_seconds)
        file = huggingface_hub.hf_hub_download(
            name, TOKENIZER_FILE, revision=revision, local_files_only=not reachable, endpoint=hub_endpoint()
        )
    except LocalEntryNotFoundError:
        raise UserError(
            f"tokenizer {name!r} is not a file, is not cached here, and the hub at {hub_endpoint()} is out of reach; "
            f"use a tokenizer.json, or data.tokenizer: auto to train one"
        ) from None
    except Exception as error:  # the exception depends on the hub's transport
        raise UserError(f"tokenizer {name!r} could not be loaded: {describe_failure(error)}") from None
    return read_tokenizer_file(Path(file))


def read_tokenizer_file(path: Path) -> Tokenizer:
    """Read a tokenizer.json, with its settings for truncation and padding turned off.

    Raises:
        UserError: the file can't be read or is not a tokenizer.
    """
    text = read_text_file(path, MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises Exception, or PanicException (a BaseException) if Rust panics
        raise UserError(f"{path}: not a valid tokenizer file: {describe_failure(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, lossless for any text, with `<|endoftext|>` as id 0. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def find_special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the `eos_token`, `bos_token`, `pad_token` and `unk_token` that a tokenizer has.

    A missing eos token falls back to bos; missing bos and padding tokens fall back to eos.
    """
    found = {
        role: next((name for name in names if tokenizer.token_to_id(name) is not None), None)
        for role, names in SPECIAL_TOKENS.items()
    }
    end = found["eos_token"] or found["bos_token"]
    found |= {role: found[role] or end for role in ("eos_token", "bos_token", "pad_token")}
    return {role: name for role, name in found.items() if name is not None}


def fingerprint_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the sha256 of the tokenizer's JSON."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def count_ids(tokenizer: Tokenizer) -> int:
    """Return a tokenizer's largest id + 1."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """Return the embedding rows for this tokenizer: `count_ids`, rounded up to a multiple of 128."""
    return -(-count_ids(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, what: str) -> None:
    """Reject a tokenizer with ids that exceed a vocabulary. `what` begins the message, with {} for the largest id."""
    if (count := count_ids(tokenizer)) > vocab_size:
        raise UserError(f"{what.format(count - 1)} knows up to {vocab_size - 1}")


# Tokenised documents


LOSS_DOCUMENTS = 8
BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 22, 1000  # held in memory at once

SpecialTokens = Literal["text", "control"]
"""How to encode a special token spelled out in a document: as plain text, or as the control token."""


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """The documents of one split; memory-mapped if they come from the cache."""

    tokens: NDArray[np.unsignedinteger]
    """All documents in order, 1-D, uint16 or uint32."""
    offsets: NDArray[np.int64]
    """[num_documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]."""
    num_bytes: NDArray[np.int64]
    """[num_documents]: UTF-8 bytes of the raw text; 0: the document was cut short, and they are unknown."""
    num_words: NDArray[np.int64]
    """[num_documents]: words of the raw text, as `count_words` counts them; 0: unknown."""
    num_pinned_documents: int = 0
    """How many documents, counted from the first, every training subset contains: the reversal sentences."""

    @property
    def num_documents(self) -> int:
        """Documents in the split."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the split."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[num_documents]: tokens of each document."""
        return np.diff(self.offsets)

    def find_long(self, min_tokens: int) -> NDArray[np.int64]:
        """Return the indices of the documents with at least this many tokens."""
        return np.flatnonzero(self.lengths >= min_tokens)

    def count_raw(self, indices: Any) -> tuple[int | None, int | None]:
        """Bytes and words of the raw text of some documents, by their indices; None: unknown."""
        counts = self.num_bytes[indices], self.num_words[indices]
        num_bytes, num_words = (int(count.sum()) if count.all() else None for count in counts)
        return num_bytes, num_words

    def document(self, index: int) -> NDArray[np.unsignedinteger]:
        """Return the tokens of one document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def loses_text(tokenizer: Tokenizer, split: TokenSplit) -> bool:
    """Whether the split's text does not come back from its tokens, as far as its first documents' sizes and case tell.

    Such tokenizers put in lower case, leave out white space, or have one token for everything unknown.
    """
    for index in np.flatnonzero(split.num_bytes)[:LOSS_DOCUMENTS]:
        text = tokenizer.decode(split.document(index).tolist(), skip_special_tokens=False)
        if len(text.encode()) != split.num_bytes[index]:
            return True
    upper, lower = (tokenizer.encode(text, add_special_tokens=False).tokens for text in "Aa")
    return upper == lower


def cut_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into lists of about BATCH_CHARACTERS characters and at most BATCH_DOCUMENTS texts."""
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def refuse_unknown_text() -> Iterator[None]:
    """Around encoding: what a tokenizer has no token for, not even one for unknown text, is a `UserError`."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:  # `tokenizers` raises no other kind
            raise
        raise UserError(f"the tokenizer can't encode the text: {error}") from None


def encode_text(tokenizer: Any, text: str) -> NDArray[np.int64]:
    """Encode a text without adding special tokens, with a tokenizer of `tokenizers` or `transformers`; ids [N]."""
    with refuse_unknown_text():
        encoding = tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(getattr(encoding, "ids", encoding), dtype=np.int64)


def encode_continuation(tokenizer: Any, text: str) -> NDArray[np.int64]:
    """Encode a text that continues another, without the prefix space that Llama's tokenizer adds to a first word."""
    before, both = encode_text(tokenizer, "a"), encode_text(tokenizer, f"a{text}")
    return both[len(before) :] if np.array_equal(both[: len(before)], before) else encode_text(tokenizer, text)


def tokenize_documents(
    texts: Iterable[str], tokenizer: Tokenizer, special_tokens: SpecialTokens = "text"
) -> TokenSplit:
    """Tokenise documents in memory, whole, without adding special tokens."""
    ids, num_bytes, num_words = [np.zeros(0, np.uint32)], list[int](), list[int]()
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = special_tokens == "text"
    try:
        for batch in cut_batches(texts):
            # The fast form omits character offsets, which are not needed here.
            with refuse_unknown_text():
                encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
            num_bytes += [len(text.encode("utf-8")) for text in batch]
            num_words += [count_words(text) for text in batch]
    finally:
        tokenizer.encode_special_tokens = before
    return TokenSplit(
        tokens=np.concatenate(ids),
        offsets=np.cumsum([len(one) for one in ids], dtype=np.int64),
        num_bytes=np.array(num_bytes, dtype=np.int64),
        num_words=np.array(num_words, dtype=np.int64),
    )


def count_samples(lengths: NDArray[np.int64], seq_length: int) -> NDArray[np.int64]:
    """Return the number of samples in documents of these lengths, [D]: whole ones, plus a tail of at least 2 tokens.

    A tail of a single token is not a sample, but it is still predicted, as the last target of the sample before it.
    """
    return lengths // seq_length + (lengths % seq_length >= 2)


def count_words(text: str) -> int:
    """Count words as lm-evaluation-harness does: pieces between white space, including empty ones at the ends."""
    return len(re.split(r"\s+", text))

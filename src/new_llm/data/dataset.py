"""From a configuration to two splits of tokens: read, split by document, tokenise, cache."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.data.builder import Builder, limit_characters
from new_llm.data.cache import CacheEntry, cache_folder, cache_key, load_or_build
from new_llm.data.sources import Source, open_source
from new_llm.data.splitting import shuffle_sentences
from new_llm.data.tokenizer import TOKENIZER_FILE, find_tokenizer, fingerprint_tokenizer, padded_vocab_size
from new_llm.data.tokens import TokenSplit, count_all_samples, longest_document

MIN_VALIDATION_TOKENS = 2  # a document's first token has no prediction


@dataclass(frozen=True)
class PreparedData:
    """An experiment's data: the same for all its models."""

    train: TokenSplit
    validation: TokenSplit
    tokenizer: Tokenizer
    vocab_size: int
    """Rows of the embedding: the tokenizer's size, rounded up to a multiple of 128."""
    info: dict[str, Any]
    """Plain values for the record: source, tokenizer, each split's counts, fingerprints, and `notes`: lines
    that a reader of the results should see."""


def prepare_data(config: DataConfig, seed: int) -> PreparedData:
    """Read, split by document, tokenise and cache what the configuration asks for.

    A second call reads the cache. The forward sentences of the reversal pairs join the training split alone:
    its first documents, which are pinned.

    Raises:
        UserError: one line for anything wrong with the source, the tokenizer or the cache folder, and for a
            source too short for one training sample and one validation document.
    """
    source = open_source(config)
    sentences = _find_sentences(config, seed)
    found = find_tokenizer(config, is_hub_source=source.is_hub or source.holds_tokens)
    if source.holds_tokens and not found:
        raise UserError(
            f"{source.name}: holds tokens: data.tokenizer must name the tokenizer that made them, a tokenizer.json "
            f"or a hub name ({config.hub_tokenizer}, tried first, is out of reach)"
        )
    key = cache_key(
        {
            "source": source.fingerprint,
            "text_field": config.text_field,
            "tokenizer": fingerprint_tokenizer(found[1]) if found else {"bpe": config.tokenizer_vocab_size},
            "seed": seed,
            "validation_fraction": config.validation_fraction,
            "max_documents": config.max_documents,
            "max_characters": limit_characters(config, source),
            "min_documents": config.min_documents,
            "part_characters": config.seq_length * config.characters_per_token,
            "seq_length": config.seq_length,
            "sentences": sentences,
            "large": [config.max_spool_characters, config.shard_characters],
        }
    )
    builder = Builder(config, seed, source, sentences, found[1] if found else None)
    entry = load_or_build(cache_folder(config), key, builder.build, config.verify_cache_bytes)
    _check_size(source, entry, config.seq_length)
    notes = list[str]()
    if source.is_hub and config.tokenizer == "auto" and not found:
        notes.append(f"the tokenizer {config.hub_tokenizer} could not be loaded: one was trained in its place")
    name = found[0] if found else f"byte-level BPE trained on the training split of {source.name}"
    return _describe_data(config, source, sentences, entry, name, notes)


def _find_sentences(config: DataConfig, seed: int) -> list[str]:
    if not config.reversal_pairs:
        return []
    from new_llm.data.reversal_pairs import get_reversal_pairs

    return shuffle_sentences([pair.forward for pair in get_reversal_pairs()], seed)


def _check_size(source: Source, entry: CacheEntry, seq_length: int) -> None:
    train, validation = entry.splits["train"], entry.splits["validation"]
    pinned = train.num_pinned_documents
    num_samples = count_all_samples(train, seq_length) - count_all_samples(train, seq_length, pinned)
    num_tokens = train.num_tokens - int(train.offsets[pinned])
    longest = longest_document(validation)
    if num_tokens < seq_length or not num_samples or longest < MIN_VALIDATION_TOKENS:
        raise UserError(
            f"{source.name}: too short: it gives {num_tokens:,} tokens for training and "
            f"{validation.num_tokens:,} for validation; at least {seq_length:,} (one sample, data.seq_length) and "
            f"{MIN_VALIDATION_TOKENS} are needed"
        )


def _describe_data(
    config: DataConfig,
    source: Source,
    sentences: list[str],
    entry: CacheEntry,
    tokenizer_name: str,
    notes: list[str],
) -> PreparedData:
    train, validation = entry.splits["train"], entry.splits["validation"]
    vocab_size = padded_vocab_size(entry.tokenizer)
    notes = [*notes, *entry.meta["notes"]]
    available = count_all_samples(train, config.seq_length)
    pinned = count_all_samples(train, config.seq_length, train.num_pinned_documents)
    if config.num_samples is not None and available < config.num_samples:
        notes.append(f"{config.num_samples:,} training samples were asked for; the training split holds {available:,}")
    if config.num_samples is not None and config.num_samples <= pinned:
        notes.append(f"the reversal sentences alone fill the {config.num_samples:,} training samples")
    names = (TOKENIZER_FILE, *(name for name in entry.meta["files"] if name.endswith((".tokens", ".index"))))
    files = {name: entry.meta["files"][name]["sha256"] for name in names}
    info = {
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "tokenizer": {
            "name": tokenizer_name,
            "fingerprint": fingerprint_tokenizer(entry.tokenizer),
            "num_entries": entry.tokenizer.get_vocab_size(),
        },
        "vocab_size": vocab_size,
        "train": _count_split(train, config.seq_length),
        "validation": _count_split(validation, config.seq_length),
        "split_fingerprint": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "reversal_sentences": len(sentences),
        "reversal_documents": train.num_pinned_documents,
        "notes": notes,
    }
    return PreparedData(train, validation, entry.tokenizer, vocab_size, info)


def _count_split(split: TokenSplit, seq_length: int) -> dict[str, int]:
    return {
        "num_documents": split.num_documents,
        "num_tokens": split.num_tokens,
        "num_samples": count_all_samples(split, seq_length),
        "num_bytes": int(split.num_bytes.sum()),
        "num_words": int(split.num_words.sum()),
    }

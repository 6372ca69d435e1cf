"""From a configuration to two splits of tokens: read, split by document, tokenise, cache."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.data.cache import CacheEntry, cache_folder, cache_key, load_or_build, write_split
from new_llm.data.planted_facts import plant_facts
from new_llm.data.progress import show_progress
from new_llm.data.sources import Source, open_source
from new_llm.data.splitting import cut_text, pack_sentences, shuffle_sentences, split_documents
from new_llm.data.spool import TextSpool
from new_llm.data.tokenizer import (
    TOKENIZER_FILE,
    find_tokenizer,
    fingerprint_tokenizer,
    padded_vocab_size,
    train_tokenizer,
)
from new_llm.data.tokens import TokenizedDocument, TokenSplit, count_samples, encode_documents, token_dtype

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
    found = find_tokenizer(config, is_hub_source=source.is_hub)
    key = cache_key(
        {
            "source": source.fingerprint,
            "text_field": config.text_field,
            "tokenizer": fingerprint_tokenizer(found[1]) if found else {"bpe": config.tokenizer_vocab_size},
            "seed": seed,
            "validation_fraction": config.validation_fraction,
            "max_documents": config.max_documents,
            "max_characters": _limit_characters(config, source),
            "min_documents": config.min_documents,
            "part_characters": config.seq_length * config.characters_per_token,
            "seq_length": config.seq_length,
            "sentences": sentences,
            "planted": [config.planted_facts, config.planted_distance, config.planted_tasks],
        }
    )
    builder = _Builder(config, seed, source, sentences, found[1] if found else None)
    entry = load_or_build(cache_folder(config), key, builder.build)
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


def _limit_characters(config: DataConfig, source: Source) -> int | None:
    """How much to read of a long source: what num_samples needs, and validation's share; None: all of it."""
    if config.num_samples is None or source.read_whole:
        return None
    needed = config.num_samples * config.seq_length * config.characters_per_token
    return int(needed / (1 - config.validation_fraction))


@dataclass
class _Builder:
    """Makes the files of one cache."""

    config: DataConfig
    seed: int
    source: Source
    sentences: list[str]
    tokenizer: Tokenizer | None

    def build(self, folder: Path, scratch: Path) -> dict[str, Any]:
        config = self.config
        notes = list[str]()
        with TextSpool(scratch) as read, TextSpool(scratch) as cut:
            self._read(read, notes)
            spool = read if len(read) >= config.min_documents else self._cut(read, cut, notes)
            if len(spool) < 2:
                raise UserError(
                    f"{self.source.name}: too short: it holds {len(spool)} document of "
                    f"{sum(spool.num_characters)} characters that can't be cut in two; at least 2 "
                    f"documents are needed, one for training and one for validation"
                )
            train, validation = split_documents(len(spool), config.validation_fraction, self.seed)
            tokenizer = self.tokenizer or self._train_tokenizer(spool.select(train), len(train), notes)
            dtype = token_dtype(padded_vocab_size(tokenizer))
            pinned = list(pack_sentences(self.sentences, tokenizer, config.seq_length))
            with show_progress("tokenising", "documents", len(pinned) + len(spool)) as advance:
                texts = {"train": chain(pinned, spool.select(train)), "validation": spool.select(validation)}
                for name, split in texts.items():
                    documents = _count(encode_documents(split, tokenizer), advance)
                    if name == "train" and config.planted_facts:
                        documents = self._plant(documents, len(pinned), tokenizer)
                    write_split(folder, name, documents, dtype)
        tokenizer.save(str(folder / TOKENIZER_FILE))
        self._check_size(folder, len(pinned))
        return {"dtype": dtype.newbyteorder("<").str, "num_pinned_documents": len(pinned), "notes": notes}

    def _read(self, spool: TextSpool, notes: list[str]) -> None:
        limit = _limit_characters(self.config, self.source)
        seen, repeated, num_characters = set[bytes](), 0, 0
        documents = islice(self.source.read(), self.config.max_documents)
        with show_progress(f"reading {self.source.name}", "characters", limit) as advance:
            for _, text in documents:
                digest = hashlib.sha256(text.encode()).digest()
                if digest in seen:  # else the same text could be in both splits
                    repeated += 1
                    continue
                seen.add(digest)
                spool.append(text)
                num_characters += len(text)
                advance(len(text))
                if limit is not None and num_characters >= limit and len(spool) >= self.config.min_documents:
                    notes.append(
                        f"read the first {len(spool):,} documents of {self.source.name}: enough for "
                        f"{self.config.num_samples:,} samples"
                    )
                    break
        if repeated:
            notes.append(f"left out {repeated:,} documents that repeat another one exactly")

    def _cut(self, read: TextSpool, cut: TextSpool, notes: list[str]) -> TextSpool:
        total = sum(read.num_characters)
        part = max(total / (2 * self.config.min_documents), self.config.seq_length * self.config.characters_per_token)
        for index, size in enumerate(read.num_characters):
            num_parts = round(size / part)
            for text in cut_text(read[index], max(num_parts, 2 if len(read) == 1 else 1)):
                cut.append(text)
        if len(cut) > len(read):
            notes.append(
                f"{self.source.name} holds few documents ({len(read)}): cut, at blank lines where it has "
                f"enough, into {len(cut)} parts, which are split as documents"
            )
        return cut

    def _train_tokenizer(self, texts: Iterator[str], num_texts: int, notes: list[str]) -> Tokenizer:
        with show_progress("training the tokenizer", "documents", num_texts) as advance:
            sentences = ["\n".join(self.sentences)] if self.sentences else []
            tokenizer = train_tokenizer(chain(sentences, _count(texts, advance)), self.config.tokenizer_vocab_size)
        size = tokenizer.get_vocab_size()
        if size < self.config.tokenizer_vocab_size:
            wanted = self.config.tokenizer_vocab_size
            notes.append(f"the training text is too short for {wanted:,} tokenizer entries: it gives {size:,}")
        return tokenizer

    def _plant(
        self, documents: Iterator[TokenizedDocument], num_pinned: int, tokenizer: Tokenizer
    ) -> Iterator[TokenizedDocument]:
        """Facts in all training documents but those of the reversal sentences."""
        yield from islice(documents, num_pinned)
        yield from plant_facts(documents, tokenizer, self.config, self.seed)

    def _check_size(self, folder: Path, num_pinned: int) -> None:
        train, validation = (np.load(folder / f"{name}.index.npy")[:, 0] for name in ("train", "validation"))
        train, needed = train[num_pinned:], self.config.seq_length
        if train.sum() < needed or not count_samples(train, needed).sum() or validation.max() < MIN_VALIDATION_TOKENS:
            raise UserError(
                f"{self.source.name}: too short: it gives {train.sum():,} tokens for training and "
                f"{validation.sum():,} for validation; at least {needed:,} (one sample, data.seq_length) and "
                f"{MIN_VALIDATION_TOKENS} are needed"
            )


def _count(items: Iterable[Any], advance: Any) -> Iterator[Any]:
    for item in items:
        yield item
        advance(1)


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
    available = int(count_samples(np.diff(train.offsets), config.seq_length).sum())
    pinned = int(count_samples(np.diff(train.offsets[: train.num_pinned_documents + 1]), config.seq_length).sum())
    if config.num_samples is not None and available < config.num_samples:
        notes.append(f"{config.num_samples:,} training samples were asked for; the training split holds {available:,}")
    if config.num_samples is not None and config.num_samples <= pinned:
        notes.append(f"the reversal sentences alone fill the {config.num_samples:,} training samples")
    files = {name: file["sha256"] for name, file in entry.meta["files"].items()}
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
        "num_samples": int(count_samples(np.diff(split.offsets), seq_length).sum()),
        "num_bytes": int(split.num_bytes.sum()),
        "num_words": int(split.num_words.sum()),
    }

"""Making a token cache: look at the source's beginning, choose how it is split, tokenise it into shards.

A source of up to `data.max_spool_characters` is held on the disk whole: texts that it repeats are left out, its
documents are split by a seeded permutation, and its tokens are one shard. A larger one is never held: each document is
split by its own hash, and the shards are written one after the other while it is read; one that is there is kept.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.config.atomic import write_atomically
from new_llm.config.manifest import describe_file
from new_llm.data.cache import PLAN_FILE
from new_llm.data.progress import show_progress
from new_llm.data.sealed import read_sealed, write_sealed
from new_llm.data.shards import MAX_SHARD_DOCUMENTS, ShardWriter, read_records
from new_llm.data.sources import Position, Source
from new_llm.data.splitting import belongs_to_validation, cut_text, pack_sentences, split_documents
from new_llm.data.spool import TextSpool, encode_bytes
from new_llm.data.tagged_encoding import Place, Tag, encode_tagged
from new_llm.data.tokenizer import TOKENIZER_FILE, padded_vocab_size, read_tokenizer_file, train_tokenizer
from new_llm.data.tokens import Text, token_dtype


def limit_characters(config: DataConfig, source: Source) -> int | None:
    """How much to read of a long source: what num_samples needs, and validation's share; None: all of it."""
    if config.num_samples is None or source.read_whole:
        return None
    needed = config.num_samples * config.seq_length * (1 if source.holds_tokens else config.characters_per_token)
    return int(needed / (1 - config.validation_fraction))


@dataclass
class Builder:
    """Makes the files of one cache."""

    config: DataConfig
    seed: int
    source: Source
    sentences: list[str]
    tokenizer: Tokenizer | None

    def build(self, folder: Path) -> dict[str, Any]:
        """Write the tokenizer and the shards that are missing; what they hold is in the value and in their records."""
        plan = read_sealed(folder / PLAN_FILE)
        if plan is None:
            plan = self._look_ahead(folder)
        if plan["streamed"]:
            notes = self._stream(folder, plan)
            plan = plan | {"notes": [*plan["notes"], *notes]}
        return {name: plan[name] for name in ("dtype", "num_pinned_documents", "notes", "streamed")}

    def _look_ahead(self, folder: Path) -> dict[str, Any]:
        """Read a small source and write its shard, or a large one's beginning, and write the plan and the tokenizer."""
        config, notes = self.config, list[str]()
        with TextSpool(folder) as read, TextSpool(folder) as cut:
            is_whole = self._read(read, notes)
            spool = read
            if is_whole:
                if len(read) < config.min_documents and not self.source.holds_tokens:
                    spool = self._cut(read, cut, notes)
                if len(spool) < 2:
                    raise UserError(
                        f"{self.source.name}: too short: it holds {len(spool)} document of "
                        f"{sum(spool.num_characters)} characters that can't be cut in two; at least 2 "
                        f"documents are needed, one for training and one for validation"
                    )
                train, validation = split_documents(len(spool), config.validation_fraction, self.seed)
            else:
                train, validation = self._split_by_hash(spool)
                notes.append(
                    f"{self.source.name} is large: its documents were split by their hash, and texts that it repeats "
                    f"were kept"
                )
            tokenizer = self.tokenizer or self._train_tokenizer(spool.select(train), len(train), notes)
            with write_atomically(folder / TOKENIZER_FILE) as temporary:
                tokenizer.save(str(temporary))
            pinned = list(pack_sentences(self.sentences, tokenizer, config.seq_length))
            plan = {
                "streamed": not is_whole,
                "notes": notes,
                "dtype": token_dtype(padded_vocab_size(tokenizer)).newbyteorder("<").str,
                "num_pinned_documents": len(pinned),
                "files": {TOKENIZER_FILE: describe_file(folder / TOKENIZER_FILE)},
            }
            write_sealed(folder / PLAN_FILE, plan)
            if is_whole:
                self._write_whole(folder, plan, tokenizer, pinned, spool, train, validation)
        return plan

    def _read(self, spool: TextSpool, notes: list[str]) -> bool:
        """Read the source into the spool as far as it is needed; False: it is large, and was left at its beginning."""
        config, limit = self.config, limit_characters(self.config, self.source)
        seen, repeated, num_characters, num_read = set[bytes](), 0, 0, 0
        splits = set[bool]()
        documents = islice(self.source.read_from(Position()), config.max_documents)
        with show_progress(f"reading {self.source.name}", "characters", limit) as advance:
            for _, _, text in documents:
                raw = encode_bytes(text)
                num_read += len(text)
                digest = hashlib.sha256(raw).digest()
                if digest in seen:  # else the same text could be in both splits
                    repeated += 1
                else:
                    seen.add(digest)
                    spool.append(text)
                    num_characters += len(text)
                    splits.add(belongs_to_validation(raw, config.validation_fraction, self.seed))
                    advance(len(text))
                if limit is not None and num_characters >= limit and len(spool) >= config.min_documents:
                    notes.append(
                        f"read the first {len(spool):,} documents of {self.source.name}: enough for "
                        f"{config.num_samples:,} samples"
                    )
                    break
                if num_read > config.max_spool_characters and len(splits) == 2:
                    notes.clear()
                    return False
        if repeated:
            notes.append(f"left out {repeated:,} documents that repeat another one exactly")
        return True

    def _split_by_hash(self, spool: TextSpool) -> tuple[list[int], list[int]]:
        found: dict[bool, list[int]] = {False: [], True: []}
        for index in range(len(spool)):
            raw = encode_bytes(spool[index])
            found[belongs_to_validation(raw, self.config.validation_fraction, self.seed)].append(index)
        return found[False], found[True]

    def _cut(self, read: TextSpool, cut: TextSpool, notes: list[str]) -> TextSpool:
        total = sum(read.num_characters)
        part = max(total / (2 * self.config.min_documents), self.config.seq_length * self.config.characters_per_token)
        for index, size in enumerate(read.num_characters):
            num_parts = round(size / part)
            for text in cut_text(str(read[index]), max(num_parts, 2 if len(read) == 1 else 1)):
                cut.append(text)
        if len(cut) > len(read):
            notes.append(
                f"{self.source.name} holds few documents ({len(read)}): cut, at blank lines where it has "
                f"enough, into {len(cut)} parts, which are split as documents"
            )
        return cut

    def _train_tokenizer(self, texts: Iterator[Text], num_texts: int, notes: list[str]) -> Tokenizer:
        def sentences_and_texts() -> Iterator[str]:
            if self.sentences:
                yield "\n".join(self.sentences)
            for text in texts:
                yield str(text)
                advance(1)

        with show_progress("training the tokenizer", "documents", num_texts) as advance:
            tokenizer = train_tokenizer(sentences_and_texts(), self.config.tokenizer_vocab_size)
        size = tokenizer.get_vocab_size()
        if size < self.config.tokenizer_vocab_size:
            wanted = self.config.tokenizer_vocab_size
            notes.append(f"the training text is too short for {wanted:,} tokenizer entries: it gives {size:,}")
        return tokenizer

    def _write_whole(
        self,
        folder: Path,
        plan: dict[str, Any],
        tokenizer: Tokenizer,
        pinned: list[str],
        spool: TextSpool,
        train: Iterable[int],
        validation: Iterable[int],
    ) -> None:
        def items() -> Iterator[tuple[Tag, Text]]:
            for text in pinned:
                yield Tag("train", 0, Place()), text
            for text in spool.select(train):
                yield Tag("train", 0, Place()), text
            for text in spool.select(validation):
                yield Tag("validation", 0, Place()), text

        writer = ShardWriter(folder, 0, np.dtype(plan["dtype"]))
        try:
            with show_progress("tokenising", "documents", len(pinned) + len(spool)) as advance:
                for tag, document in encode_tagged(items(), tokenizer, self.config, self.source):
                    writer.add(tag.split, document)
                    advance(1)
            writer.close({"last": True, "end": list(Place()), "notes": []})
        except BaseException:
            writer.abandon()
            raise

    def _stream(self, folder: Path, plan: dict[str, Any]) -> list[str]:
        """Write the shards that are missing; the last one's notes."""
        tokenizer = read_tokenizer_file(folder / TOKENIZER_FILE)
        done = read_records(folder)
        if done:
            _say_resumed(folder, len(done))
        index, place = 0, Place()
        with show_progress(f"tokenising {self.source.name}", "characters") as advance:
            while True:
                record = done.get(index)
                if record is None:
                    record = self._write_shards(folder, plan, tokenizer, index, place, done, advance)
                if record["last"]:
                    return record["notes"]
                index, place = record["index"] + 1, Place(*record["end"])

    def _write_shards(
        self,
        folder: Path,
        plan: dict[str, Any],
        tokenizer: Tokenizer,
        index: int,
        place: Place,
        done: dict[int, Any],
        advance: Callable[[int], None],
    ) -> dict[str, Any]:
        """Shards from this place on, up to one that is there already or to the end; the last one's record."""
        notes, dtype = list[str](), np.dtype(plan["dtype"])
        writer, num_characters = ShardWriter(folder, index, dtype), 0
        items = self._items(place, tokenizer, is_first=not index, notes=notes)
        documents = encode_tagged(items, tokenizer, self.config, self.source)
        try:
            for tag, document in documents:
                writer.add(tag.split, document)
                place, num_characters = tag.place, num_characters + tag.num_characters
                advance(tag.num_characters)
                if num_characters < self.config.shard_characters and writer.num_documents < MAX_SHARD_DOCUMENTS:
                    continue
                record = writer.close({"last": False, "end": list(place), "notes": []})
                index += 1
                if index in done:
                    return record
                writer, num_characters = ShardWriter(folder, index, dtype), 0
            return writer.close({"last": True, "end": list(place), "notes": notes})
        except BaseException:
            writer.abandon()
            raise
        finally:
            documents.close()

    def _items(
        self, place: Place, tokenizer: Tokenizer, *, is_first: bool, notes: list[str]
    ) -> Iterator[tuple[Tag, Text]]:
        """The documents of a large source from a place on, the reversal sentences before the first."""
        config, limit = self.config, limit_characters(self.config, self.source)
        if is_first:
            for text in pack_sentences(self.sentences, tokenizer, config.seq_length):
                yield Tag("train", 0, place), text
        for position, _, text in self.source.read_from(Position(place.part, place.document)):
            if config.max_documents is not None and place.num_documents >= config.max_documents:
                return
            if limit is not None and place.num_characters >= limit and place.num_documents >= config.min_documents:
                notes.append(
                    f"read the first {place.num_documents:,} documents of {self.source.name}: enough for "
                    f"{config.num_samples:,} samples"
                )
                return
            is_held_out = belongs_to_validation(encode_bytes(text), config.validation_fraction, self.seed)
            place = Place(
                *position,
                place.num_documents + 1,
                place.num_characters + len(text),
            )
            yield Tag("validation" if is_held_out else "train", len(text), place), text


def _say_resumed(folder: Path, num_shards: int) -> None:
    print(f"new-llm: {folder}: goes on after {num_shards:,} shards that are there", file=sys.stderr, flush=True)

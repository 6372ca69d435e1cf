"""Building a token cache: read the source, split it by document, train a tokenizer, tokenise.

Texts and tokens go through Arrow files on disk, so that memory does not grow with the source (except for an index of
about a hundred bytes per document). `datasets` tokenises the texts shard by shard, in `num_workers` processes. Each
shard is its own file: a build that was killed resumes after the last complete shard.
"""

import ctypes
import functools
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.config.files import write_atomically, write_text_atomically
from new_llm.config.terminal import show_progress
from new_llm.data.local_files import BadRows
from new_llm.data.sources import Source
from new_llm.data.tokenizer import (
    BATCH_DOCUMENTS,
    TOKENIZER_FILE,
    SpecialTokens,
    cut_batches,
    padded_vocab_size,
    read_tokenizer_file,
    tokenize_documents,
    train_tokenizer,
)
from new_llm.formats import format_plural

LEAST_READ_CHARACTERS = 1 << 24
LEAST_PART_CHARACTERS = 1536
PR_SET_PDEATHSIG = 1  # of Linux's prctl
DIGEST_BYTES = 16  # of a text's sha256, kept to find repeated documents


def limit_characters(config: DataConfig, source: Source) -> int | None:
    """Return how many characters to read of a long source for num_samples plus the validation share; None: all.

    Rounded up to a power of two, so that most other values of num_samples and seq_length share the cache.
    """
    if config.num_samples is None or source.read_whole:
        return None
    needed = config.num_samples * config.seq_length * config.characters_per_token / (1 - config.validation_fraction)
    limit = max(LEAST_READ_CHARACTERS, 1 << int(needed - 1).bit_length())
    return None if source.max_characters is not None and source.max_characters <= limit else limit


@dataclass
class Builder:
    """Builds the files of one cache.

    Attributes:
        sentences: the reversal sentences, for which the training split reserves room.
        tokenizer: None: train one, on the training split and, if that is long enough, the reversal sentences.
        validation: the source of the validation documents; None: hold out a share of `source`.
    """

    config: DataConfig
    source: Source
    sentences: list[str]
    tokenizer: Tokenizer | None
    validation: Source | None = None

    def build(self, work: Path, folder: Path) -> dict[str, Any]:
        """Write the tokenizer and both splits into the cache's empty folder; return the content of `meta.json`.

        `work` is a folder for intermediate files. Files of an interrupted build there are reused.
        """
        train, validation, notes = self._read_splits(work)
        tokenizer = self._find_tokenizer(work, train, notes)
        tokenizer.save(str(folder / TOKENIZER_FILE))
        room, num_special = tokenize_documents([f"{one}\n" for one in self.sentences], tokenizer).num_tokens, 0
        dtype = np.dtype("<u2" if padded_vocab_size(tokenizer) <= 1 << 16 else "<u4")
        with show_progress("tokenising", "documents", len(train) + len(validation)) as update:
            for name, texts, before in (("train", train, room), ("validation", validation, 0)):
                shards = self._tokenise(texts, tokenizer, dtype, work / name)
                num_special += write_split(folder, name, shards, dtype, before, update)
        if num_special:
            meaning = "plain text" if self.config.special_tokens == "text" else "control tokens"
            notes.append(
                f"the documents spell out special tokens of the tokenizer, such as <|endoftext|>, in "
                f"{format_plural(num_special, 'place')}: encoded as {meaning} (data.special_tokens)"
            )
        return {"dtype": dtype.str, "room": room, "notes": notes}

    def _read_splits(self, work: Path) -> tuple[Any, Any, list[str]]:
        """Read the distinct documents of both splits, cut into parts if there are too few; and notes about them."""
        file, held, done = (work / name for name in ("texts.arrow", "validation.arrow", "texts.json"))
        if not done.exists():
            notes, seen = list[str](), set[bytes]()
            if self.validation is not None:  # read first, so that its documents are dropped from training
                write_texts(held, self._read_distinct(self.validation, seen, notes))
            limit = limit_characters(self.config, self.source)
            write_texts(file, self._read_distinct(self.source, seen, notes, limit, self.config.max_documents))
            texts = open_arrow(file)
            if self.validation is None and len(texts) < self.config.min_documents:
                parts = cut_texts([row["text"] for row in texts], self.config.min_documents)
                write_texts(file, parts)
                if len(parts) > len(texts):
                    notes.append(
                        f"{self.source.name} has few documents ({len(texts)}): cut into {len(parts)} parts, at blank "
                        f"lines if there are enough; the parts are split into training and validation like documents"
                    )
            write_text_atomically(done, json.dumps(notes))
        texts, notes = open_arrow(file), json.loads(done.read_text(encoding="utf-8"))
        if self.validation is not None:
            if not len(texts):
                raise UserError(
                    f"{self.source.name}: every document is in {self.validation.name}, too: none is left for training"
                )
            return texts, open_arrow(held), notes
        if len(texts) < 2:
            raise UserError(
                f"{self.source.name}: too short: it has {len(texts)} document of {read_sizes(texts).sum()} "
                f"characters that can't be cut in two; at least 2 documents are needed, one for training and one for "
                f"validation"
            )
        rows = split_documents(len(texts), self.config.validation_fraction, self.config.split_seed)
        return texts.select(rows[0]), texts.select(rows[1]), notes

    def _read_distinct(
        self,
        source: Source,
        seen: set[bytes],
        notes: list[str],
        limit: int | None = None,
        max_documents: int | None = None,
    ) -> Iterator[str]:
        """Yield a source's documents until `limit` characters are reached, except those whose digest is in `seen`."""
        repeated, num_characters, num_before = 0, 0, len(seen)
        bad_rows = BadRows(skip=self.config.on_bad_row == "skip")
        with show_progress(f"reading {source.name}", "characters", limit) as update:
            for _, text in islice(source.read(bad_rows), max_documents):
                digest = hashlib.sha256(text.encode("utf-8")).digest()[:DIGEST_BYTES]
                if digest in seen:  # otherwise the same text could end up in both splits
                    repeated += 1
                    continue
                seen.add(digest)
                yield text
                num_characters += len(text)
                update(advance=len(text))
                num_read = len(seen) - num_before
                if limit is not None and num_characters >= limit and num_read >= self.config.min_documents:
                    notes.append(
                        f"read only the first {num_read:,} documents of {source.name}, as many as num_samples and "
                        f"seq_length need"
                    )
                    break
        notes += bad_rows.describe()
        if repeated:
            notes.append(f"left out {format_plural(repeated, 'exact duplicate')} of other documents")

    def _find_tokenizer(self, work: Path, texts: Any, notes: list[str]) -> Tokenizer:
        if self.tokenizer is not None:
            return self.tokenizer
        wanted, file = self.config.tokenizer_vocab_size, work / TOKENIZER_FILE
        if file.exists():
            tokenizer = read_tokenizer_file(file)
        else:
            share, num_characters = self.config.max_reversal_share, sum(map(len, self.sentences))
            has_room = num_characters <= share * (num_characters + int(read_sizes(texts).sum()))

            def sentences_and_texts() -> Iterator[str]:
                if self.sentences and has_room:  # otherwise training will not contain all of them
                    yield "\n".join(dict.fromkeys(self.sentences))
                for row in texts:
                    yield row["text"]
                    update(advance=1)

            with show_progress("training the tokenizer", "documents", len(texts)) as update:
                tokenizer = train_tokenizer(sentences_and_texts(), wanted)
            with write_atomically(file) as temporary:
                tokenizer.save(str(temporary))
        if (size := tokenizer.get_vocab_size()) < wanted:
            notes.append(f"the training text is too short for {wanted:,} tokenizer entries: it yields {size:,}")
        return tokenizer

    def _tokenise(self, texts: Any, tokenizer: Tokenizer, dtype: np.dtype[Any], prefix: Path) -> Iterator[Any]:
        """Yield the tokenised shards of a split as Arrow tables; shards that are already on disk are read."""
        config = self.config
        sizes = read_sizes(texts)
        shards = (np.cumsum(sizes) - sizes) // config.shard_characters
        encode = functools.partial(encode_table, tokenizer=tokenizer, special_tokens=config.special_tokens, dtype=dtype)
        if config.num_workers > 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads do not survive a fork
            _end_forks_with_parent()
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            name = f"{prefix.name}-{config.shard_characters}-{shard:05d}"  # another shard size gives other files
            try:
                mapped = (
                    texts.select(rows)
                    .with_format("arrow")
                    .map(
                        encode,
                        batched=True,
                        batch_size=BATCH_DOCUMENTS,
                        remove_columns=["text", "size"],
                        num_proc=min(config.num_workers, len(rows)) if config.num_workers > 1 else None,
                        cache_file_name=str(prefix.with_name(f"{name}.arrow")),
                        load_from_cache_file=True,
                        new_fingerprint=name,
                    )
                )
            except RuntimeError as error:
                if "subprocess" not in str(error):
                    raise
                raise UserError(
                    f"data.num_workers: one of {config.num_workers} tokenising processes was killed, probably out of "
                    f"memory; try fewer workers"
                ) from None
            yield mapped.data


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Atomically write texts and their lengths in characters to an Arrow file."""
    import pyarrow as pa

    schema = pa.schema([("text", pa.large_string()), ("size", pa.int64())])
    with (
        write_atomically(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        for batch in cut_batches(texts):
            writer.write_batch(pa.record_batch([batch, [len(text) for text in batch]], schema=schema))


def open_arrow(path: Path) -> Any:
    """Open an Arrow file as a memory-mapped `datasets.Dataset`."""
    import datasets

    datasets.disable_progress_bars()  # we show our own
    return datasets.Dataset.from_file(str(path))


def read_sizes(texts: Any) -> NDArray[np.int64]:
    """Return the length in characters of each text of a data set, [N]."""
    return texts.select_columns("size").with_format("numpy")[:]["size"]


def encode_table(table: Any, tokenizer: Tokenizer, special_tokens: SpecialTokens, dtype: np.dtype[Any]) -> Any:
    """Tokenise the column `text` of an Arrow table into the columns ids, num_bytes, num_words and num_special.

    num_special counts how often each text spells out a special token of the tokenizer, e.g. <|endoftext|>.
    """
    import pyarrow as pa

    texts = table.column("text").to_pylist()
    split = tokenize_documents(texts, tokenizer, special_tokens)
    special = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    pattern = re.compile("|".join(special) or r"(?!)")  # (?!) never matches
    return pa.table(
        {
            "ids": pa.ListArray.from_arrays(split.offsets.astype(np.int32), split.tokens.astype(dtype)),
            "num_bytes": split.num_bytes,
            "num_words": split.num_words,
            "num_special": [len(pattern.findall(text)) for text in texts],
        }
    )


def write_split(folder: Path, name: str, shards: Iterable[Any], dtype: np.dtype[Any], room: int, update: Any) -> int:
    """Write one split's files from tables of `encode_table`, after `room` empty tokens; return their num_special."""
    lengths, columns = list[Any](), {"num_bytes": list[Any](), "num_words": list[Any](), "num_special": list[Any]()}
    with (folder / f"{name}.tokens").open("wb") as file:
        np.zeros(room, dtype).tofile(file)
        for table in shards:
            for ids in table.column("ids").chunks:
                ids.flatten().to_numpy().tofile(file)
                lengths.append(ids.value_lengths().to_numpy())
            for column, parts in columns.items():
                parts.append(table.column(column).to_numpy())
            update(advance=table.num_rows)
    index = {column: np.concatenate(parts).astype("<i8") for column, parts in columns.items()}
    num_special = int(index.pop("num_special").sum())
    index["offsets"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype="<i8")])
    for column, values in index.items():
        np.save(folder / f"{name}.{column}.npy", values)
    return num_special


@functools.cache
def _end_forks_with_parent() -> None:
    """Make Linux kill processes forked from now on when this one dies, even if it dies by SIGKILL."""
    if sys.platform == "linux":
        os.register_at_fork(after_in_child=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


# Splitting


SPLIT_STREAM = 1  # an independent random stream for the split
# Where a document may be cut, best first: after blank lines, after a line, after white space.
CUTS = (re.compile(r"\n(?:[^\S\n]*\n)+"), re.compile(r"\n(?:[^\S\n]*\n)*"), re.compile(r"\s+"))


def split_documents(
    num_documents: int, validation_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the indices of two or more documents into training and validation, both sorted, at least one each."""
    num_validation = min(max(1, round(num_documents * validation_fraction)), num_documents - 1)
    order = np.random.default_rng([seed, SPLIT_STREAM]).permutation(num_documents)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def cut_texts(texts: list[str], min_documents: int) -> list[str]:
    """Cut a few texts into about 2 · min_documents parts of LEAST_PART_CHARACTERS or more; a single one into ≥ 2."""
    part = max(sum(map(len, texts)) / (2 * min_documents), LEAST_PART_CHARACTERS)
    least = 2 if len(texts) == 1 else 1
    return [piece for text in texts for piece in cut_text(text, max(round(len(text) / part), least))]


def cut_text(text: str, num_parts: int) -> list[str]:
    """Cut a text into contiguous parts of about equal length; joined, they give the text again.

    Cuts fall at blank lines if there are enough of them, else at line ends, else at white space, else before any
    visible character (for languages written without spaces). Every part has a visible character; a text with too few
    gives fewer parts.
    """
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    wanted = np.arange(1, num_parts) * len(text) / num_parts
    places = np.zeros(0, np.int64)
    for pattern in CUTS:
        ends = (match.end() for match in pattern.finditer(text))
        places = np.array([end for end in ends if first < end < last], dtype=np.int64)
        if len(places) >= num_parts - 1:
            break
    else:
        visible = (next((at for at in range(int(place), last) if not text[at].isspace()), last) for place in wanted)
        places = np.array([at for at in visible if first < at < last], dtype=np.int64)
    if num_parts < 2 or not len(places):
        return [text]
    after = np.searchsorted(places, wanted).clip(0, len(places) - 1)
    before = (after - 1).clip(0)
    nearest = np.where(wanted - places[before] < places[after] - wanted, places[before], places[after])
    edges = [0, *np.unique(nearest).tolist(), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]

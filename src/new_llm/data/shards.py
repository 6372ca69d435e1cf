"""Shards of a token cache: files of tokens and of their documents, each closed by a record with checksums.

00003.train.tokens       the tokens of the shard's training documents, one after the other
00003.train.index        for each of them: tokens, UTF-8 bytes and words of its text, three int64
00003.validation.*       the same for validation
00003.json               sizes and sha256 of these files, and where the next shard goes on; written last
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from new_llm.config.atomic import sync_to_disk
from new_llm.config.manifest import describe_file
from new_llm.data.sealed import read_sealed, write_sealed
from new_llm.data.tokens import TokenizedDocument, TokenSplit

SPLITS = ("train", "validation")
INDEX_COLUMNS = ("offsets", "num_bytes", "num_words")
INDEX_BLOCK = 1 << 16  # documents whose index is held at once
MAX_SHARD_DOCUMENTS = 1 << 20  # their index is held while the shard is written


class ShardWriter:
    """Writes one shard, a document at a time, under its own names: it counts only once its record is there.

    Args:
        folder: of the cache.
        index: the shard's number.
        dtype: of the tokens.
    """

    def __init__(self, folder: Path, index: int, dtype: np.dtype[Any]) -> None:
        self.num_documents = 0
        self._folder, self._index = folder, index
        self._dtype = dtype.newbyteorder("<")
        self._record = record_path(folder, index)
        self._record.unlink(missing_ok=True)
        # Beside the shard's own names, which another process may have mapped.
        self._files = {split: self._temporary(f"{split}.tokens").open("wb") for split in SPLITS}
        self._sizes = {split: array("q") for split in SPLITS}
        self._num_tokens: dict[str, int] = dict.fromkeys(SPLITS, 0)

    def add(self, split: str, document: TokenizedDocument) -> None:
        """Write one document."""
        document.ids.astype(self._dtype).tofile(self._files[split])
        self._sizes[split].extend((len(document.ids), document.num_bytes, document.num_words))
        self._num_tokens[split] += len(document.ids)
        self.num_documents += 1

    def close(self, record: dict[str, Any]) -> dict[str, Any]:
        """Flush the files, give them their names and write the record: `record` and what the shard holds."""
        files = dict[str, Any]()
        for split in SPLITS:
            self._files[split].close()
            np.frombuffer(self._sizes[split], dtype=np.int64).astype("<i8").tofile(self._temporary(f"{split}.index"))
            for kind in ("tokens", "index"):
                temporary, path = self._temporary(f"{split}.{kind}"), shard_path(self._folder, self._index, split, kind)
                sync_to_disk(temporary)
                files[path.name] = describe_file(temporary)
                temporary.replace(path)
        sync_to_disk(self._folder)
        counts = {
            split: {"num_documents": len(self._sizes[split]) // 3, "num_tokens": self._num_tokens[split]}
            for split in SPLITS
        }
        record = record | {"index": self._index, "splits": counts, "files": files}
        write_sealed(self._record, record)
        return record

    def abandon(self) -> None:
        """Remove what has been written of a shard that will not be closed."""
        for file in self._files.values():
            file.close()
        for split in SPLITS:
            for kind in ("tokens", "index"):
                self._temporary(f"{split}.{kind}").unlink(missing_ok=True)

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{self._index:05d}.{name}.tmp"


def shard_path(folder: Path, index: int, split: str, kind: str) -> Path:
    """The file of one shard's tokens or index."""
    return folder / f"{index:05d}.{split}.{kind}"


def record_path(folder: Path, index: int) -> Path:
    """The file of one shard's record."""
    return folder / f"{index:05d}.json"


def read_records(folder: Path) -> dict[int, dict[str, Any]]:
    """The records of the shards that were closed, by number."""
    found = dict[int, dict[str, Any]]()
    for path in folder.glob("[0-9]*.json"):
        record = read_sealed(path)
        if record is not None and path == record_path(folder, int(record["index"])):
            found[int(record["index"])] = record
    return found


def merge_index(folder: Path, records: Sequence[dict[str, Any]], split: str) -> None:
    """Write the index of a whole split, as arrays to be mapped, from those of its shards, a block at a time."""
    total = sum(record["splits"][split]["num_documents"] for record in records)
    shapes = {"offsets": total + 1, "num_bytes": total, "num_words": total}
    paths = {name: folder / f".{split}.{name}.npy.tmp" for name in INDEX_COLUMNS}
    arrays = {
        name: np.lib.format.open_memmap(paths[name], mode="w+", dtype="<i8", shape=(shapes[name],))
        for name in INDEX_COLUMNS
    }
    done, end = 0, 0
    arrays["offsets"][0] = 0
    for record in records:
        for block in _read_index(shard_path(folder, record["index"], split, "index")):
            rows = slice(done, done + len(block))
            ends = end + np.cumsum(block[:, 0])
            arrays["offsets"][rows.start + 1 : rows.stop + 1] = ends
            arrays["num_bytes"][rows], arrays["num_words"][rows] = block[:, 1], block[:, 2]
            done, end = rows.stop, int(ends[-1])
    for name, values in arrays.items():
        values.flush()
        del values
        sync_to_disk(paths[name])
        paths[name].replace(folder / f"{split}.{name}.npy")


def _read_index(path: Path) -> Iterator[NDArray[np.int64]]:
    with path.open("rb") as file:
        while len(block := np.fromfile(file, dtype="<i8", count=3 * INDEX_BLOCK)):
            yield block.reshape(-1, 3).astype(np.int64)


def load_split(folder: Path, shards: Sequence[dict[str, Any]], split: str, dtype: str, num_pinned: int) -> TokenSplit:
    """One split of a complete cache; nothing of it is held in memory."""
    from new_llm.data.sharded_tokens import map_tokens

    columns = [
        np.asarray(np.load(folder / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False)) for name in INDEX_COLUMNS
    ]
    files = [shard_path(folder, shard["index"], split, "tokens") for shard in shards]
    tokens = map_tokens(files, [shard["splits"][split]["num_tokens"] for shard in shards], np.dtype(dtype))
    return TokenSplit(tokens, *columns, num_pinned_documents=num_pinned)

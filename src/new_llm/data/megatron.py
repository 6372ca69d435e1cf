"""Megatron's indexed tokens: an index, and one binary file or several that are read as one.

The index (`.idx`), little-endian: the nine bytes `MMIDIDX\\0\\0`, the version 1 (uint64), a code for the tokens' type
(uint8), the number of sequences N and of entries in the document index M (uint64), then N lengths (int32), N byte
positions in the binary file (int64) and M indices of sequences (int64): document i is the sequences from entry i up to
entry i + 1. Source: Megatron-LM's `indexed_dataset.py`; EleutherAI published Pythia's pre-shuffled Pile in this form,
its binary file in pieces, `document-00000-of-00020.bin` and so on.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from new_llm.config import UserError
from new_llm.config.bounded_files import check_regular_file

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""By code; 6 and 7 are floats, which are no tokens."""
CHECKED_AT_ONCE = 1 << 20  # entries of the index
PIECE_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.bin$")


@dataclass(frozen=True)
class MegatronFiles:
    """An index and its binary files, in order."""

    index: Path
    binaries: list[Path]


def find_megatron(path: Path) -> MegatronFiles | None:
    """The files that a path means: the index, the binary file, or the name both share; None: it means something else.

    Raises:
        UserError: the index or a binary file is missing.
    """
    prefix = path.with_suffix("") if path.suffix in (".idx", ".bin") else path
    index = prefix.with_name(f"{prefix.name}.idx")
    if path.is_dir() or not (index.is_file() or path.suffix in (".idx", ".bin")):
        return None
    if not index.is_file():
        raise UserError(f"{index}: no such file; Megatron's tokens are an .idx and a .bin file of one name")
    whole = prefix.with_name(f"{prefix.name}.bin")
    if whole.is_file():
        return MegatronFiles(index, [whole])
    found = {file: PIECE_NAME.search(file.name) for file in prefix.parent.iterdir()}
    pieces = sorted(file for file, match in found.items() if match and file.name[: match.start()] == prefix.name)
    if not pieces:
        raise UserError(f"{whole}: no such file; Megatron's tokens are an .idx and a .bin file of one name")
    last = PIECE_NAME.search(pieces[-1].name)
    if last is None or len(pieces) != int(last[2]):
        raise UserError(f"{pieces[0]}: one of {last[2] if last else '?'} pieces, of which {len(pieces)} are here")
    return MegatronFiles(index, pieces)


class MegatronTokens:
    """The documents of an index that was found sound; nothing but the index is mapped.

    Attributes:
        files: all of them, the index first.
        num_documents: how many there are.
    """

    def __init__(self, found: MegatronFiles) -> None:
        self.files = [found.index, *found.binaries]
        self._index = found.index
        self._read_header(found.index)
        self._binaries = found.binaries
        self._ends = np.cumsum([file.stat().st_size for file in found.binaries])
        self._check_index()
        # Some writers never close a document: there each sequence is one.
        self._has_documents = len(self._documents) > 1
        self.num_documents = len(self._documents) - 1 if self._has_documents else len(self._lengths)

    def _read_header(self, path: Path) -> None:
        for file in self.files:
            check_regular_file(file)
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise UserError(f"{path}: no index of Megatron's: it does not begin with MMIDIDX")
        _, version, code, num_sequences, num_entries = HEADER.unpack(header)
        if version != 1:
            raise UserError(f"{path}: version {version} of Megatron's index; only 1 is known")
        if code not in TYPES:
            raise UserError(f"{path}: tokens of the unknown type {code}; known are {', '.join(map(str, TYPES))}")
        expected = HEADER.size + 12 * num_sequences + 8 * num_entries
        size = path.stat().st_size
        if size not in (expected, expected + num_sequences):  # a multimodal index has a byte more a sequence
            raise UserError(
                f"{path}: {size:,} bytes, but {num_sequences:,} sequences and {num_entries:,} document entries need "
                f"{expected:,}"
            )
        self._dtype = np.dtype(TYPES[code]).newbyteorder("<")
        sections = ((np.dtype("<i4"), num_sequences), (np.dtype("<i8"), num_sequences), (np.dtype("<i8"), num_entries))
        offset, arrays = HEADER.size, list[NDArray[np.integer]]()
        for dtype, length in sections:
            arrays.append(
                np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(length,)) if length else np.zeros(0, dtype)
            )
            offset += length * dtype.itemsize
        self._lengths, self._places, self._documents = arrays

    def _check_index(self) -> None:
        """Every sequence lies inside the binary files, and every document inside the sequences."""
        path, num_sequences = self._index, len(self._lengths)
        num_bytes, total = int(self._ends[-1]), 0
        for start in range(0, num_sequences, CHECKED_AT_ONCE):
            lengths = self._lengths[start : start + CHECKED_AT_ONCE].astype(np.int64)
            places = self._places[start : start + CHECKED_AT_ONCE]
            room = num_bytes - lengths * self._dtype.itemsize
            if len(bad := np.flatnonzero((lengths < 0) | (places < 0) | (places > room))):
                at = int(bad[0])
                raise UserError(
                    f"{path}: sequence {start + at} of {int(lengths[at]):,} tokens at byte {int(places[at]):,} lies "
                    f"outside the binary file of {num_bytes:,} bytes"
                )
            total += int(lengths.sum()) * self._dtype.itemsize
            if total > num_bytes:  # else a small file could stand for any number of tokens
                raise UserError(f"{path}: its sequences are longer than the binary file of {num_bytes:,} bytes")
        before = 0
        for start in range(0, len(self._documents), CHECKED_AT_ONCE):
            entries = self._documents[start : start + CHECKED_AT_ONCE]
            steps = np.diff(entries, prepend=before if start else entries[0])
            if (steps < 0).any() or entries[0] < 0 or entries[-1] > num_sequences:
                raise UserError(f"{path}: its document index does not rise from 0 to {num_sequences:,}")
            before = int(entries[-1])
        if len(self._documents) > 1 and (self._documents[0] != 0 or before != num_sequences):
            raise UserError(f"{path}: its document index does not rise from 0 to {num_sequences:,}")

    def read(self, skip: int) -> Iterator[tuple[str, NDArray[np.integer]]]:
        """(name, tokens) of the documents after the first `skip`.

        Raises:
            UserError: a file can't be read, or a token is negative.
        """
        try:
            handles = [file.open("rb") for file in self._binaries]
            try:
                for document in range(skip, self.num_documents):
                    yield f"{self._index.name}:{document}", self._read_document(handles, document)
            finally:
                for handle in handles:
                    handle.close()
        except OSError as error:
            raise UserError(f"{self._index}: can't be read: {error.strerror or error}") from None

    def _read_document(self, handles: list, document: int) -> NDArray[np.integer]:
        first, last = document, document + 1
        if self._has_documents:
            first, last = int(self._documents[document]), int(self._documents[document + 1])
        pieces = [self._read_sequence(handles, sequence) for sequence in range(first, last)]
        tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
        if len(tokens) and tokens.min() < 0:
            raise UserError(f"{self._index}: document {document} holds the negative token {int(tokens.min())}")
        return tokens

    def _read_sequence(self, handles: list, sequence: int) -> NDArray[np.integer]:
        place = int(self._places[sequence])
        left = int(self._lengths[sequence]) * self._dtype.itemsize
        raw = list[bytes]()
        piece = int(np.searchsorted(self._ends, place, side="right"))
        while left:
            begin = int(self._ends[piece - 1]) if piece else 0
            handles[piece].seek(place - begin)
            taken = handles[piece].read(min(left, int(self._ends[piece]) - place))
            if not taken:
                raise UserError(f"{self._binaries[piece]}: shorter than when it was opened")
            raw.append(taken)
            place, left = place + len(taken), left - len(taken)
            piece += place >= int(self._ends[piece])
        return np.frombuffer(b"".join(raw), dtype=self._dtype)


def open_megatron(found: MegatronFiles) -> MegatronTokens:
    """Read and check an index.

    Raises:
        UserError: a file can't be read, or the index is none or points outside the binary file.
    """
    try:
        return MegatronTokens(found)
    except OSError as error:
        raise UserError(f"{found.index}: can't be read: {error.strerror or error}") from None

"""Documents on disk between reading and tokenising: they are read twice, and memory stays constant."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from new_llm.data.tokens import Text


class TextSpool:
    """A list of documents in a nameless file, which goes when it is closed or the process ends."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._ends = [0]
        self._holds_tokens = list[bool]()
        self.num_characters = list[int]()

    def append(self, text: Text) -> None:
        """Add a document at the end."""
        raw = encode_bytes(text)
        self._file.seek(self._ends[-1])
        self._file.write(raw)
        self._ends.append(self._ends[-1] + len(raw))
        self._holds_tokens.append(not isinstance(text, str))
        self.num_characters.append(len(text))

    def __len__(self) -> int:
        return len(self.num_characters)

    def __getitem__(self, index: int) -> Text:
        self._file.seek(self._ends[index])
        raw = self._file.read(self._ends[index + 1] - self._ends[index])
        return np.frombuffer(raw, dtype="<i8") if self._holds_tokens[index] else raw.decode("utf-8")

    def select(self, indices: Iterable[int]) -> Iterator[Text]:
        """The documents with these indices."""
        return (self[int(index)] for index in indices)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def encode_bytes(text: Text) -> bytes:
    """A document as bytes, the same for equal documents."""
    return text.encode("utf-8") if isinstance(text, str) else text.astype("<i8").tobytes()

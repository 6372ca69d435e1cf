"""Documents on disk between reading and tokenising: they are read twice, and memory stays constant."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self


class TextSpool:
    """A list of texts in a nameless file, which goes when it is closed or the process ends."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._ends = [0]
        self.num_characters = list[int]()

    def append(self, text: str) -> None:
        """Add a text at the end."""
        raw = text.encode("utf-8")
        self._file.seek(self._ends[-1])
        self._file.write(raw)
        self._ends.append(self._ends[-1] + len(raw))
        self.num_characters.append(len(text))

    def __len__(self) -> int:
        return len(self.num_characters)

    def __getitem__(self, index: int) -> str:
        self._file.seek(self._ends[index])
        return self._file.read(self._ends[index + 1] - self._ends[index]).decode("utf-8")

    def select(self, indices: Iterable[int]) -> Iterator[str]:
        """The texts with these indices."""
        return (self[int(index)] for index in indices)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

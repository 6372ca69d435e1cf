"""One array of tokens over many files, of which a few are mapped at a time."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

MAX_OPEN_FILES = 64  # a mapped file holds a descriptor, of which a process has about a thousand


class ShardedTokens:
    """Files of tokens, one after the other, read like the 1-D array that they are in all.

    A slice inside one file is a view of it; other reads copy what they ask for. `np.asarray` copies everything.

    Args:
        files: their paths.
        lengths: tokens in each, at least one.
        dtype: of all.
    """

    ndim = 1

    def __init__(self, files: Sequence[Path], lengths: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._files = list(files)
        self._ends = np.cumsum(np.array(lengths, dtype=np.int64))
        self._starts = self._ends - np.array(lengths, dtype=np.int64)
        self._open = functools.lru_cache(maxsize=MAX_OPEN_FILES)(self._map)

    @property
    def shape(self) -> tuple[int]:
        """(number of tokens,)."""
        return (len(self),)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self._gather(np.arange(start, stop, step))
            return self._slice(start, stop)
        places = np.asarray(index)
        if places.dtype.kind not in "iu":
            raise IndexError("tokens are chosen by a slice or by integers")
        found = self._gather(places)
        return found if places.ndim else found[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        whole = self._slice(0, len(self))
        return whole if dtype is None else whole.astype(dtype)

    def astype(self, dtype: Any) -> NDArray[Any]:
        """All tokens, copied into memory."""
        return np.asarray(self).astype(dtype)

    def take(self, indices: Any, axis: int | None = None, out: Any = None, mode: str = "raise") -> NDArray[Any]:
        """`np.take`: mode is raise, wrap or clip."""
        places = np.asarray(indices)
        if mode == "wrap":
            places = places % len(self)
        elif mode == "clip":
            places = places.clip(0, len(self) - 1)
        return self._gather(places)

    def _map(self, file: int) -> NDArray[Any]:
        length = int(self._ends[file] - self._starts[file])
        return np.asarray(np.memmap(self._files[file], dtype=self.dtype, mode="r", shape=(length,)))

    def _slice(self, start: int, stop: int) -> NDArray[Any]:
        pieces = list[NDArray[Any]]()
        file = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin, end = int(self._starts[file]), min(int(self._ends[file]), stop)
            pieces.append(self._open(file)[start - begin : end - begin])
            start, file = end, file + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)

    def _gather(self, places: NDArray[Any]) -> NDArray[Any]:
        flat = places.reshape(-1).astype(np.int64)
        flat = np.where(flat < 0, flat + len(self), flat)
        if len(flat) and (flat.min() < 0 or flat.max() >= len(self)):
            raise IndexError(f"token {int(flat.max())} of {len(self)}")
        found = np.empty(len(flat), self.dtype)
        files = np.searchsorted(self._ends, flat, side="right")
        for file in np.unique(files).tolist():
            chosen = files == file
            found[chosen] = self._open(file)[flat[chosen] - self._starts[file]]
        return found.reshape(places.shape)


def map_tokens(files: Sequence[Path], lengths: Sequence[int], dtype: np.dtype[Any]) -> NDArray[np.unsignedinteger]:
    """The tokens of these files as one array; a single file is mapped as it is, empty ones are left out."""
    held = [(file, length) for file, length in zip(files, lengths, strict=True) if length]
    if not held:
        return np.zeros(0, dtype)
    if len(held) == 1:
        return np.memmap(held[0][0], dtype=dtype, mode="r", shape=(held[0][1],))
    tokens = ShardedTokens([file for file, _ in held], [length for _, length in held], dtype)
    return cast(NDArray[np.unsignedinteger], tokens)  # an array by all that is asked of it

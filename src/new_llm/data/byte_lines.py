"""Bytes of a file in bounded pieces: plain, unpacked from zstd, and cut into lines."""

from collections.abc import Iterator
from pathlib import Path

from new_llm.config import UserError
from new_llm.config.limits import ReadLimits

READ_BYTES = 1 << 20  # of a file at once
ZSTD_BYTES = 1 << 12  # of a packed file at once; four bytes can unpack to 128 KiB, so these to 128 MiB at most
FREE_BYTES = 1 << 24  # of text that a packed file may hold whatever its own size


def read_chunks(path: Path, num_bytes: int = READ_BYTES) -> Iterator[bytes]:
    """A file in pieces."""
    with path.open("rb") as file:
        while chunk := file.read(num_bytes):
            yield chunk


def read_zstd(path: Path, limits: ReadLimits) -> Iterator[bytes]:
    """What a zstd file of any number of frames unpacks to, in pieces.

    Raises:
        UserError: it is corrupt, truncated, needs too large a window or unpacks to too much.
    """
    import zstandard

    # Not stream_reader: it takes the end of a truncated file for the end of the data.
    decompressor = zstandard.ZstdDecompressor(max_window_size=limits.max_zstd_window_bytes)
    frame = decompressor.decompressobj()
    budget = UnpackingBudget(path, limits)
    try:
        for piece in read_chunks(path, ZSTD_BYTES):
            chunk = piece
            while chunk:
                if frame.eof:
                    frame = decompressor.decompressobj()
                unpacked = frame.decompress(chunk)
                budget.take(len(unpacked))
                if unpacked:
                    yield unpacked
                chunk = frame.unused_data
    except zstandard.ZstdError as error:
        hint = " (limits.max_zstd_window_bytes)" if "memory" in str(error).lower() else ""
        raise UserError(f"{path}: corrupt or no zstd file: {' '.join(str(error).split())}{hint}") from None
    if not frame.eof:
        raise UserError(f"{path}: truncated: the file ends inside a zstd frame")


class UnpackingBudget:
    """What a packed file may unpack to; `take` raises a UserError beyond it."""

    def __init__(self, path: Path, limits: ReadLimits) -> None:
        self._path, self._ratio = path, limits.max_compression_ratio
        self._left = int(path.stat().st_size * self._ratio) + FREE_BYTES

    def take(self, num_bytes: int) -> None:
        """Count unpacked bytes."""
        self._left -= num_bytes
        if self._left < 0:
            raise UserError(
                f"{self._path}: unpacks to more than {self._ratio:g} times its size "
                f"(limits.max_compression_ratio): no text is packed so well"
            )


def split_lines(chunks: Iterator[bytes], where: str, limits: ReadLimits) -> Iterator[bytes]:
    """Lines without their ends; the last one, which may be empty, has none.

    Raises:
        UserError: a line is too long. No more of it than that has been held.
    """
    pieces, size = list[bytes](), 0  # of a line that is longer than a chunk
    number = 1
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            if size + len(line) > limits.max_line_bytes:
                break  # with pieces and size as they are
            yield b"".join([*pieces, line]) if pieces else line
            pieces, size = [], 0
            number += 1
        else:
            pieces.append(rest)
            size += len(rest)
            if size <= limits.max_line_bytes:
                continue
        raise UserError(
            f"{where}: line {number} is longer than {limits.max_line_bytes:,} bytes (limits.max_line_bytes)"
        )
    yield b"".join(pieces)

"""Texts of any length in constant memory: read in blocks, cut where the tokenizer would cut anyway.

A byte-level BPE (GPT-NeoX's, or one trained here) splits text before it merges, and never joins a visible
character to white space after it. So a cut in front of white space that follows a visible character changes
no token. Among such places a single space between two visible characters is preferred: there, tokenizers that
put a prefix in front of a text also agree. Only a run without white space that is longer than
`max_run_characters` is cut elsewhere.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from new_llm.config import UserError
from new_llm.config.evaluation import FillConfig
from new_llm.data.local_files import READERS, find_reader, join_line_ends, read_file

PLAIN_EXTENSIONS = (".txt", ".raw", ".tokens")
"""One text, read in blocks; the other formats hold documents, read one by one."""

OnBytes = Callable[[int], None]


def check_text_files(paths: Iterable[Path]) -> None:
    """Refuse, before any is read, files that can't hold text.

    Raises:
        UserError: one is missing, no regular file, empty, or of an unknown format.
    """
    for path in paths:
        try:
            if not path.exists():
                raise UserError(f"{path}: no such file")
            if not path.is_file():
                raise UserError(f"{path}: no regular file")
            if find_reader(path) is None:
                raise UserError(f"{path}: unknown extension; known are {', '.join(READERS)}")
            if path.stat().st_size == 0:
                raise UserError(f"{path}: empty: there is no text in it")
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror or error}") from None


def is_plain(path: Path) -> bool:
    """Whether a file is one text, of which progress is known in bytes of the file."""
    return path.name.lower().endswith(PLAIN_EXTENSIONS)


def read_documents(path: Path, config: FillConfig, on_bytes: OnBytes) -> Iterator[Iterator[str]]:
    """Each document of a file as pieces that may be tokenised one by one; consume one before the next.

    Args:
        path: a text file in one of the known formats.
        config: sizes of what is held at once.
        on_bytes: told of the bytes read since the last call; of a plain text they are the file's.

    Raises:
        UserError: the file can't be read, is binary or not UTF-8, or holds no visible character.
    """
    limit = config.max_run_characters
    if is_plain(path):
        yield cut_at_white_space(_read_plain(path, config.block_bytes, on_bytes), limit)
        return
    found = False
    for _, text in read_file(path, config.text_field):
        found = True
        blocks = (text[i : i + config.block_bytes] for i in range(0, len(text), config.block_bytes))
        yield cut_at_white_space(blocks, limit)
        on_bytes(len(text.encode("utf-8")))
    if not found:
        raise UserError(f"{path}: holds no text, only white space")


def cut_at_white_space(blocks: Iterable[str], max_run_characters: int) -> Iterator[str]:
    """The same text in other pieces; all but the first begin with white space after a visible character.

    Args:
        blocks: a text, cut anywhere.
        max_run_characters: a longer run without such a place is cut at its end.
    """
    held = ""
    for block in blocks:
        held += block
        cut = find_cut(held) or (len(held) if len(held) > max_run_characters else 0)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def find_cut(text: str) -> int:
    """The last place where a text may be cut without changing tokens; 0: there is none."""
    for mark, is_single in ((" ", True), ("\n", False), (" ", False), ("\t", False)):
        at = len(text)
        while (at := text.rfind(mark, 1, at)) > 0:
            ends = at + 1 == len(text)
            if not text[at - 1].isspace() and not (is_single and (ends or text[at + 1].isspace())):
                return at
    return 0


def _read_plain(path: Path, block_bytes: int, on_bytes: OnBytes) -> Iterator[str]:
    """UTF-8 text in blocks, without a byte order mark, with \\n for every line end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, held, has_begun, is_visible = 0, "", False, False
    try:
        with path.open("rb") as file:
            while True:
                raw = file.read(block_bytes)
                if (at := raw.find(b"\0")) >= 0:
                    raise UserError(f"{path}: binary (a NUL at byte {offset + at}); UTF-8 text is expected")
                pending = len(decoder.getstate()[0])
                try:
                    text = held + decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as error:
                    at = offset - pending + error.start
                    byte = error.object[error.start]
                    raise UserError(f"{path}: not UTF-8 text: 0x{byte:02x} at byte {at}") from None
                held = "\r" if raw and text.endswith("\r") else ""  # its \n may come with the next block
                text = join_line_ends(text.removesuffix(held))
                if text and not has_begun:
                    text, has_begun = text.removeprefix("\ufeff"), True
                is_visible = is_visible or not (not text or text.isspace())
                if text:
                    yield text
                if not raw:
                    break
                offset += len(raw)
                on_bytes(len(raw))
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror or error}") from None
    if not is_visible:
        raise UserError(f"{path}: holds no text, only white space")

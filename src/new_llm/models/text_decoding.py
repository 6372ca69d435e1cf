"""Tokens to text as they are made: whole characters only, and no part of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder returns for bytes that do not form a character, or not yet."""
MOST_REPLACEMENTS = 3
CONTEXT_TOKENS = 4
"""Earlier tokens that are decoded again with new ones: the bytes of one character, and joins across tokens."""
LONGEST_WINDOW = 32
"""Most tokens in the window while its end is not a whole character; a character has at most 4 bytes."""


class TextDecoder:
    """Decode one row token by token; the pieces joined are the text of all tokens.

    Bytes that do not form a character yet are held back until they do, or no longer can. Special tokens have no text.

    Args:
        tokenizer: the model's.
        context: the last tokens before the text, such as a prompt's: tokenizers that mark a word's beginning (as
            SentencePiece) leave out the space before a text's first word, but not between words.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(context)
        self.given = count_whole(tokenizer.decode(self.ids))  # characters of the window's text already returned

    def push(self, token: int) -> str:
        """Add a token and return the text that it completes, possibly none."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        whole = count_whole(text)
        piece = text[self.given : whole]
        self.given = max(self.given, whole)
        if len(self.ids) > (CONTEXT_TOKENS if whole == len(text) else LONGEST_WINDOW):
            # An incomplete character at the end lies within the kept tokens.
            self.ids = self.ids[-CONTEXT_TOKENS:]
            self.given = count_whole(self.tokenizer.decode(self.ids))
        return piece

    def finish(self) -> str:
        """Return what was held back, an incomplete character."""
        piece = self.tokenizer.decode(self.ids)[self.given :]
        self.ids, self.given = [], 0
        return piece


def count_whole(text: str) -> int:
    """Number of leading characters that later bytes can't change: all but the replacements at the end.

    A byte-level decoder shows an incomplete character as one replacement, a byte-fallback decoder as one for each
    of its up to three bytes.
    """
    end = text[-MOST_REPLACEMENTS:]
    return len(text) - (len(end) - len(end.rstrip(REPLACEMENT)))


class StoppingText:
    """The text of one row up to its first stop string, which may span tokens.

    Args:
        tokenizer: the model's.
        stop_strings: none of them empty.
        context: as of `TextDecoder`.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self.decoder = TextDecoder(tokenizer, context)
        self.stop_strings = stop_strings
        self.held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that can be shown; sets `is_stopped` when a stop string is complete."""
        return self._cut(self.decoder.push(token))

    def finish(self) -> str:
        """Return the rest of a row that ended for another reason."""
        piece = "" if self.is_stopped else self._cut(self.decoder.finish())
        held, self.held = self.held, ""
        return piece + held

    def _cut(self, piece: str) -> str:
        text = self.held + piece
        found = [place for place in map(text.find, self.stop_strings) if place >= 0]
        if found:
            self.is_stopped, self.held = True, ""
            return text[: min(found)]
        kept = self._count_begun(text)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _count_begun(self, text: str) -> int:
        """Number of characters at the end that may start a stop string."""
        longest = max(map(len, self.stop_strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop_strings):
                return length
        return 0

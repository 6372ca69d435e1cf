"""Where a document's tokens are cut for scoring: pure functions of lengths."""

from itertools import pairwise
from typing import NamedTuple


class Window(NamedTuple):
    """One reading of part of a document: tokens [begin, end − 1) are read, [first_scored, end) predicted.

    Attributes:
        begin: index in the document of the first token that is read.
        end: one past the last token that is scored; that token is predicted, never read.
        first_scored: index in the document of the first token that is scored here; the ones before it are
            context.
    """

    begin: int
    end: int
    first_scored: int


def plan_windows(length: int, context: int, stride: int) -> list[Window]:
    """Sliding windows that score every token but the document's first exactly once.

    Window i spans the `context` tokens from i · stride on and scores those of them that no earlier window
    scored, so that each token is scored in the first window that reaches it. Every scored token has at least
    context − stride tokens before it in its window, or all that the document has. These are the windows of
    Hugging Face's guide "Perplexity of fixed-length models"; there, windows that do not overlap (stride =
    context) lose their first tokens. Here they do not: such windows also span the token after them, so that
    the model still reads at most `context` tokens and nothing goes unscored.

    Args:
        length: tokens in the document.
        context: tokens that a window spans, and that the model reads at most.
        stride: tokens from one window's begin to the next one's.

    Returns:
        The windows in order; none for a document of fewer than two tokens.

    Raises:
        ValueError: not 1 ≤ stride ≤ context.
    """
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride {stride}, context {context}: 1 ≤ stride ≤ context is needed, or tokens would be skipped"
        )
    span = context if stride < context else context + 1
    windows: list[Window] = []
    first_scored = 1
    for begin in range(0, length, stride):
        end = min(begin + span, length)
        if first_scored < end:
            windows.append(Window(begin, end, first_scored))
            first_scored = end
        if end == length:
            break
    return windows


def plan_rolling_windows(length: int, context: int) -> list[Window]:
    """The windows of lm-evaluation-harness's rolling log-likelihood: every token but the first, exactly once.

    Windows score `context` tokens each and span one more, the token before them. The last window reaches back so that
    it spans as many, too, and scores only what is left.

    Args:
        length: tokens in the document, the prefix token that the first window begins with among them.
        context: tokens that the model reads at most.

    Returns:
        The windows in order; none for a document of fewer than two tokens.

    Raises:
        ValueError: the context is not positive.
    """
    if context < 1:
        raise ValueError(f"context: {context} is not positive")
    ends = [*range(context + 1, length, context), length] if length > 1 else []
    return [Window(max(0, end - context - 1), end, max(1, begin)) for begin, end in pairwise([0, *ends])]


def plan_segments(length: int, piece_tokens: int) -> list[Window]:
    """Consecutive pieces that score every token but the document's first exactly once.

    The last position of a piece predicts the first token of the next one, so a cut loses no target.

    Args:
        length: tokens in the document.
        piece_tokens: tokens that the model reads in one piece.

    Returns:
        The pieces in order; the last one may be shorter. None for a document of fewer than two tokens.
    """
    return plan_windows(length, context=piece_tokens, stride=piece_tokens)

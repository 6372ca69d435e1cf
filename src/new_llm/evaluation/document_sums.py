"""Losses of documents, summed by the distance from their start."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LongDocument:
    """A document that is measured: its index in the split, and the tokens of it that are read."""

    index: int
    tokens: NDArray[np.unsignedinteger]


class DocumentSums:
    """Total loss and scored tokens of each document in each range of distance.

    Args:
        num_documents: documents D.
        edges: where the E ranges begin; the last one is open.

    Raises:
        ValueError: the edges do not rise from 0.
    """

    def __init__(self, num_documents: int, edges: Sequence[int]) -> None:
        if not edges or edges[0] != 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"edges: {list(edges)} must begin with 0 and rise")
        self.edges = np.array(edges, dtype=np.int64)
        self.total_nll = np.zeros((num_documents, len(edges)))
        """Nats, [D, E]."""
        self.counts = np.zeros((num_documents, len(edges)), dtype=np.int64)
        """Tokens, [D, E]."""

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return int(self.counts.sum())

    def add(self, document: int, first: int, losses: NDArray[np.floating]) -> None:
        """Count the losses of consecutive tokens of a document; `first` is the index in it of the first one."""
        distances = np.arange(first, first + len(losses))
        ranges = np.searchsorted(self.edges, distances, side="right") - 1
        size = len(self.edges)
        self.total_nll[document] += np.bincount(ranges, losses, size)
        self.counts[document] += np.bincount(ranges, minlength=size)

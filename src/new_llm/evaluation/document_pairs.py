"""Reading long documents in pairs that lend each other their memory.

A row of the batch keeps the memory of one document. Before the row reads its next segment, its partner's segment of the
same number is scored in it without being written: so the partner's tokens meet this document's memory, and no memory
has to be moved from row to row.
"""

import contextlib
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from new_llm.evaluation.scoring import Scorer, Scores, evaluation_mode, join_rows
from new_llm.models.loss import IGNORE_INDEX


class Piece(NamedTuple):
    """Consecutive tokens of a document that one call reads.

    Attributes:
        document: its index in the list of documents.
        first: index in the document of the first token that is predicted.
        inputs: the tokens that are read.
        targets: the token after each of them, if it is to be scored; at the document's end one fewer.
    """

    document: int
    first: int
    inputs: NDArray[Any]
    targets: NDArray[Any]


@dataclass
class Pair:
    """Two documents, or one, that are read side by side, a row of the batch each.

    Attributes:
        members: their indices.
        num_scored: of them, the first so many are scored; another one is only read.
        begin: index of the token that they have come to.
    """

    members: tuple[int, ...]
    num_scored: int
    begin: int = 0


@dataclass
class PairScores:
    """What `score_pairs` found: the scores of each call by how the memory was, and whose memory each document borrowed.

    Attributes:
        carried: each document read as a stream.
        reset: each segment read from an empty memory.
        foreign: each segment read with what the partner's stream holds after as many segments; empty for one
            document alone.
        lenders: for each document the one whose memory it borrows.
    """

    carried: list[Scores] = field(default_factory=list)
    reset: list[Scores] = field(default_factory=list)
    foreign: list[Scores] = field(default_factory=list)
    lenders: dict[int, int] = field(default_factory=dict)


def plan_pairs(lengths: Sequence[int]) -> list[Pair]:
    """Pair documents of like length, longest first, so that each lends the other its memory.

    Of an odd number the shortest is left over: it borrows from the second shortest, which is read once more for that.
    One document alone stays alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    pairs = [Pair(members, 2) for members in zip(order[::2], order[1::2], strict=False)]
    if len(order) % 2:
        pairs.append(Pair((order[-1], *order[-2:-1]), 1))
    return pairs


def score_pairs(scorer: Scorer) -> PairScores:
    """Score documents segment by segment, with the memory carried, empty, and that of another document."""
    pairs = plan_pairs([len(tokens) for tokens in scorer.documents])
    width = len(pairs[0].members)
    found = PairScores()
    with contextlib.closing(_cut_pairs(scorer, pairs, width)) as calls:
        for pieces in calls:
            if width == 2:
                swapped = [piece for a, b in zip(pieces[::2], pieces[1::2], strict=True) for piece in (b, a)]
                found.foreign.append(_score(scorer, swapped))
            with scorer.model.fresh_memory():
                scored = [piece for piece in pieces if piece is not None and len(piece.targets)]
                found.reset.append(_score(scorer, scored))
            found.carried.append(_score(scorer, pieces, update_memory=True))
            if scorer.note(found.carried[-1]):
                break
    for pair in pairs:
        for member, lender in zip(pair.members[: pair.num_scored], reversed(pair.members), strict=False):
            if member != lender:
                found.lenders[member] = lender
    return found


def _cut_pairs(scorer: Scorer, pairs: list[Pair], width: int) -> Generator[list[Piece | None]]:
    """Advance as many pairs as fit a batch by a segment at a time, with a memory for each row, empty at first.

    A pair whose scored documents have ended is replaced by the next unread one. None stands for a row that has
    nothing to read.
    """
    unread = deque(pairs)
    opened: list[Pair | None] = [None] * min(max(1, scorer.batch_size // width), len(unread))
    length = scorer.model.segment_length
    with evaluation_mode(scorer.model, scorer.autocast), scorer.model.fresh_memory(batch_size=len(opened) * width):
        while True:
            begins = [pair is None or _has_ended(scorer, pair) for pair in opened]
            opened = [
                (unread.popleft() if unread else None) if begin else pair
                for begin, pair in zip(begins, opened, strict=True)
            ]
            if not any(opened):
                return
            scorer.model.reset_rows(torch.tensor(begins, device=scorer.device).repeat_interleave(width))
            yield [piece for pair in opened for piece in _cut(scorer, pair, width, length)]
            for pair in opened:
                if pair is not None:
                    pair.begin += length


def _has_ended(scorer: Scorer, pair: Pair) -> bool:
    return all(pair.begin + 1 >= len(scorer.documents[member]) for member in pair.members[: pair.num_scored])


def _cut(scorer: Scorer, pair: Pair | None, width: int, length: int) -> list[Piece | None]:
    if pair is None:
        return [None] * width
    pieces: list[Piece | None] = []
    for place, member in enumerate(pair.members):
        tokens, end = scorer.documents[member], pair.begin + length
        inputs, targets = tokens[pair.begin : end], tokens[pair.begin + 1 : end + 1]
        if place >= pair.num_scored:
            targets = targets[:0]
        pieces.append(Piece(member, pair.begin + 1, inputs, targets) if len(inputs) else None)
    return pieces + [None] * (width - len(pieces))


def _score(scorer: Scorer, pieces: Sequence[Piece | None], *, update_memory: bool = False) -> Scores:
    """Read one batch; a row that has nothing to read leaves its memory as it is."""
    lengths = [0 if piece is None else len(piece.inputs) for piece in pieces]
    width = max(lengths)
    input_ids = torch.zeros(len(pieces), width, dtype=torch.int64)
    labels = torch.full((len(pieces), width + 1), IGNORE_INDEX, dtype=torch.int64)
    for row, piece in enumerate(pieces):
        if piece is not None:
            input_ids[row, : len(piece.inputs)] = torch.from_numpy(piece.inputs.astype(np.int64))
            labels[row, 1 : 1 + len(piece.targets)] = torch.from_numpy(piece.targets.astype(np.int64))
    device, mask = scorer.device, None
    if min(lengths) < width:
        mask = (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).to(device)
    losses = scorer.model.token_losses(input_ids.to(device), labels.to(device), mask, update_memory=update_memory)
    found = losses.cpu().double().numpy()
    return join_rows(
        (piece.document, piece.first, found[row, : len(piece.targets)])
        for row, piece in enumerate(pieces)
        if piece is not None
    )

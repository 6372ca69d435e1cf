"""Reading long documents: in pairs that lend each other their memory, as plain streams, or in windows."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from new_llm.evaluation.document_sums import DocumentSums, LongDocument
from new_llm.evaluation.scoring import Autocast, LanguageModel, cut_row, evaluation_mode, score_rows
from new_llm.evaluation.windows import plan_windows
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
    inputs: NDArray[np.integer]
    targets: NDArray[np.integer]


@dataclass
class Slot:
    """Documents that are read side by side, a row of the batch each.

    Attributes:
        members: their indices.
        num_scored: the first so many are scored, the others only read.
        begin: index of the token that they have come to.
    """

    members: tuple[int, ...]
    num_scored: int
    begin: int = 0


def plan_pairs(lengths: Sequence[int]) -> list[Slot]:
    """Pair documents of like length, longest first, so that each lends the other its memory.

    Of an odd number the shortest stays over: it borrows from the second shortest, which is read once more for that.
    One document alone stays alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    pairs = [Slot(members, 2) for members in zip(order[::2], order[1::2], strict=False)]
    if len(order) % 2:
        pairs.append(Slot((order[-1], *order[-2:-1]), 1))
    return pairs


@dataclass(frozen=True)
class DocumentReader:
    """A model and the documents that it scores.

    Attributes:
        model: read in evaluation mode; its held memory is neither read nor changed.
        documents: of at least two tokens each.
        batch_size: rows of a batch.
        device: where the model lies.
        autocast: makes the context in which it computes.
        note: called after each batch; True: stop.
    """

    model: LanguageModel
    documents: Sequence[LongDocument]
    batch_size: int
    device: torch.device
    autocast: Autocast
    note: Callable[[], bool]

    def read_pairs(self, carried: DocumentSums, reset: DocumentSums, foreign: DocumentSums | None) -> dict[int, int]:
        """Score documents segment by segment, with the memory carried, empty, and that of another document.

        A row keeps the memory of one document. Before the row reads its next segment, the partner's segment of the
        same number is scored in it without being written: so the partner's tokens meet this document's memory, and
        no memory has to be moved from row to row.

        Args:
            carried: where the losses are counted.
            reset: likewise.
            foreign: likewise; None: there is one document alone.

        Returns:
            For each document the one whose memory it borrows.
        """
        pairs = plan_pairs([len(document.tokens) for document in self.documents])
        for pieces in self._cut_slots(pairs, len(pairs[0].members), self.model.segment_length):
            if foreign is not None:
                swapped = [piece for a, b in zip(pieces[::2], pieces[1::2], strict=True) for piece in (b, a)]
                self._score(swapped, foreign)
            with self.model.fresh_memory():
                self._score([piece for piece in pieces if piece is not None and len(piece.targets)], reset)
            self._score(pieces, carried, update_memory=True)
        return {
            member: lender
            for pair in pairs
            for member, lender in zip(pair.members[: pair.num_scored], reversed(pair.members), strict=False)
            if member != lender
        }

    def read_streams(self, sums: DocumentSums, segments_per_call: int) -> None:
        """Score documents in consecutive segments, the memory carried."""
        order = sorted(range(len(self.documents)), key=lambda index: -len(self.documents[index].tokens))
        slots = [Slot((index,), 1) for index in order]
        for pieces in self._cut_slots(slots, 1, segments_per_call * self.model.segment_length):
            self._score(pieces, sums, update_memory=True)

    def read_windows(self, sums: DocumentSums, stride: int) -> None:
        """Score documents in sliding windows as long as the model's segment, each from an empty memory.

        Raises:
            ValueError: not 1 ≤ stride ≤ the segment.
        """
        windows = (
            (index, window)
            for index, document in enumerate(self.documents)
            for window in plan_windows(len(document.tokens), self.model.segment_length, stride)
        )
        with evaluation_mode(self.model, self.autocast), self.model.fresh_memory():
            while batch := list(islice(windows, self.batch_size)):
                rows = [cut_row(self.documents[index].tokens, window) for index, window in batch]
                for (index, window), losses in zip(batch, score_rows(self.model, rows, self.device), strict=True):
                    sums.add(index, window.first_scored, losses)
                if self.note():
                    return

    def _cut_slots(self, slots: list[Slot], width: int, num_tokens: int) -> Iterator[list[Piece | None]]:
        """Advance as many slots as fit a batch by a piece at a time, with a memory for each row, empty at first.

        A slot whose scored documents have ended is taken over by the next unread one. None stands for a row that has
        nothing to read.
        """
        unread = deque(slots)
        opened: list[Slot | None] = [None] * min(max(1, self.batch_size // width), len(unread))
        with evaluation_mode(self.model, self.autocast), self.model.fresh_memory(batch_size=len(opened) * width):
            while True:
                begins = [slot is None or self._has_ended(slot) for slot in opened]
                opened = [
                    (unread.popleft() if unread else None) if begin else slot
                    for begin, slot in zip(begins, opened, strict=True)
                ]
                if not any(opened):
                    return
                self.model.reset_rows(torch.tensor(begins, device=self.device).repeat_interleave(width))
                yield [piece for slot in opened for piece in self._cut(slot, width, num_tokens)]
                for slot in opened:
                    if slot is not None:
                        slot.begin += num_tokens
                if self.note():
                    return

    def _has_ended(self, slot: Slot) -> bool:
        scored = slot.members[: slot.num_scored]
        return all(slot.begin + 1 >= len(self.documents[member].tokens) for member in scored)

    def _cut(self, slot: Slot | None, width: int, num_tokens: int) -> list[Piece | None]:
        if slot is None:
            return [None] * width
        pieces: list[Piece | None] = []
        for place, member in enumerate(slot.members):
            tokens, end = self.documents[member].tokens, slot.begin + num_tokens
            inputs, targets = tokens[slot.begin : end], tokens[slot.begin + 1 : end + 1]
            if place >= slot.num_scored:
                targets = targets[:0]
            pieces.append(Piece(member, slot.begin + 1, inputs, targets) if len(inputs) else None)
        return pieces + [None] * (width - len(pieces))

    def _score(self, pieces: Sequence[Piece | None], sums: DocumentSums, *, update_memory: bool = False) -> None:
        """Read one batch; a row that has nothing to read leaves its memory as it is."""
        lengths = [0 if piece is None else len(piece.inputs) for piece in pieces]
        width = max(lengths)
        input_ids = torch.zeros(len(pieces), width, dtype=torch.int64)
        labels = torch.full((len(pieces), width + 1), IGNORE_INDEX, dtype=torch.int64)
        for row, piece in enumerate(pieces):
            if piece is not None:
                input_ids[row, : len(piece.inputs)] = torch.from_numpy(piece.inputs.astype(np.int64))
                labels[row, 1 : 1 + len(piece.targets)] = torch.from_numpy(piece.targets.astype(np.int64))
        mask = None
        if min(lengths) < width:
            mask = (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).to(self.device)
        losses = self.model.token_losses(
            input_ids.to(self.device), labels.to(self.device), mask, update_memory=update_memory
        )
        found = losses.cpu().double().numpy()
        for row, piece in enumerate(pieces):
            if piece is not None and len(piece.targets):
                sums.add(piece.document, piece.first, found[row, : len(piece.targets)])

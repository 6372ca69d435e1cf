"""Documents on their way into a shard: tokenised in order, each with its split and its place in the source."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.data.encoding_pool import encode_in_parallel
from new_llm.data.planted_facts import FactPlanter
from new_llm.data.sources import Source
from new_llm.data.tokenizer import padded_vocab_size
from new_llm.data.tokens import Text, TokenizedDocument


class Place(NamedTuple):
    """How far a large source has been read: all that the next shard needs to know."""

    part: int = 0
    document: int = 0
    num_documents: int = 0
    num_characters: int = 0
    num_train: int = 0
    """Training documents so far, without those of the reversal sentences."""


class Tag(NamedTuple):
    """What goes with a document while it is tokenised."""

    split: str
    num_characters: int
    place: Place
    """After the document."""


def encode_tagged(
    items: Iterable[tuple[Tag, Text]], tokenizer: Tokenizer, config: DataConfig, seed: int, source: Source
) -> Generator[tuple[Tag, TokenizedDocument], None, None]:
    """Tokenise, check tokens that were read as such, and plant facts into training documents but the pinned.

    Raises:
        UserError: a document that is tokens holds one that the tokenizer does not know, or a worker was killed.
    """
    tags = deque[Tag]()

    def texts() -> Iterator[Text]:
        for tag, text in items:
            tags.append(tag)
            yield text

    planter = FactPlanter(tokenizer, config, seed) if config.planted_facts else None
    vocab_size = padded_vocab_size(tokenizer)
    for document in encode_in_parallel(texts(), tokenizer, config.num_workers):
        tag = tags.popleft()
        if source.holds_tokens and len(document.ids) and int(document.ids.max()) >= vocab_size:
            raise UserError(
                f"{source.name}: a document holds the token {int(document.ids.max())}, which the tokenizer of "
                f"{vocab_size:,} entries does not know: another one wrote these tokens"
            )
        is_pinned = not tag.place.num_train  # the reversal sentences come before the first document
        if planter and tag.split == "train" and not is_pinned:
            document = planter.plant(document, tag.place.num_train - 1)
        yield tag, document

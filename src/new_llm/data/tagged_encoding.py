"""Documents on their way into a shard: tokenised in order, each with its split and its place in the source."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.data.encoding_pool import encode_in_parallel
from new_llm.data.sources import Source
from new_llm.data.tokenizer import padded_vocab_size
from new_llm.data.tokens import Text, TokenizedDocument


class Place(NamedTuple):
    """How far a large source has been read: all that the next shard needs to know."""

    part: int = 0
    document: int = 0
    num_documents: int = 0
    num_characters: int = 0


class Tag(NamedTuple):
    """What goes with a document while it is tokenised."""

    split: str
    num_characters: int
    place: Place
    """After the document."""


def encode_tagged(
    items: Iterable[tuple[Tag, Text]], tokenizer: Tokenizer, config: DataConfig, source: Source
) -> Generator[tuple[Tag, TokenizedDocument], None, None]:
    """Tokenise, and check tokens that were read as such.

    Raises:
        UserError: a document that is tokens holds one that the tokenizer does not know, or a worker was killed.
    """
    tags = deque[Tag]()

    def texts() -> Iterator[Text]:
        for tag, text in items:
            tags.append(tag)
            yield text

    vocab_size = padded_vocab_size(tokenizer)
    for document in encode_in_parallel(texts(), tokenizer, config.num_workers):
        tag = tags.popleft()
        if source.holds_tokens and len(document.ids) and int(document.ids.max()) >= vocab_size:
            raise UserError(
                f"{source.name}: a document holds the token {int(document.ids.max())}, which the tokenizer of "
                f"{vocab_size:,} entries does not know: another one wrote these tokens"
            )
        yield tag, document

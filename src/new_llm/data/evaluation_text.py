"""The text of a measurement: read with the model's own tokenizer, and described."""

import hashlib
from itertools import islice
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from new_llm.config import DataConfig, UserError
from new_llm.config.measurement import TextConfig
from new_llm.data.sources import open_source
from new_llm.data.tokens import TokenSplit, tokenize_documents


class EvaluationText(NamedTuple):
    """Documents to measure on, and where they come from.

    Attributes:
        split: the documents' tokens.
        info: plain values for the record: source, fingerprints, counts.
    """

    split: TokenSplit
    info: dict[str, Any]


def read_evaluation_text(config: TextConfig, tokenizer: Tokenizer) -> EvaluationText:
    """Read and tokenise the configured source, whole documents in its own order.

    Raises:
        UserError: no source is named, it can't be read, or it holds no text.
    """
    if config.source is None:
        raise UserError("data.source: a text is needed: a file, a folder, wikitext-2, pile or sotu")
    source = open_source(
        DataConfig(source=config.source, text_field=config.text_field),
        whole_files=config.whole_files,
        wikitext_split=config.split,
    )
    texts = (text for _, text in islice(source.read(), config.max_documents))
    split = tokenize_documents(texts, tokenizer)
    if not split.num_documents:
        raise UserError(f"{source.name}: holds no document")
    return EvaluationText(split, {"source": source.name, "source_fingerprint": source.fingerprint} | count_text(split))


def count_text(split: TokenSplit) -> dict[str, Any]:
    """The size of a split and the fingerprint of its tokens, as plain values."""
    return {
        "num_documents": split.num_documents,
        "num_tokens": split.num_tokens,
        "num_bytes": int(split.num_bytes.sum()),
        "num_words": int(split.num_words.sum()),
        "tokens_fingerprint": hashlib.sha256(split.tokens.astype("<u4").tobytes()).hexdigest(),
    }

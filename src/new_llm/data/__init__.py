"""Data: sources of documents, tokenizers, token caches, splits and batches."""

from new_llm.data.sources import register_source
from new_llm.data.tokenizer import get_tokenizer

__all__ = ["get_tokenizer", "register_source"]

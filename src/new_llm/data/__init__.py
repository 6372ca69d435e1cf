"""Data: sources of documents, tokenizers, token caches, splits and batches."""

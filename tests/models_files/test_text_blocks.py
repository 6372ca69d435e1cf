"""Text read in blocks is the same text, and its pieces give the same tokens."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from new_llm.config.evaluation import FillConfig
from new_llm.experiments.memory_filling import cut_at_white_space, read_documents

SNIPPETS = (
    "The memory of the world, ",
    "don't they're I'll ",
    "12 1234 3.14 ",
    "\n\n",
    "\n    return x\n\t\tif y:\n",
    "  two  spaces   three   ",
    "naïve café — “quoted” ",
    "日本語の文章。",
    "　全角の空白　",
    "🙂👍🏽 ",
    "e\u0301a\u0308 ",
    "\r\n",
    "\u00a0no-break\u2003em\u2028line ",
    "<|endoftext|>",
    "x" * 50,
    "(a)[b]{c};",
)


def assert_same_tokens(tokenizer: Tokenizer, text: str, block: int, limit: int = 10_000) -> None:
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    pieces = list(cut_at_white_space(blocks, limit))
    assert "".join(pieces) == text
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(SNIPPETS), max_size=30), block=st.integers(1, 60))
def test_cutting_changes_no_tokens(parts, block, tokenizer):
    assert_same_tokens(tokenizer, "".join(parts), block)


@pytest.mark.parametrize("block", [64, 1000, 4096])
def test_cutting_real_text_changes_no_tokens(block, speeches, tokenizer):
    assert_same_tokens(tokenizer, speeches[1][:30_000], block)


def test_cutting_changes_no_tokens_of_gpt_neox(shared_data, speeches):
    neox = Tokenizer.from_file(str(shared_data / "tokenizer" / "20B_tokenizer.json"))
    for block in (1, 7, 100):
        assert_same_tokens(neox, "".join(SNIPPETS * 3), block)
        assert_same_tokens(neox, speeches[0][:8000], block)
    book = (shared_data / "books" / "middlemarch_145.txt").read_text(encoding="utf-8")
    assert_same_tokens(neox, book[:400_000], 5000)


def test_a_run_without_white_space_is_bounded():
    pieces = list(cut_at_white_space(["x" * 10] * 10, 25))
    assert "".join(pieces) == "x" * 100
    assert max(map(len, pieces)) == 30


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=30), block=st.integers(1, 40))
def test_files_are_read_as_they_are(parts, block, tmp_path):
    text = "begin" + "".join(parts)
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    told: list[int] = []
    (document,) = read_documents(path, FillConfig(block_bytes=block), told.append)
    assert "".join(document) == text.replace("\r\n", "\n")
    assert sum(told) == path.stat().st_size

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from new_llm.config import DataConfig, UserError
from new_llm.config.limits import ReadLimits
from new_llm.data.sources import load_documents

LINE = json.dumps({"text": "word " * 500}).encode() + b"\n"


def pack(raw: bytes, window_log: int = 20) -> bytes:
    settings = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=0)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return stream.compress(raw) + stream.flush()


def write_parquet(path, texts) -> None:
    pq.write_table(pa.table({"text": texts}), path)


CASES = {
    "max_line_bytes, .jsonl": ("a.jsonl", LINE * 3, {"max_line_bytes": 2000}, "line 1 is longer than 2,000 bytes"),
    "max_line_bytes, .zst": ("a.jsonl.zst", pack(LINE), {"max_line_bytes": 2000}, "line 1 is longer than 2,000 bytes"),
    "max_line_bytes, .tokens": ("a.tokens", b"x" * 3000, {"max_line_bytes": 2000}, "line 1 is longer than 2,000"),
    "max_line_bytes, .parquet": ("a.parquet", ["a", "x" * 3000], {"max_line_bytes": 2000}, "row 2 holds 3,000 bytes"),
    "max_text_bytes, .txt": (
        "a.txt",
        b"x" * 3000,
        {"max_text_bytes": 2000},
        "one document of 3,000 bytes; at most",
    ),
    "max_text_bytes, .raw": ("a.raw", b"some words\n" * 300, {"max_text_bytes": 2000}, "an article of more than 2,000"),
    "max_zstd_window_bytes": ("a.jsonl.zst", pack(LINE, 24), {"max_zstd_window_bytes": 1 << 20}, "corrupt or no zstd"),
    "max_compression_ratio, .zst": (
        "a.jsonl.zst",
        pack(LINE * 20_000),
        {"max_compression_ratio": 2},
        "unpacks to more than 2 times its size",
    ),
    "max_compression_ratio, .parquet": (
        "a.parquet",
        ["word " * 5000] * 2000,
        {"max_compression_ratio": 2},
        "unpacks to more than 2 times its size",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_limit_is_a_field_and_the_line_names_it(tmp_path, name):
    file, content, limits, message = CASES[name]
    path = tmp_path / file
    if isinstance(content, list):
        write_parquet(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(load_documents(DataConfig(source=str(path), limits=ReadLimits(**limits))))
    assert f"limits.{next(iter(limits))}" in str(caught.value)
    if "ratio" not in name:  # these are bombs
        assert list(load_documents(DataConfig(source=str(path)))), "the defaults take it"


def test_limits_are_of_the_line_and_not_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE * 1000)
    config = DataConfig(source=str(tmp_path / "a.jsonl"), limits=ReadLimits(max_line_bytes=len(LINE) - 1))
    assert len(list(load_documents(config))) == 1000
    (tmp_path / "a.raw").write_bytes(b" \n = Title = \n \n some words \n" * 1000)
    config = DataConfig(source=str(tmp_path / "a.raw"), limits=ReadLimits(max_text_bytes=1024))
    assert len(list(load_documents(config))) == 1000

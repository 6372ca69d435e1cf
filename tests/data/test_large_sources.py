import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import prepare_command, read_cache, write_corpus

from new_llm.config import DataConfig, UserError
from new_llm.data import builder
from new_llm.data.batches import plan_batches
from new_llm.data.dataset import PreparedData, prepare_data
from new_llm.data.sealed import read_sealed
from new_llm.data.sharded_tokens import ShardedTokens
from new_llm.data.tokenizer import train_tokenizer
from new_llm.data.tokens import TokenSplit

SPEECH_CHARACTERS = 1500
CORPUS_BYTES = 1_200_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_corpus(file, CORPUS_BYTES, max_characters=SPEECH_CHARACTERS)
    return file


@pytest.fixture
def config(corpus, tmp_path) -> DataConfig:
    """A source that counts as large, and gives about ten shards."""
    return DataConfig(
        source=str(corpus),
        tokenizer_vocab_size=400,
        seq_length=32,
        segments_per_sample=4,
        num_samples=None,
        cache_dir=tmp_path / "cache",
        max_spool_characters=100_000,
        shard_characters=120_000,
    )


def find_folder(config: DataConfig) -> Path:
    assert config.cache_dir
    (folder,) = (path for path in config.cache_dir.iterdir() if path.is_dir())
    return folder


def list_documents(split: TokenSplit) -> list[tuple[int, ...]]:
    return [tuple(split.document(i).tolist()) for i in range(split.num_documents)]


def test_a_large_source_gives_many_shards_that_read_like_one(config):
    data = prepare_data(config, 0)
    assert len(list(find_folder(config).glob("*.train.tokens"))) > 5
    texts = [json.loads(line)["text"] for line in Path(config.source).read_text().splitlines()]
    train, validation = (list_documents(split) for split in (data.train, data.validation))
    pinned = data.train.num_pinned_documents
    decoded = [data.tokenizer.decode(list(document)) for document in train[pinned:] + validation]
    assert sorted(decoded) == sorted(texts), "every document, the repeated ones too, in one of the splits"
    assert not set(train) & set(validation), "a repeated text is in one split only"
    assert 0.02 < len(validation) / len(texts) < 0.25
    assert data.train.num_bytes[pinned:].sum() + data.validation.num_bytes.sum() == sum(len(t.encode()) for t in texts)
    assert any("is large: its documents were split by their hash" in note for note in data.info["notes"])
    assert data.info["train"]["num_tokens"] == data.train.num_tokens == len(data.train.tokens)


def test_sharded_tokens_are_an_array(config):
    split = prepare_data(config, 0).train
    tokens = split.tokens
    assert isinstance(tokens, ShardedTokens)
    whole = np.asarray(tokens)
    plain = TokenSplit(whole, split.offsets, split.num_bytes, split.num_words, split.num_pinned_documents)
    assert (tokens.dtype, tokens.shape, tokens.size, tokens.ndim) == (whole.dtype, whole.shape, whole.size, 1)
    generator = np.random.default_rng(0)
    places = generator.integers(-len(whole), len(whole), (7, 33))
    assert np.array_equal(tokens[places], whole[places])
    assert tokens[-1] == whole[-1]
    for _ in range(50):
        start, stop = generator.integers(0, len(whole), 2)
        assert np.array_equal(tokens[start:stop], whole[start:stop])
    assert np.array_equal(tokens[5:-5:1000], whole[5:-5:1000])
    assert np.array_equal(np.take(tokens, [len(whole), -3], mode="wrap"), np.take(whole, [0, -3]))
    for bad in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError):
            tokens[bad]
    options = {"seq_length": 32, "batch_size": 5, "order": "stream", "seed": 1, "epoch": 0}
    for a, b in zip(plan_batches(split, **options), plan_batches(plain, **options), strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert a.labels.equal(b.labels)


def test_neither_shards_nor_workers_change_the_tokens(config, tmp_path):
    first = prepare_data(config, 0)
    others = (
        replace(config, shard_characters=50_000, cache_dir=tmp_path / "small"),
        replace(config, num_workers=2, cache_dir=tmp_path / "workers"),
    )
    for other in (prepare_data(options, 0) for options in others):
        for split, expected in ((other.train, first.train), (other.validation, first.validation)):
            assert np.array_equal(np.asarray(split.tokens), np.asarray(expected.tokens))
            assert np.array_equal(split.offsets, expected.offsets)
            assert np.array_equal(split.num_words, expected.num_words)
    names = {path.name for path in find_folder(config).iterdir()}
    again = {path.name for path in find_folder(others[1]).iterdir()}
    assert names == again
    assert read_cache(find_folder(config)) == read_cache(find_folder(others[1]))


@pytest.mark.parametrize("extension", [".jsonl.zst", ".parquet", "folder"])
def test_a_packed_source_and_a_folder_resume_like_a_plain_file(config, tmp_path, extension, monkeypatch):
    texts = [json.loads(line)["text"] for line in Path(config.source).read_text().splitlines()]
    if extension == "folder":
        source = tmp_path / "folder"
        source.mkdir()
        for i in range(3):
            lines = [json.dumps({"text": text}) for text in texts[i::3]]
            (source / f"{i}.jsonl").write_text("\n".join([*lines, "", ""]))
    elif extension == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = tmp_path / "corpus.parquet"
        pq.write_table(pa.table({"text": texts}), source, row_group_size=100)
    else:
        source = tmp_path / f"corpus{extension}"
        write_corpus(source, CORPUS_BYTES, max_characters=SPEECH_CHARACTERS)
    options = replace(config, source=str(source))
    expected = interrupt_and_resume(options, monkeypatch, at=5)
    whole = prepare_data(replace(options, cache_dir=tmp_path / "other"), 0)
    assert read_cache(find_folder(options)) == read_cache(find_folder(replace(options, cache_dir=tmp_path / "other")))
    assert whole.info == expected.info


def interrupt_and_resume(config: DataConfig, monkeypatch, at: int) -> PreparedData:
    """Prepare data with an interrupt once `at` shards are written, and again without it."""
    folder = interrupt(config, monkeypatch, at)
    records = sorted(path.name for path in folder.glob("0*.json"))
    assert len(records) == at, "what was done stays"
    times = {name: (folder / name).stat().st_mtime_ns for name in records}
    data = prepare_data(config, 0)
    assert {name: (folder / name).stat().st_mtime_ns for name in records} == times, "and is not done again"
    return data


def interrupt(config: DataConfig, monkeypatch, at: int) -> Path:
    """The folder of a pass that was interrupted once `at` shards were written."""
    close = builder.ShardWriter.close
    closed = 0

    def count(writer, record):
        nonlocal closed
        if closed == at:
            raise KeyboardInterrupt
        closed += 1
        return close(writer, record)

    with monkeypatch.context() as patch:
        patch.setattr(builder.ShardWriter, "close", count)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(config, 0)
    return find_folder(config)


@pytest.mark.parametrize("tear", ["cut", "flip", "remove", "record"])
@pytest.mark.parametrize("shard", ["00000", "00004", "last"])
def test_a_torn_shard_is_named_and_rebuilt_alone(config, tear, shard, capfd):
    first = prepare_data(config, 0)
    folder = find_folder(config)
    expected = read_cache(folder)
    shard = max(path.name[:5] for path in folder.glob("*.train.tokens")) if shard == "last" else shard
    file = folder / f"{shard}.train.tokens"
    raw = bytearray(file.read_bytes())
    if tear == "cut":
        file.write_bytes(raw[:-7])
    elif tear == "flip":
        raw[len(raw) // 2] ^= 4
        file.write_bytes(raw)
    else:
        file.unlink()
    if tear == "record":
        (folder / f"{shard}.json").write_text("{")
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*") if not path.name.startswith(shard)}
    capfd.readouterr()
    again = prepare_data(config, 0)
    assert f"{file}: {'missing' if tear in ('remove', 'record') else 'torn' if tear == 'cut' else 'damaged'}" in (
        capfd.readouterr().err
    )
    assert read_cache(folder) == expected
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times, "the others stay as they are"
    assert again.info == first.info


def test_a_large_cache_is_hashed_only_where_a_file_has_changed(config, monkeypatch, capfd):
    lazy = replace(config, verify_cache_bytes=0)
    prepare_data(lazy, 0)
    folder = find_folder(config)
    file = folder / "00003.train.tokens"
    raw, found = bytearray(file.read_bytes()), file.stat()
    raw[100] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    capfd.readouterr()
    prepare_data(lazy, 0)
    assert "damaged" not in capfd.readouterr().err, "size and time are as they were: not read"
    prepare_data(replace(config, verify_cache_bytes=None), 0)
    assert f"{file}: damaged" in capfd.readouterr().err, "asked for"
    (folder / "00002.validation.tokens").touch()
    prepare_data(lazy, 0)
    assert "damaged" not in capfd.readouterr().err, "read again, and good"
    file.write_bytes(raw)
    prepare_data(lazy, 0)
    assert f"{file}: damaged" in capfd.readouterr().err, "its time has changed"
    file.write_bytes(raw[:-1])
    prepare_data(lazy, 0)
    assert f"{file}: torn" in capfd.readouterr().err, "sizes are always compared"


def options_of(config: DataConfig, **changes: object) -> dict[str, object]:
    names = "source tokenizer_vocab_size seq_length num_samples cache_dir max_spool_characters shard_characters"
    return {name: getattr(config, name) for name in names.split()} | changes


def test_a_killed_pass_goes_on_and_equals_an_uninterrupted_one(config, tmp_path):
    other = replace(config, cache_dir=tmp_path / "other", num_workers=2)
    process = subprocess.Popen(prepare_command(**options_of(other, num_workers=2)), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("other/*/00002.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (find_folder(other) / "meta.json").exists(), "it was killed in the middle"
    prepare_data(replace(other, num_workers=1), 0)
    prepare_data(config, 0)
    assert read_cache(find_folder(other)) == read_cache(find_folder(config))


def test_workers_end_with_a_killed_parent(config, tmp_path):
    source = tmp_path / "corpus.jsonl"
    write_corpus(source, 14_000_000)  # several chunks, so that both have work
    command = prepare_command(**options_of(config, num_workers=2, source=source))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    children = list[int]()
    while len(children) < 3:  # two workers and the tracker of multiprocessing
        assert time.monotonic() < deadline
        assert process.poll() is None
        children = find_children(process.pid)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while (left := [child for child in children if is_running(child)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert not left, "a worker is left behind"


def find_children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_want_one_cache(config):
    command = prepare_command(**options_of(config))
    processes = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    infos = [json.loads(output) for output, _ in results]
    assert infos[0]["split_fingerprint"] == infos[1]["split_fingerprint"]
    waits = [errors.count("waiting for") for _, errors in results]
    assert sorted(waits) == [0, 1], "the second waits and says so"
    assert sorted("tokenising" in errors for _, errors in results) == [False, True], "and tokenises nothing"


def test_limits_hold_for_large_sources(config, tmp_path):
    few = replace(config, max_documents=300, cache_dir=tmp_path / "few")
    data = prepare_data(few, 0)
    pinned = data.train.num_pinned_documents
    assert data.train.num_documents - pinned + data.validation.num_documents == 300
    some = prepare_data(replace(config, num_samples=2000, cache_dir=tmp_path / "some"), 0)
    assert some.info["train"]["num_samples"] >= 2000
    assert any(note.startswith("read the first") for note in some.info["notes"])
    assert some.train.num_tokens < prepare_data(config, 0).train.num_tokens


def test_a_source_that_ends_with_an_error_keeps_its_shards(config, tmp_path, monkeypatch):
    monkeypatch.setattr("new_llm.data.tokens.CHUNK_CHARACTERS", 10_000)
    source = tmp_path / "broken.jsonl"
    source.write_bytes(Path(config.source).read_bytes() + b"no json")
    broken = replace(config, source=str(source))
    with pytest.raises(UserError, match="is no JSON object"):
        prepare_data(broken, 0)
    assert len(list(find_folder(broken).glob("0*.json"))) > 5


def test_what_a_killed_pass_left_half_written_is_removed(config, monkeypatch, tmp_path):
    folder = interrupt(config, monkeypatch, at=2)
    (folder / ".00099.train.tokens.tmp").write_bytes(b"half a shard")
    (folder / ".00099.json.abcd.tmp").mkdir()
    (folder / ".00099.json.abcd.tmp" / "00003.json").write_text("{")
    prepare_data(config, 0)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_pile_is_streamed_by_its_shards_and_resumes(config, tmp_path, monkeypatch):
    monkeypatch.setattr("new_llm.data.hub.hub_answers", lambda path, seconds: True)
    lines = Path(config.source).read_text().splitlines(keepends=True)
    pile = tmp_path / "pile"
    pile.mkdir()
    for shard in range(3):
        (pile / f"train-{shard:05d}.jsonl").write_text("".join(lines[shard::3]))
    tokenizer = train_tokenizer([json.loads(line)["text"] for line in lines[:20]], 400)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = replace(config, source="pile", pile_name=str(pile), tokenizer=str(tmp_path / "tokenizer.json"))
    resumed = interrupt_and_resume(options, monkeypatch, at=6)
    local = prepare_data(replace(options, source=str(pile), cache_dir=tmp_path / "local"), 0)
    for split in ("train", "validation"):
        found, expected = getattr(resumed, split), getattr(local, split)
        assert np.array_equal(np.asarray(found.tokens), np.asarray(expected.tokens))
        assert np.array_equal(found.offsets, expected.offsets)
    ends = [read_sealed(path)["end"][0] for path in sorted(find_folder(options).glob("0*.json"))]
    assert sorted(set(ends)) == [0, 1, 2], "places are told by the hub's shards"

import json
import os
import socket
import subprocess

import pytest
from corpora import prepare_command

from new_llm.config import DataConfig, UserError
from new_llm.data.dataset import prepare_data
from new_llm.data.sources import load_documents
from new_llm.data.tokenizer import train_tokenizer


@pytest.fixture
def closed_port():
    """The address of a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def empty_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in os.environ:
        if name.startswith(("HF_DATASETS_", "HF_HUB_", "TRANSFORMERS_")):
            monkeypatch.delenv(name)


def test_a_hub_that_accepts_and_never_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match="out of reach"):
            prepare_data(DataConfig(hub_timeout_seconds=0.3))


def test_cached_copies_are_read_without_a_hub(closed_port, tmp_path, speeches):
    from datasets import Dataset

    # What `datasets` and `huggingface_hub` leave behind after a download.
    prepared = tmp_path / "hf/datasets/monology___pile-uncopyrighted/default/0.0.0/abc"
    lines = [f" {line}\n" for i, text in enumerate(speeches) for line in ("", f"= Title {i} =", "", text)]
    article_lines = tmp_path / "hf/datasets/Salesforce___wikitext/wikitext-2-raw-v1/0.0.0/abc"
    for folder, texts in ((prepared, speeches), (article_lines, lines)):
        dataset = Dataset.from_dict({"text": texts})
        dataset.save_to_disk(folder)
        name = folder.parents[2].name.split("___")[1]
        arrow = next(folder.glob("data-*.arrow"))
        arrow.rename(folder / f"{name}-train.arrow")
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
        environment = os.environ | {"HF_ENDPOINT": closed_port}
        info = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        assert (info["tokenizer"]["name"], info["train"]["num_documents"]) == ("EleutherAI/pythia-70m", 11)
        assert info["notes"] == []


def test_records_are_streamed(tmp_path, speeches, monkeypatch):
    monkeypatch.setattr("new_llm.data.hub.hub_answers", lambda path, seconds: True)
    records = [json.dumps({"text": text, "meta": {"pile_set_name": "Pile-CC"}}) for text in speeches]
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    streamed = load_documents(DataConfig(pile_name=str(tmp_path), max_documents=5))
    assert [text for _, text in streamed] == speeches[:5]
    (tmp_path / "train.jsonl").write_text("no json")
    with pytest.raises(UserError, match="could not be loaded"):
        list(load_documents(DataConfig(pile_name=str(tmp_path))))

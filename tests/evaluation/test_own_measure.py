"""A measure in a module of one's own appears in results, on the console and in the report: 40 lines at most."""

import json
from pathlib import Path

import pytest
import torch

from new_llm.cli.main import main
from new_llm.config import EvalConfig, UserError
from new_llm.evaluation import find_measures

MODULE = '''
"""How surprised a model is by a single word."""

from new_llm.evaluation import Column, Measure, Scorer, join_scores


class Surprise(Measure):
    name = "surprise"
    title = "surprise"

    def run(self, subject):
        scorer = Scorer(subject.model, [subject.split.document(0)[:50]], subject.reading)
        return {"nats": float(join_scores(scorer.score_streams(1)).losses.max())}

    def columns(self, result):
        return [Column("nats", "surprisal", result["nats"], better="lower")]

    def describe(self, result):
        return f"the worst token costs {result['nats']:.2f} nats"
'''


def test_a_measure_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert len(MODULE.splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_measures.py").write_text(MODULE)
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text(f"Text {number}: the river rose above its banks. " * 40)
    flags = "experiment --name mine --models pythia --device cpu --data.source text --data.tokenizer-vocab-size 300"
    flags += " --samples 16 --seq-length 32 --epochs 1 --model.hidden-size 16 --model.num-hidden-layers 1"
    flags += " --model.num-attention-heads 2 --model.intermediate-size 32 --eval.measures sliding my_measures:Surprise"
    assert main(flags.split()) == 0
    (model,) = json.loads(Path("runs/mine/results.json").read_text())["models"]
    assert set(model["evaluation"]) == {"sliding", "surprise"}
    nats = model["evaluation"]["surprise"]["nats"]
    assert nats > 1
    assert "surprisal" in capsys.readouterr().out
    page = Path("runs/mine/report.html").read_text()
    assert "surprisal" in page
    assert f"the worst token costs {nats:.2f} nats" in page


def test_unknown_measures_are_refused_by_name():
    assert [one.name for one in find_measures(EvalConfig().measures)] == list(EvalConfig().measures)
    with pytest.raises(UserError, match="unknown measure 'slidng'; known are sliding"):
        find_measures(["slidng"])
    with pytest.raises(UserError, match="not a subclass"):
        find_measures([f"{torch.nn.__name__}:Linear"])

"""The code of the how-to pages, each in a module of a user's own as the page says, does what the page promises."""

import json
import sys
from pathlib import Path

import pytest
import torch

from new_llm import create_model
from new_llm.cli.main import main
from new_llm.evaluation import MEASURES
from new_llm.models import load_model
from new_llm.models.layers import LAYER_KINDS
from test_documents import find_blocks
from tiny import ROOT, make_shape, refuse

TINY = """
experiment --name mine --device cpu --data.source text --data.tokenizer-vocab-size 300 --samples 16 --seq-length 32
--segments-per-sample 2 --batch-size 4 --epochs 1 --model.hidden-size 16 --model.num-hidden-layers 2
--model.num-attention-heads 2 --model.intermediate-size 32 --eval.context 32 --eval.stride 16
"""


@pytest.fixture(autouse=True)
def folder(own_folder: Path) -> Path:
    (own_folder / "text").mkdir()
    for number in range(12):
        (own_folder / "text" / f"{number}.txt").write_text(f"Text {number}: the river rose above its banks. " * 40)
    return own_folder


def write_module(name: str, page: str, max_lines: int) -> None:
    block = find_blocks(ROOT / "docs" / "how-to" / page, "python")[0]
    assert len(block.splitlines()) <= max_lines
    Path(f"{name}.py").write_text(block)


def run_tiny(*flags: str) -> dict:
    assert main([*TINY.split(), *flags]) == 0
    return json.loads(Path("runs/mine/results.json").read_text())


def test_a_gated_layer_that_defines_forward_alone(capsys):
    write_module("my_layers", "own-layer.md", 60)
    name = "my_layers:GatedLayer"
    flags = ["--eval.measures", "streaming", "--model.options", "keep", "0.7"]
    results = run_tiny("--models", "pythia", name, *flags)
    assert [model["model_type"] for model in results["models"]] == ["pythia", name]
    assert all(model["evaluation"]["streaming"]["perplexity"] > 1 for model in results["models"])
    assert name in capsys.readouterr().out
    assert name in Path("runs/mine/report.html").read_text()

    model = load_model(Path("runs/mine/my_layers-GatedLayer/best")).eval()
    assert model.layer_list[0].keep == 0.7
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        whole = model(ids)
        stream = model.open_stream()
        pieces = torch.cat([stream.feed(ids[:, start : start + 7]) for start in range(0, 40, 7)], 1)
    assert torch.allclose(whole, pieces, atol=1e-4)
    assert (
        main(["generate", "--run", "runs/mine", "--model", name, "--prompt", "The river", "--max-new-tokens", "9"]) == 0
    )
    assert capsys.readouterr().out.startswith("The river")

    def forget() -> None:  # as in a new process
        LAYER_KINDS.pop("gated")
        sys.modules.pop("my_layers")

    forget()
    assert main(["runs"]) == 0  # what a run's files name is not imported
    assert "my_layers:GatedLayer" in capsys.readouterr().out
    said = refuse(capsys, "eval", "ppl", "--run", "runs/mine/my_layers-GatedLayer")
    assert "unknown layer kind 'gated'" in said
    assert "my_module:MyLayer" in said
    assert "my_layers" not in sys.modules
    assert main(["generate", "--run", "runs/mine", "--model", name, "--prompt", "The", "--max-new-tokens", "2"]) == 0
    forget()
    assert main(["eval", "long", "--run", "runs/mine", "--model", "pythia", "--baselines", f"runs/mine:{name}",
                 "--min-tokens", "64"]) == 0  # fmt: skip
    layer = create_model(name, make_shape(hidden_size=16, intermediate_size=32), keep=0.7).layer_list[0]
    assert layer.state_dict().keys() == model.layer_list[0].state_dict().keys()
    assert main([*TINY.split(), "--name", "bad", "--models", name, "--model.options", "kept", "1"]) == 2
    assert "kept" in capsys.readouterr().err


TUPLES = """
from pydantic import Field
from typing import Annotated, Literal
from torch import nn
from new_llm.config.sections import section
from new_llm.models.layers import Layer, register_layer

@section
class Options:
    rates: tuple[float, ...] = (0.5, 0.9)
    clip: Annotated[float | None, Field(gt=0)] = 1.0
    mode: Literal["sum", "mean"] = "mean"

@register_layer("tuples", options=Options)
class Tuples(Layer):
    def __init__(self, hidden_size: int, rates=(0.5, 0.9), clip=1.0, mode="mean"):
        super().__init__()
        self.hidden_size, self.map = hidden_size, nn.Linear(hidden_size, hidden_size)
    def forward(self, hidden, memory=None, segments=None):
        return hidden + self.map(hidden), None

@register_layer("raises")
class Raises(Tuples):
    def __init__(self, hidden_size: int):
        raise RuntimeError("can't be made")

@register_layer("demands")
class Demands(Tuples):
    def __init__(self, hidden_size: int, number_of_things):
        super().__init__(hidden_size)
"""


def test_options_of_a_layer_are_words_numbers_none_and_lists(capsys):
    Path("tuple_layers.py").write_text(TUPLES)
    flags = ["--models", "tuple_layers:Tuples", "--eval.measures", "sliding", "--model.options"]
    run_tiny(*flags, "rates", "[0.25, 1]", "clip", "none", "mode", "sum")
    settings = load_model(Path("runs/mine/tuple_layers-Tuples/best")).layer_list[0].settings
    assert (settings["rates"], settings["clip"], settings["mode"]) == ((0.25, 1.0), None, "sum")
    assert main(["experiment", "--name", "mine", "--resume"]) == 0  # the same from YAML
    assert "clip: input should be greater than 0" in refuse(capsys, *TINY.split(), "--name", "b", *flags, "clip", "0")
    assert "valid tuple (got 0.5)" in refuse(capsys, *TINY.split(), "--name", "b", *flags, "rates", "0.5")
    for name, said in (
        ("Raises", "RuntimeError: can't be made (in your own code: tuple_layers.py, line 25)"),
        ("Demands", "its constructor needs number_of_things"),
    ):
        found = refuse(capsys, *TINY.split(), "--name", "b", "--models", f"tuple_layers:{name}")
        assert said in found
        assert "bug in New-LLM" not in found


MEASURES_WITH_FAULTS = """
import torch
from new_llm.evaluation import Column, Measure

class Raises(Measure):
    name, title = "raises", "raises"
    def run(self, subject):
        return {"length": 10 // (subject.model.segment_length - 16)}  # fails for one of two models
    def columns(self, result):
        return [Column("length", "length", result["length"])]

class Tensors(Measure):
    name, title = "tensors", "tensors"
    def run(self, subject):
        return {"mean": torch.ones(1)}

class Number(Measure):
    name, title = "number", "number"
    def run(self, subject):
        return 1.5

class Unreadable(Measure):
    name, title = "unreadable", "unreadable"
    def run(self, subject):
        return {"mean": 1.0}
    def columns(self, result):
        return [Column("mean", "mean", result["maen"])]
    def charts(self, results):
        return None

class Nameless(Measure):
    def run(self, subject):
        return {}
"""


def test_a_measure_with_faults_costs_only_itself(capsys):
    Path("faulty.py").write_text(MEASURES_WITH_FAULTS)
    names = [f"faulty:{name}" for name in ("Raises", "Tensors", "Number", "Unreadable")]
    flags = ["--models", "pythia", "pythia_segments", "--eval.measures", "sliding", *names]
    assert main([*TINY.split(), *flags]) == 2
    results = json.loads(Path("runs/mine/results.json").read_text())
    whole, cut = results["models"]
    assert whole["evaluation"]["raises"] == {"length": 0}
    assert cut["not_measured"]["raises"].startswith("ZeroDivisionError: ")
    assert cut["not_measured"]["raises"].endswith("(in your own code: faulty.py, line 8)")
    for model in (whole, cut):
        assert "Tensor is not JSON serializable" in model["not_measured"]["tensors"]
        assert "returned a float instead of a dictionary" in model["not_measured"]["number"]
        assert model["evaluation"]["unreadable"] == {"mean": 1.0}
    assert "columns of unreadable are left out: KeyError: &#39;maen&#39;" in Path("runs/mine/report.html").read_text()
    capsys.readouterr()
    said = refuse(capsys, *TINY.split(), "--name", "b", "--eval.measures", "faulty:Nameless")
    assert "faulty:Nameless: a measure needs a name, a title and a method run" in said


def test_a_measure_stands_in_results_console_and_report_where_the_user_names_it(capsys):
    write_module("my_measures", "own-measure.md", 40)
    # A measure that refuses costs neither the run nor the other measures, but the exit code says so.
    flags = ["--models", "pythia", "--eval.measures", "sliding", "long", "my_measures:Surprise"]
    assert main([*TINY.split(), *flags]) == 2
    results = json.loads(Path("runs/mine/results.json").read_text())
    assert (results["status"], list(results["models"][0]["not_measured"])) == ("complete", ["long"])
    nats = results["models"][0]["evaluation"]["surprise"]["nats"]
    assert nats > 1
    printed = capsys.readouterr()
    assert "surprisal" in printed.out
    assert "new-llm: long is not measured: min_tokens: no document has 2,048 tokens" in printed.err
    sentence = f"the worst token costs {nats:.2f} nats"
    assert sentence in Path("runs/mine/report.html").read_text()

    def write_report(*flags: str) -> str:
        """As in a new process."""
        MEASURES.pop("surprise")
        sys.modules.pop("my_measures")
        assert main(["report", "runs/mine", *flags]) == 0
        return Path("runs/mine/report.html").read_text()

    assert sentence in write_report("--measures", "my_measures:Surprise")
    assert main(["eval", "measures", "--run", "runs/mine", "--measures", "my_measures:Surprise"]) == 0
    assert sentence in capsys.readouterr().out
    assert sentence not in write_report()
    assert "note: Figures of my_measures:Surprise are left out" in capsys.readouterr().err
    assert "my_measures" not in sys.modules  # what a run's files name is not imported


def test_a_source_is_one_function(folder):
    write_module("my_sources", "own-source.md", 20)
    (folder / "verses").mkdir()
    stanzas = [f"Stanza {number}: the river rose above its banks. " * 30 for number in range(12)]
    (folder / "verses" / "a.verse").write_text("\n\n".join(stanzas))
    results = run_tiny("--models", "pythia", "--eval.measures", "sliding", "--data.source", "my_sources:read_verses")
    assert sum(results["data"][split]["num_documents"] for split in ("train", "validation")) == 12

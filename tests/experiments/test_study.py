"""A study: variants and seeds trained as runs, measured, compared, and gone on with."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from experiment_cases import fail_one, note_process, stop_one, write_study
from rich.console import Console

from new_llm.cli.experiment import Experiment
from new_llm.cli.main import main
from new_llm.config import EvalConfig, UserError
from new_llm.config.loading import read_settings
from new_llm.config.train import ClusterConfig
from new_llm.experiments import study as study_module
from new_llm.experiments.config import StudyConfig
from new_llm.experiments.run_folder import read_json, write_json
from new_llm.experiments.study_jobs import LOGS_FOLDER, Cell, Pool, StudyProgress, open_pool
from new_llm.experiments.study_table import describe_study, render_markdown
from new_llm.report.study_page import write_study_page
from new_llm.training import TrainingInterrupted
from tiny import refuse, refused

STUDIES = Path(__file__).parents[2] / "studies"
BITS = "validation-perplexity-streaming-bits-byte"
VS_RESET = "Long documents: validation: vs. reset"


def test_a_study_from_one_command(addresses, tmp_path, capsys):
    recall = {"tasks": ["facts"], "lengths": [2, 4], "depths": [0], "trials": 2, "num_resamples": 20}
    (two := tmp_path / "two").mkdir()
    for source in sorted(addresses.iterdir())[:2]:
        (two / source.name).write_text(source.read_text()[:600])
    path = write_study(tmp_path / "study.yaml", addresses, recall=recall, texts=[str(two)])
    assert main(["study", str(path)]) == 0
    folder = tmp_path / "runs" / "tiny-study"
    summary, table = read_json(folder / "study.json"), (folder / "table.md").read_text()
    assert list(summary["variants"]) == ["reference", "no-delta", "pythia", "whole"]
    assert [code["version"] for code in summary["variants"]["no-delta"]["code"]] == [summary["code"]["version"]]
    figures = {name: entry["figures"] for name, entry in summary["variants"].items()}
    for name in ("reference", "no-delta"):
        for metric in ("Validation perplexity: streaming", VS_RESET, "Long documents: validation: vs. whole"):
            found = figures[name][metric]
            assert set(found["by_seed"]) == {"0", "1"}
            assert found["low"] is found["high"] is None or found["low"] < found["mean"] < found["high"]
    # A difference from the reference is that of the same seed.
    metric = "Validation perplexity: sliding"
    reference, other, pythia = (figures[name][metric]["by_seed"] for name in ("reference", "no-delta", "pythia"))
    expected = sum(other[seed] - reference[seed] for seed in "01") / 2
    assert figures["no-delta"][metric]["difference_from_reference"]["mean"] == pytest.approx(expected)
    assert figures["reference"][metric]["difference_from_reference"] is None
    # Models are compared in nats, paired by seed and document, also with a baseline; of two seeds there is no interval.
    compared = summary["variants"]["no-delta"]["comparisons"]
    nats = sum(math.log(other[seed] / reference[seed]) for seed in "01") / 2
    assert (compared["sliding"]["nats"], compared["sliding"]["low"]) == (pytest.approx(nats), None)
    assert compared["caches-two, beyond repetition"] == compared["caches-two, + longest match"]
    assert f"| {100 * math.expm1(nats):+.1f} % |" in table
    nats = sum(math.log(other[seed] / pythia[seed]) for seed in "01") / 2
    assert figures["no-delta"]["Against pythia: sliding"]["mean"] == pytest.approx(nats)
    assert "Against pythia: sliding" not in figures["pythia"]
    # What was measured afterwards is what its records say, averaged over seeds.
    record = read_json(folder / "measured" / "no-delta-s1-long-validation.json")
    relative = record["result"]["overall"]["differences"]["reset"]["relative"]["value"]
    assert figures["no-delta"][VS_RESET]["by_seed"]["1"] == pytest.approx(relative)
    assert record["subject"]["seed"] == 1
    assert VS_RESET not in figures["pythia"]
    records = [read_json(folder / "measured" / f"reference-s{seed}-recall.json")["result"]["cells"] for seed in (0, 1)]
    shares = [sum(cell["carried"]["exact"]["value"] for cell in cells) / len(cells) for cells in records]
    (metric,) = (name for name in figures["reference"] if name.startswith("Recall, exact: "))
    assert figures["reference"][metric]["mean"] == pytest.approx(sum(shares) / 2)
    titles = ["Validation perplexity.", "Reversal curse.", "Long documents: validation.", "Gates and cost."]
    titles += ["Long documents: two.", "With caches: two.", "With caches, each: two."]
    assert set(titles) <= set(table.splitlines())
    assert "| no-delta | 2 |" in table
    drawn = {file.name for file in (folder / "figures").glob("*.svg")}
    assert drawn >= {"reversal.svg", "recall-facts.svg"}
    rows = {(row["variant"], row["figure"]): row for row in csv.DictReader((folder / "figures.csv").open())}
    row = rows["no-delta", "Validation perplexity: sliding"]
    assert [float(row[f"seed_{seed}"]) for seed in "01"] == list(other.values())
    assert float(row["difference_mean"]) == pytest.approx(expected)
    assert "about 1 min on two cores" in capsys.readouterr().err

    # Again: nothing is trained or measured anew.
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.json") if file.name != "study.json"}
    assert main(["study", str(path)]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_only_some_variants_and_a_study_that_is_moved(addresses, tmp_path, monkeypatch):
    trained: list[str] = []
    monkeypatch.setattr(study_module, "run_experiment", lambda *, exp_config, **_: trained.append(exp_config.name))
    monkeypatch.setattr(study_module, "measure_cell", lambda study, cell, console: None)
    study = read_settings(write_study(tmp_path / "study.yaml", addresses, seeds=[0]), StudyConfig)
    pages: list[bool] = []
    summary = study_module.run_study(
        study, only=["reference"], write_page=lambda *found, with_figures: pages.append(with_figures)
    )
    assert pages == [False, False, True]  # the charts' own files wait for the end
    assert trained == ["pythia-s0", "whole-s0", "reference-s0"]  # its baselines first
    assert summary["variants"] == {}
    other = {"variants": {"reference": {"model": {"gate_init": 1.0}}}, "baselines": [], "window_baselines": []}
    changed = write_study(tmp_path / "other.yaml", addresses, **other)
    with pytest.raises(UserError, match="variant reference began with other settings"):
        study_module.run_study(read_settings(changed, StudyConfig))
    study.folder.parent.rename(tmp_path / "elsewhere")
    study_module.run_study(dataclasses.replace(study, runs_dir=tmp_path / "elsewhere"))
    assert len(trained) == 3 + 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval": {"measures": ["my_module:Needy"]}}, "eval.measures: my_module:Needy: "),
        ({"eval": {"checkpoint_measures": ["slidin"]}}, "eval.measures: unknown measure 'slidin'"),
        ({"model": {"num_memory_heads": 3}}, "model: infini can't be built: num_memory_heads: 3"),
    ],
)
def test_a_variant_that_would_fail_is_refused_before_any_is_trained(change, message, addresses, own_folder):
    measure = "class Needy(SlidingPerplexity):\n    name = 'needy'\n    def __init__(self, threshold): pass\n"
    (own_folder / "my_module.py").write_text(f"from new_llm.evaluation.perplexity import SlidingPerplexity\n{measure}")
    variants = {"reference": {}, "last": {"models": ["infini"]} | change}
    path = write_study(own_folder / "study.yaml", addresses, variants=variants, baselines=[], window_baselines=[])
    with refused(f"^tiny-study: variant last: {message}"):
        study_module.run_study(read_settings(path, StudyConfig))
    assert not (own_folder / "runs").exists()


def test_a_measure_that_was_asked_for_and_failed_is_named_with_its_runs(addresses, tmp_path):
    study = read_settings(write_study(tmp_path / "study.yaml", addresses), StudyConfig)
    cells = [Cell("pythia", 0), Cell("pythia", 1), Cell("reference", 0)]
    for cell in cells:
        (study.folder / cell.name).mkdir(parents=True)
        asked = {"eval": {"measures": study.configure(cell.variant, cell.seed).eval.measures}}
        refused = {"model_type": "pythia", "not_measured": {"sliding": "too short"}}
        results = {"status": "complete", "config": asked, "models": [refused]}
        write_json(study.folder / cell.name / "results.json", results)
    (line,) = study_module.list_unmeasured(study, [*cells, Cell("whole", 0)])
    assert line == "sliding is not measured: too short (pythia-s0, pythia-s1, reference-s0)"
    default = results | {"config": {"eval": {"measures": EvalConfig().measures}}}  # nothing is asked for by name
    write_json(study.folder / "reference-s0" / "results.json", default)
    assert study_module.list_unmeasured(study, cells[2:]) == []


def test_a_run_that_stopped_early_is_compared_at_its_end_with_others_at_theirs(addresses, tmp_path):
    study = read_settings(write_study(tmp_path / "study.yaml", addresses), StudyConfig)
    study = dataclasses.replace(study, base=study.base | {"eval": {"checkpoints": [0.25, 0.5]}})
    for seed, shares in enumerate([[0.3], [0.26, 0.5]]):
        folder, model = study.folder / Cell("reference", seed).name, {"training": {"tokens": 90}, "evaluation": {}}
        write_json(folder / "results.json", {"status": "complete", "code": {}, "models": [model]})
        lines = [{"event": "checkpoint", "share": share, "tokens": 9, "evaluation": {}} for share in shares]
        (folder / "infini").mkdir()
        (folder / "infini" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (stages,) = describe_study(study, {}, study_module.gather_runs(study)[1])["checkpoints"].values()
    assert [(one["tokens"], one["seeds"]) for one in stages] == [(9, [0, 1]), (9, [1]), (90, [0, 1])]


def test_runs_that_end_together_are_all_measured(addresses, tmp_path, monkeypatch):
    started: list[str] = []

    def launch(cell, log):
        started.append(cell.name)
        return SimpleNamespace(exitcode=0)

    monkeypatch.setattr(study_module, "open_pool", lambda work, folder, *_: Pool(folder, None, launch))
    study = read_settings(write_study(tmp_path / "study.yaml", addresses, seeds=[0]), StudyConfig)
    study_module.run_study(study, console=(console := Console(file=io.StringIO(), width=80)))
    baselines, others = {"pythia-s0", "whole-s0"}, {"reference-s0", "no-delta-s0"}
    assert set(started[:4]) == baselines | others
    assert set(started[4:]) == others  # a second time, to be measured against their baselines
    assert console.file.getvalue().count(": done, ") == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {"model": {"nope": 1}}}}, "variant a: unknown key 'model.nope'"),
        ({"variants": {"a": {"models": ["infini", "pythia"]}}}, "expected one, found 2"),
        ({"variants": {"../a": {}}}, "variants"),
        ({"baselines": ["nope"]}, "'nope' is not a variant"),
        ({"baselines": ["pythia", "pythia"]}, "baselines and window_baselines: ['pythia', 'pythia'] names a variant"),
        ({"variants": {"a": {"model": None}}}, "variant a: model: input should be an object"),
        ({"variants": {"a": {"models": 3, "model": {"gate_init": 1}}}}, "variant a: models: input should be a valid"),
        ({"variants": {"a": {"model": {"num_memories": 3}}}}, "variant a: model.num_memories: no model of this run"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"texts": ["validation.txt"]}, "texts: validation.txt: another text is also called 'validation'"),
        (
            {"window_baselines": ["whole"], "long_documents": {"window_stride": 10_000}},
            "long_documents.window_stride: 10000 exceeds the window of whole (",
        ),
    ],
)
def test_bad_studies_are_one_line(addresses, tmp_path, capsys, changes, message):
    path = write_study(tmp_path / "study.yaml", addresses, **({"baselines": [], "window_baselines": []} | changes))
    assert message in refuse(capsys, "study", path)
    assert not (tmp_path / "runs").exists()


def test_what_was_measured_otherwise_is_measured_again(addresses, tmp_path):
    def find_missing(**changes: Any) -> set[str]:
        study = read_settings(write_study(tmp_path / "study.yaml", addresses, **changes), StudyConfig)
        missing = study_module.find_missing(study, cell := study_module.Cell("no-delta", 0))
        for what, one in missing.items():
            (path := study_module.measured_path(study, cell, what)).parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"settings": one.settings, "result": {}})
        return set(missing)

    assert find_missing() == {"long-validation", "caches-validation"}
    assert find_missing() == set()
    assert find_missing(baselines=["pythia", "reference"]) == {"long-validation"}
    assert find_missing(long_documents={"min_tokens": 65}) == {"long-validation", "caches-validation"}


def make_run(seed: int, starts: list[int]) -> dict[str, Any]:
    """A training whose validation documents reach so far."""

    def figures(start: int) -> dict[str, Any]:
        found = {"value": -0.05 - seed / 100, "low": -0.1, "high": 0.0}
        ways = {way: {"value": 50.0 + seed, "low": None, "high": None} for way in ("carried", "reset")}
        return {"start": start, "end": None, "perplexity": ways, "differences": {"reset": {"relative": found}}}

    long = {"ranges": [figures(start) for start in starts], "overall": figures(0), "num_documents": 3}
    streaming = {"perplexity": 9.0, "standard_error": 0.1, "bits_per_byte": 2.0 + seed / 10}
    streaming |= {"num_tokens": 100, "num_bytes": 400, "verdict": {"text": "normal"}}
    cache = {"name": "+ all", "relative": {"value": -0.5, "low": -0.75, "high": 0.0}}
    cache |= {"size": {"state_bytes": 120, "bytes_per_token": 2}}
    caches = {"caches": [{"name": "bare"}, cache], "documents": [{"num_tokens": [60, 10]}, {"num_tokens": [50, 0]}]}
    model = {
        "evaluation": {"streaming": streaming, "caches": caches},
        "gates": {},
        "training": {"tokens": 100, "tokens_per_second": 10.0, "cpu_seconds": 30 + seed, "peak_memory_bytes": 10**6},
        "num_parameters": {"total": 5},
        "cost": {"state_numbers": 100, "flops_per_token": 10.0},
    }
    return {"seed": seed, "model": model, "measured": {"long-books": {"kind": "long", "result": long}}}


def test_seeds_that_reach_different_distances_lose_no_table(addresses, tmp_path):
    study = read_settings(write_study(tmp_path / "study.yaml", addresses), StudyConfig)
    found = {
        "reference": [make_run(0, [0, 1024]), make_run(1, [0, 1024, 2048]), make_run(2, [0])],
        "no-delta": [make_run(0, [0])],
    }

    def find_figure(variant: str) -> dict[str, Any]:
        return describe_study(study, found)["variants"][variant]["figures"]["Long documents: books: vs. reset"]

    figure = find_figure("reference")
    assert (figure["mean"], figure["low"], figure["high"]) == (pytest.approx(-0.06), None, None)  # of three documents
    assert find_figure("no-delta")["high"] == 0.0  # one seed: the measure's own interval, over documents
    for run in found["reference"]:
        run["measured"]["long-books"]["result"]["num_documents"] = 5
    assert find_figure("reference")["low"] < -0.06 < find_figure("reference")["high"]
    summary = describe_study(study, found)
    assert "| no-delta | 1 |" in render_markdown(summary)
    write_study_page(summary, found, tmp_path, with_figures=False)
    assert not (tmp_path / "figures").exists()
    write_study_page(summary, found, tmp_path)
    rows = list(csv.DictReader((tmp_path / "figures" / "long-books-distance-against-reset.csv").open()))
    assert [row["distance"] for row in rows if row["model"] == "reference"] == ["0+", "1k+", "0+", "1k+", "2k+", "0+"]
    page, points = (tmp_path / "study.html").read_text(), {}
    # A chart that can be drawn on either scale is, as in the report of a run.
    (perplexities,) = re.findall(r'<figure id="long-books-distance">.*?</figure>', page, re.DOTALL)
    assert '<button type="button" class="scale"' in perplexities
    assert perplexities.count('<div class="drawn"') == 2 * perplexities.count('<div class="view"')
    for cost in ("processor seconds", "state, bytes per row"):
        chart = f"{BITS}-by-{cost.replace(', ', ' ').replace(' ', '-')}"
        assert f'id="{chart}"' in page
        for row in csv.DictReader((tmp_path / "figures" / f"{chart}.csv").open()):
            points[row["variant"], cost] = [float(row[key]) for key in (cost, "mean", "low", "high") if row[key]]
    seconds, mean, low, high = points["reference", "processor seconds"]
    assert [seconds, mean] == pytest.approx([31, 2.1])
    assert low < 2.1 < high
    # A cache takes log2(1 - 0.5) bits from each token, of four bytes; it adds its states and the longest document.
    assert points["reference + all", "state, bytes per row"][:2] == pytest.approx([400 + 120 + 2 * 70, 2.1 - 0.25])
    assert ("no-delta + all", "processor seconds") not in points  # neither the reference nor a baseline


def test_an_experiment_with_seeds_is_a_study(monkeypatch, tmp_path, capsys):
    given = []
    monkeypatch.setattr(study_module, "run_study", lambda study, **options: given.append((study, options)))
    monkeypatch.setattr("new_llm.cli.training.run_training", lambda train, describe: train(Console(quiet=True)) or 130)
    flags = f"--models pythia infini --num-memories 2 --seeds 0 3 --name one --jobs 2 --runs-dir {tmp_path}".split()
    assert main(["experiment", *flags]) == 2  # --num-memories is an option of neither
    flags[3:5] = ["--model.num-memory-heads", "2", "--recipe", "tuned", "--segment-length", "32"]  # options of infini
    assert main(["experiment", *flags]) == 130
    ((study, options),) = given
    assert options["jobs"] == 2
    assert (study.name, study.seeds, list(study.variants)) == ("one", (0, 3), ["pythia", "infini"])
    config = Experiment.read(flags, "").settings
    for name in study.variants:
        one = study.configure(name, 3)
        assert (one.models, one.seed, one.runs_dir) == ((name,), 3, tmp_path / "one")
        assert one.matches_parameters == config.matches_parameters
        assert (one.data, one.train, one.eval) == (config.data, config.train, config.eval)
        assert one.model.options_of(name) == config.model.options_of(name)
        assert (one.model.recipe, one.model.segment_length) == (("tuned", 32) if name == "infini" else (None, None))
    for wrong in (["--resume"], ["--seeds", "1", "1"]):
        assert main(["experiment", *flags, *wrong]) == 2
    assert main(["experiment", "--jobs", "2"]) == 2
    assert "--seeds" in capsys.readouterr().err


def test_a_new_study_can_run_as_it_stands(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert main(["study", "new", str(path)]) == 0
    study, template = read_settings(path, StudyConfig), read_settings(STUDIES / "template.yaml", StudyConfig)
    assert dataclasses.replace(study, name=template.name) == template
    assert study.name == "mine"
    assert set(yaml.safe_load(path.read_text())) | set(re.findall(r"^# (\w+):", path.read_text(), re.MULTILINE)) == {
        field.name for field in dataclasses.fields(StudyConfig)
    }
    for bad in (path, tmp_path / "-a b.yaml"):
        assert main(["study", "new", str(bad)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


# Several runs of a study at once, in processes and as jobs


CELLS = [Cell("reference", 0), Cell("no-delta", 0)]


def run(pool, cells=CELLS):
    with closing(pool):
        for cell in cells:
            pool.start(cell)
        return [cell for _ in cells if pool.running for cell in pool.wait()]


def test_each_cell_has_a_process_and_a_log(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert set(run(open_pool(partial(note_process, tmp_path), tmp_path, 2, ClusterConfig()))) == set(CELLS)
    notes = [(tmp_path / cell.name).read_text().split() for cell in CELLS]
    assert len({process for process, _ in notes} | {str(os.getpid())}) == 3
    assert {int(threads) for _, threads in notes} == {max(1, (os.cpu_count() or 1) // 2)}
    assert "OMP_NUM_THREADS" not in os.environ
    assert (tmp_path / LOGS_FOLDER / "no-delta-s0.log").read_text() == "here is no-delta-s0\n"


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (partial(fail_one, UserError("the text is gone")), UserError, "no-delta-s0: the text is gone; see "),
        (stop_one, TrainingInterrupted, "no-delta-s0: interrupted"),
    ],
)
def test_a_cell_that_fails_ends_all_and_is_named(tmp_path, work, error, message):
    with refused(message, error):
        run(open_pool(work, tmp_path, 2, ClusterConfig()))
    if error is UserError:
        with refused("no-delta-s0: the text is gone"):
            run(open_pool(work, tmp_path, 1, ClusterConfig()))
        assert (tmp_path / LOGS_FOLDER / "no-delta-s0.log").read_text().endswith("\nthe text is gone\n")


@pytest.mark.parametrize(
    ("error", "jobs", "executor", "message"),
    [
        (RuntimeError("the GPU is gone"), 2, None, "RuntimeError: the GPU is gone"),
        (UserError("the text is gone"), None, "local", "the text is gone"),
    ],
)
def test_what_fails_leaves_the_others(tmp_path, monkeypatch, error, jobs, executor, message):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for this folder's modules
    pool = open_pool(partial(fail_one, error), tmp_path, jobs, ClusterConfig(executor=executor))
    assert run(pool) == CELLS[:1]
    assert (tmp_path / LOGS_FOLDER / "reference-s0.log").read_text() == "here is reference-s0\n"
    (line,) = pool.failures
    assert line.startswith(f"no-delta-s0: {message}; see ")


def test_no_cluster_is_one_line(addresses, tmp_path, monkeypatch, capsys):
    path = write_study(tmp_path / "study.yaml", addresses)
    monkeypatch.setenv("PATH", "")
    for words in ("slurm", "pip install new-llm[cluster]"):
        assert main(["study", str(path), "--cluster", "slurm"]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("new-llm: --cluster")
        assert words in last
        monkeypatch.setitem(sys.modules, "submitit", None)  # then as if it were not installed


def test_one_view_shows_all_runs_in_60_columns(tmp_path):
    cells = [Cell("reference", 0), Cell("a-variant-whose-name-is-long", 10)]
    progress = StudyProgress(tmp_path, dict.fromkeys(cells), 4, 3, console := Console(width=60, file=io.StringIO()))
    progress.begin(Cell("pythia", 0))
    progress.end(Cell("pythia", 0))
    (model := tmp_path / "reference-s0" / "infini").mkdir(parents=True)
    line = {"event": "train", "epoch": 2, "share": 0.624, "loss": 4.12345}
    (model / "metrics.jsonl").write_text(json.dumps(line) + '\n{"event": "tra')
    console.print(progress.render())
    said, *lines = console.file.getvalue().splitlines()
    assert said.startswith("pythia-s0: done, 2 of 4, about 0.0 s left")
    assert all(len(line) <= 60 for line in lines)
    expected = ["reference-s0 62% epoch 2, loss 4.123", "a-variant-whose-name 0% waiting", "runs done: 2 of 4"]
    assert all(word in shown for shown, words in zip(lines, expected, strict=True) for word in words.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [["--jobs", "2"], ["--jobs", "2", "--cluster", "local"]], ids=["processes", "cluster"]
)
def test_a_study_gives_the_same_however_it_is_run(addresses, tmp_path, monkeypatch, other):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    figures = []
    for number, flags in enumerate(([], other)):
        path = write_study(tmp_path / "study.yaml", addresses, seeds=[0], runs_dir=str(tmp_path / str(number)))
        assert main(["study", str(path), *flags]) == 0
        summary = json.loads(Path(tmp_path / str(number) / "tiny-study/study.json").read_text())
        figures.append({name: entry["figures"] for name, entry in summary["variants"].items()})
    for name, one in figures[0].items():
        for metric, figure in one.items():
            if not metric.endswith((": tokens/s", ": peak memory", ": processor seconds")):
                assert figures[1][name][metric] == figure, (name, metric)

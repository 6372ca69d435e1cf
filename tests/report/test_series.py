"""Runs as the report reads them: files, versions, series of seeds, evaluations made since."""

import copy
import json
import re
from typing import Any

import pytest
from page import read_page
from report_runs import make_long, make_results, make_seed, write_run

from new_llm.charts import Chart, bar_chart
from new_llm.config import UserError
from new_llm.evaluation import MEASURES, Column, Measure, ModelResult, register_measure
from new_llm.experiments.run_folder import RESULTS_VERSION
from new_llm.report import load_results, read_runs
from new_llm.report.results import SCHEMA_VERSION, group_series, list_differences, make_run, read_record


def names(*runs: dict[str, Any]) -> list[str]:
    return [one.name for one in group_series([make_run(results) for results in runs])]


def test_models_that_differ_by_their_seed_alone_are_one():
    runs = [make_run(make_seed(seed, {"pythia": 1.0, "infini": 1.0 + seed})) for seed in (0, 1)]
    pythia, infini = group_series(runs)
    assert [member.seed for member in infini.members] == [0, 1]
    first, second = infini.collect("evaluation", "sliding", "perplexity")
    assert second == pytest.approx(2 * first)
    assert pythia.index == 0


def test_models_that_differ_otherwise_are_named_by_what_differs():
    base = make_results("pythia", "infini")
    other = copy.deepcopy(base)
    other["name"] = "other"
    other["models"][1]["options"]["gate_init"] = 1.5
    # Pythia has no gate: it is the same model trained again, told apart by its run.
    assert names(base, other) == [
        "pythia, quick-2026-01-31-140502",
        "infini, gate_init 0",
        "pythia, other",
        "infini, gate_init 1.5",
    ]
    other["config"]["train"] |= {"learning_rate": 1.0, "num_epochs": 9}
    assert names(base, other)[3] == "infini, other"


def test_differences_leave_out_what_a_model_does_not_take():
    rows = dict(list_differences(group_series([make_run(make_results("pythia", "infini", "multi_memory"))])))
    assert rows["model.num_memories"] == ["—", "—", "4"]
    assert rows["model.num_memory_heads"] == ["—", "1", "4"]
    assert "train.learning_rate" not in rows
    assert "model.hidden_size" not in rows


def test_runs_are_read_with_their_evaluations(tmp_path):
    folder = write_run(tmp_path / "a", make_results("pythia", "infini"), make_long("infini"))
    (folder / "evaluations" / "broken.json").write_text("{")
    (folder / "evaluations" / "future.json").write_text('{"record_version": 9, "kind": "long", "result": {}}')
    (run,) = read_runs([folder])
    assert [(one.model, one.text) for one in run.evaluations] == [("infini", "war.txt")]
    assert ["broken.json" in note or "future.json" in note for note in run.notes] == [True, True]
    assert "could not be read and is left out" in read_page([run]).read()
    with pytest.raises(UserError, match="given twice"):
        read_runs([folder, folder / "results.json"])


@pytest.fixture
def luck() -> Any:
    """A measure of a user's own."""

    @register_measure
    class Luck(Measure):
        name = "luck"
        title = "luck of <the> draw"

        def run(self, subject: Any) -> dict[str, Any]:
            return {"luck": 0.5}

        def columns(self, result: dict[str, Any]) -> list[Column]:
            return [Column("luck", "luck", result["luck"], better="higher")]

        def charts(self, results: Any) -> list[Chart]:
            rows = [{"model": one.name, "luck": one.result["luck"] + 0.0} for one in results]
            return [bar_chart("luck", "Luck", "More is better.", rows, x="model", y="luck")]

        def describe(self, result: dict[str, Any]) -> str:
            return f"lucky in {result['luck']:.0%}"

    yield Luck
    del MEASURES["luck"]


def record(model: str, luck: Any, **changes: Any) -> Any:
    values = {"kind": "luck", "subject": {"model": model}, "result": {"luck": luck}, "text": {"source": "a/war.txt"}}
    return read_record(values | changes)


def test_the_newest_complete_measurement_of_a_text_is_shown(luck):
    evaluations = [
        record("infini", 0.10, created="2026-02-01"),
        record("infini", 0.20, created="2026-02-02"),
        record("infini", 0.30, created="2026-02-03", status="partial"),
        record("another", 0.40, created="2026-02-04"),
    ]
    run = make_run(make_results("pythia", "infini"))
    page = read_page([type(run)(run.results, tuple(evaluations))])
    assert "Luck of <the> draw: war.txt" in page.read()
    assert re.findall(r"lucky in \d+%", page.read()) == ["lucky in 20%", *(f"lucky in {n}0%" for n in (1, 2, 3, 4))]
    assert page.read().count("luck, partial") == 1


@pytest.mark.parametrize("value", [None, "text", 1e308, float("nan"), -5, [], {}], ids=str)
def test_a_broken_result_of_a_measure_leaves_the_others(luck, value):
    results = make_results("pythia", "infini")
    results["models"][0]["evaluation"]["luck"] = {"luck": value}
    results["models"][1]["evaluation"]["luck"] = {"luck": 0.75}
    said = read_page([make_run(results)]).read()
    assert "lucky in 75%" in said
    assert "78.26" in said


def test_a_measure_that_is_not_known_here_is_said():
    results = make_results("infini")
    results["models"][0]["evaluation"]["their\x1b[1m own"] = {"luck": 1}
    assert "does not know the measure: their\\x1b[1m own." in read_page([make_run(results)]).read()


def test_seeds_of_different_ranges_are_drawn_as_far_as_each_reaches():
    runs = [make_run(make_seed(seed, {"infini": 1.0})) for seed in (0, 1)]
    runs[1].results["models"][0]["evaluation"]["positions"]["ranges"].pop()
    (series,) = group_series(runs)
    place = ("positions", "validation documents")
    found = [ModelResult(series.name, member.list_measured()[place].result) for member in series.members]
    (chart,) = MEASURES["positions"].charts(found)
    drawn = chart.spec["data"]["values"]
    assert len(drawn) == 5
    assert ["low" in point for point in drawn] == [True] * 4 + [False]
    assert json.dumps(chart.spec)


# results


def test_results_are_read_from_the_file_or_its_folder(results, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results), encoding="utf-8")
    assert load_results(file) == load_results(tmp_path) == results


def test_the_report_reads_the_version_that_experiments_write():
    assert SCHEMA_VERSION == RESULTS_VERSION


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8: 0xff at byte 0"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected a mapping, found list"),
        (b"{}", "no schema_version; this version of new-llm reads schema_version 1"),
        (b'{"schema_version": 2}', "schema_version 2; this version"),
        (b'{"schema_version": true}', "schema_version True; this version"),
        (b'{"schema_version": 1, "models": {}}', "models: expected a list, found dict"),
    ],
)
def test_a_bad_file_gets_one_line(content, message, tmp_path):
    file = tmp_path / "results.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_results(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_gets_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_results(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_results(tmp_path / "other.json")

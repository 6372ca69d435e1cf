import copy
import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_long, make_recall, make_results, make_seed, write_run

from new_llm.config import UserError
from new_llm.report import read_runs, render_page
from new_llm.report.runs import Run, convert_adapter
from new_llm.report.series import group_series, list_differences, merge_lines


def names(*runs: dict[str, Any]) -> list[str]:
    return [one.name for one in group_series([Run(results) for results in runs])]


def test_models_that_differ_by_their_seed_alone_are_one():
    runs = [Run(make_seed(seed, {"pythia": 1.0, "infini": 1.0 + seed})) for seed in (0, 1)]
    pythia, infini = group_series(runs)
    assert [member.seed for member in infini.members] == [0, 1]
    first, second = infini.collect("evaluation", "sliding", "perplexity")
    assert second == pytest.approx(2 * first)
    assert pythia.index == 0


def test_models_that_differ_otherwise_are_named_by_what_differs():
    base = make_results("pythia", "infini")
    other = copy.deepcopy(base)
    other["name"] = "other"
    other["config"]["model"]["gate_init"] = 1.5
    # Pythia has no gate: it is the same model trained again, told apart by its run.
    assert names(base, other) == [
        "pythia, quick-2026-01-31-140502",
        "infini, gate_init 0",
        "pythia, other",
        "infini, gate_init 1.5",
    ]
    other["config"]["train"] |= {"learning_rate": 1.0, "num_epochs": 9}
    assert names(base, other)[3] == "infini, other"


def test_a_repeated_model_type_is_numbered():
    assert names({"models": [{"model_type": "infini"}, {"model_type": "infini"}, 3]}) == ["infini", "infini (2)"]


def test_differences_leave_out_what_a_model_does_not_take():
    rows = dict(list_differences(group_series([Run(make_results("pythia", "infini", "multi_memory"))])))
    assert rows["model.num_memories"] == ["—", "—", "4"]
    assert rows["model.num_memory_heads"][1] == "1"
    assert "train.learning_rate" not in rows
    assert "model.hidden_size" not in rows


def test_lines_of_seeds_are_matched_where_all_have_them():
    runs = [Run(make_seed(seed, {"pythia": 1.0})) for seed in (0, 1)]
    runs[1].results["models"][0]["training"]["epochs_log"].pop()
    merged = merge_lines(group_series(runs)[0], lambda entry: entry["training"]["epochs_log"], "step")
    assert [step for step, _ in merged] == [120, 240, 360]
    assert all(len(lines) == 2 for _, lines in merged)


def test_runs_are_read_with_their_evaluations(tmp_path: Path):
    folder = write_run(tmp_path / "a", make_results("pythia", "infini"), make_long("infini"), make_recall("infini"))
    (folder / "evaluations" / "broken.json").write_text("{")
    (folder / "evaluations" / "future.json").write_text('{"record_version": 9, "kind": "long", "result": {}}')
    (run,) = read_runs([folder])
    assert [record["kind"] for record in run.evaluations] == ["long", "recall"]
    assert ["broken.json" in note or "future.json" in note for note in run.notes] == [True, True]
    text = render_page([run])
    for chart in ("distance-0", "distance-0-1", "recall-1-0-0", "recall-1-0-1"):
        assert f'<figure id="{chart}">' in text
    assert "could not be read, and is left out" in text
    with pytest.raises(UserError, match="given twice"):
        read_runs([folder, folder / "results.json"])


def test_the_newest_whole_measurement_is_shown(tmp_path: Path):
    records = [
        make_long("infini", -0.10, created="2026-02-01T00:00:00+00:00"),
        make_long("infini", -0.20, created="2026-02-02T00:00:00+00:00"),
        make_long("infini", -0.30, created="2026-02-03T00:00:00+00:00", status="partial"),
        make_long("another", -0.40, created="2026-02-04T00:00:00+00:00"),
    ]
    text = render_page(read_runs([write_run(tmp_path / "a", make_results("infini"), *records)]))
    plots = json.loads(text.split('id="plots">')[1].split("</script>")[0])
    (curve,) = plots["distance-0-0"]["curves"]
    assert [point[1] for point in curve["p"]] == pytest.approx([-20.0] * 3)
    assert text.count("long, partial") == 1


@pytest.mark.parametrize("value", [None, "text", 1e308, -5, []], ids=str)
def test_broken_evaluations_leave_the_rest(value: Any):
    results = make_results("infini")
    whole = [make_long("infini"), make_recall("infini")]
    for key in ("ranges", "cells", "overall", "confidence", "num_candidates"):
        records = copy.deepcopy(whole)
        for record in records:
            record["result"][key] = value
        assert "78.26" in render_page([Run(results, tuple(records))])
    for key in ("subject", "text", "created"):
        assert "78.26" in render_page([Run(results, tuple(record | {key: value} for record in whole))])

    def spoil(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: spoil(item) for key, item in entry.items()}
        if isinstance(entry, list):
            return [spoil(item) for item in entry]
        return value if isinstance(entry, float) else entry

    records = tuple(spoil(make("infini")) for make in (make_long, make_recall))
    assert "78.26" in render_page([Run(results, records)])


def test_an_adapter_s_results_are_a_model_with_long_documents():
    entry = make_results("infini")["models"][0]
    log = [{"step": step, "tokens": 10 * step, "alpha": {"0": 0.01 * step}} for step in (1, 2, 3)]
    results = {
        "schema_version": 1,
        "kind": "parallel_adapter",
        "name": "adapter",
        "num_parameters": {"base": 100, "adapter": 20, "trained": 20},
        "training": entry["training"] | {"steps_log": log},
        "alpha": {"0": 0.03},
        "evaluation": {"held_out": make_long("x")["result"]},
    }
    converted, records = convert_adapter(results)
    assert converted["models"][0]["num_parameters"]["total"] == 120
    text = render_page([Run(converted, tuple(records))])
    assert '<figure id="alpha-training">' in text
    assert "parallel_adapter, layer 0: +0.0300" in text
    assert "Long documents, parallel_adapter: held out" in text

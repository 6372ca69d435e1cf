"""Runs as the report reads them: files, versions, series of seeds, evaluations made since."""

import copy
from typing import Any

import pytest
from report_runs import make_record, pick, read_page, write_run

from new_llm.config import UserError
from new_llm.report import load_results, read_runs
from new_llm.report.results import group_series, list_differences, make_run


def names(*runs: dict[str, Any]) -> list[str]:
    return [one.name for one in group_series([make_run(results) for results in runs])]


def test_models_that_differ_otherwise_are_named_by_their_runs(results):
    other = copy.deepcopy(results)
    other["models"][1]["options"]["gate_init"] = 1.5
    # Pythia has no gate: it is the same model trained again.
    assert names(results, other) == ["pythia, whole", "infini, whole", "pythia, whole (2)", "infini, whole (2)"]
    other["name"] = "other"
    assert names(results, other)[2:] == ["pythia, other", "infini, other"]


def test_differences_leave_out_what_a_model_does_not_take(four_models):
    three = pick(four_models, "pythia", "infini", "multi_memory")
    rows = dict(list_differences(group_series([make_run(three)])))
    assert rows["model.num_memories"] == ["—", "—", "4"]
    assert rows["model.num_memory_heads"] == ["—", "1", "—"]
    assert "train.learning_rate" not in rows
    assert "model.hidden_size" not in rows


def test_runs_are_read_with_their_evaluations(with_long, tmp_path):
    folder = write_run(tmp_path / "a", with_long, make_record(with_long, "infini"))
    (folder / "evaluations" / "broken.json").write_text("{")
    (folder / "evaluations" / "future.json").write_text('{"record_version": 9, "kind": "long", "result": {}}')
    (run,) = read_runs([folder])
    assert [(one.model, one.text) for one in run.evaluations] == [("infini", "war.txt")]
    assert ["broken.json" in note or "future.json" in note for note in run.notes] == [True, True]
    assert "could not be read and is left out" in read_page([run]).read()
    with pytest.raises(UserError, match="given twice"):
        read_runs([folder, folder / "results.json"])


# results


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"{}", "no schema_version; this version of new-llm reads schema_version 1"),
        (b'{"schema_version": 2}', "schema_version 2; this version"),
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

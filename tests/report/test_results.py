import json
from pathlib import Path
from typing import Any

import pytest

from new_llm.config import UserError
from new_llm.experiments.record import RESULTS_VERSION
from new_llm.report import load_results
from new_llm.report.results import SCHEMA_VERSION, describe_outcome, get_gates, named_models


def test_results_are_read_from_the_file_or_its_folder(results: dict[str, Any], tmp_path: Path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results), encoding="utf-8")
    assert load_results(file) == load_results(tmp_path) == results


def test_the_report_reads_the_version_that_experiments_write():
    assert SCHEMA_VERSION == RESULTS_VERSION


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected a mapping of results, found list"),
        (b"{}", "no schema_version; this version of new-llm reads schema_version 1"),
        (b'{"schema_version": 2}', "schema_version 2; this version"),
        (b'{"schema_version": true}', "schema_version True; this version"),
        (b'{"schema_version": 1, "models": {}}', "models: expected a list, found dict"),
    ],
)
def test_a_bad_file_gets_one_line(content: bytes, message: str, tmp_path: Path):
    file = tmp_path / "results.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_results(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_gets_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="no such results file"):
        load_results(tmp_path)
    with pytest.raises(UserError, match="no such results file"):
        load_results(tmp_path / "other.json")


def outcome(*perplexities: float | None, unigram: float | None = 530.0, error: float | None = 0.5) -> str:
    models = [
        {
            "model_type": name,
            "evaluation": {"sliding": {"perplexity": value, "standard_error": error}},
        }
        for name, value in zip(("pythia", "infini", "multi_memory"), perplexities, strict=False)
    ]
    said = describe_outcome({"models": models, "unigram_perplexity": unigram})
    return " ".join([said.headline, *said.caveats])


def test_the_headline_names_the_best_and_by_how_much():
    assert outcome(80.0, 76.0).startswith(
        "infini has the lowest validation perplexity: 76.00, 5.0% below pythia (80.00)."
    )
    assert outcome(80.0, 84.0).startswith("pythia has the lowest validation perplexity: 80.00, 4.8% below infini")
    assert "2.6% below infini (78.00) and 5.0% below pythia (80.00)" in outcome(80.0, 78.0, 76.0)


def test_the_headline_claims_no_more_than_was_measured():
    assert "The gap is 5.7 standard errors" in outcome(80.0, 76.0)
    assert "read it as a tie" in outcome(80.0, 79.0)
    assert "have the same validation perplexity" in outcome(80.0, 80.01)
    assert "standard error" not in outcome(80.0, 76.0, error=None)
    for said in (outcome(80.0, 76.0), outcome(80.0, 79.0), outcome(80.0, 80.0), outcome(80.0)):
        assert "spread between seeds is unmeasured" in said
    assert "No model beats the unigram perplexity" in outcome(600.0, 700.0)
    assert outcome(None, float("nan")).startswith("No model has been evaluated")
    assert "Not evaluated: pythia." in outcome(float("inf"), 76.0)


def test_a_repeated_model_type_is_numbered():
    names = [name for name, _ in named_models({"models": [{"model_type": "infini"}, {"model_type": "infini"}, 3]})]
    assert names == ["infini", "infini (2)"]


def test_gates_of_any_nesting_are_one_number_a_head():
    gates = get_gates({"gates": {"layers.0": [[0.1], 0.2], "layers.1": 0.3, "layers.2": [None, float("nan"), 7]}})
    assert gates == {"layers.0": [0.1, 0.2], "layers.1": [0.3]}

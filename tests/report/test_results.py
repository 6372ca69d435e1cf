import json
from pathlib import Path
from typing import Any

import pytest

from new_llm.config import UserError
from new_llm.experiments.run_folder import RESULTS_VERSION
from new_llm.report import load_results
from new_llm.report.results import SCHEMA_VERSION


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
        (b"\xff\xfe", "not UTF-8: 0xff at byte 0"),
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

import io
from typing import Any

import pytest
from rich.console import Console

from new_llm import formats
from new_llm.report import render_summary_table
from new_llm.report import tables as t


def show(results: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render_summary_table(results))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.format_number(83.9271), "83.93"),
        (formats.format_number(14204.4), "14,204"),
        (formats.format_number(0.15832, 3), "0.158"),
        (formats.format_number(9.9996), "10.000"),
        (formats.format_number(2.5e12), "2.500e+12"),
        (formats.format_number(0), "0"),
        (formats.format_number(None), "—"),
        (formats.format_number(float("nan")), "NaN"),
        (formats.format_number(float("inf")), "∞"),
        (formats.format_with_error(83.9271, 0.5036), "83.93 ± 0.50"),
        (formats.format_with_error(1234.5, 12.3), "1,234 ± 12"),
        (formats.format_with_error(83.9271, None), "83.93"),
        (formats.format_with_error(83.9271, float("inf")), "83.93"),
        (formats.format_with_error(None, 0.5), "—"),
        (formats.format_count(70426624), "70,426,624"),
        (formats.format_short(70426624), "70.4M"),
        (formats.format_short(950), "950"),
        (formats.format_bytes(0), "0 B"),
        (formats.format_bytes(1050624), "1.05 MB"),
        (formats.format_bytes(133120), "133 kB"),
        (formats.format_percent(0.0417), "4.2%"),
        (formats.format_seconds(3.21), "3.2 s"),
        (formats.format_seconds(59.6), "1 min 00 s"),
        (formats.format_seconds(185), "3 min 05 s"),
        (formats.format_seconds(7800), "2 h 10 min"),
        (formats.format_seconds(None), "—"),
    ],
)
def test_numbers_read_well(written: str, expected: str):
    assert written == expected


def test_the_console_shows_every_model_and_measure(four_models: dict[str, Any]):
    text = show(four_models)
    for word in (
        "pythia",
        "infini",
        "multi_memory",
        "hierarchical",
        "unigram",
        "75.94 ± 0.46",
        "normal",
        "6.15M",
    ):
        assert word in text
    for column in t.COLUMNS:
        assert column.name in text


def test_it_fits_a_narrow_terminal(results: dict[str, Any]):
    lines = show(results, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("reversal, forward" in line and "14.82" in line for line in lines)


def test_only_the_lowest_of_a_measure_is_marked(results: dict[str, Any]):
    pythia, infini, unigram = t.summarize(results)
    assert [cell.best for cell in unigram.cells] == [False] * len(t.COLUMNS)
    best = {
        column.name.strip(): (a.best, b.best)
        for column, a, b in zip(t.COLUMNS, pythia.cells, infini.cells, strict=True)
    }
    assert best["perplexity"] == (False, True)
    assert best["backward"] == (True, False)
    assert best["parameters"] == (False, False)
    assert not any(cell.best for cell in t.summarize({"models": results["models"][:1]})[0].cells)


def test_names_are_no_markup(results: dict[str, Any]):
    results["name"] = "[/red] run"
    results["models"][0]["model_type"] = "[bold]pythia"
    assert "[bold]pythia" in show(results)


def test_measures_that_no_model_has_are_left_out(results: dict[str, Any]):
    for model in results["models"]:
        model["evaluation"]["reversal"] = None
        del model["training"]
    text = show(results)
    assert "reversal" not in text
    assert "tokens/s" not in text
    assert "perplexity" in text


def test_a_run_without_models_is_a_table_too():
    assert "unigram" in show({"unigram_perplexity": 530.1})
    assert show({})

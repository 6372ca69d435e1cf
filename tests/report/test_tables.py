"""The headline, the tables, and the data of charts."""

import copy
import csv
import io
import math
import re
from typing import Any

import pytest
from report_runs import MODELS, make_record, make_seed, pick, read_page, set_at, write_run
from rich.console import Console

from new_llm import formats
from new_llm.charts import Chart, bar_chart, heat_chart, line_chart, point_chart
from new_llm.config import UserError
from new_llm.report import SummaryTable, load_results, read_runs
from new_llm.report.figures import place_series
from new_llm.report.headline import describe_outcome
from new_llm.report.results import group_series, list_differences, make_run
from new_llm.report.tables import Summary, summarize
from tiny import refused


def compare(*runs: dict[str, Any]) -> str:
    said = describe_outcome(group_series([make_run(results) for results in runs]))
    return " ".join([said.text, *said.caveats])


def rank(results: dict[str, Any], *perplexities: float | None) -> str:
    results = results | {"models": results["models"][: len(perplexities)]}
    for entry, value in zip(results["models"], perplexities, strict=True):
        entry["evaluation"] = {"sliding": entry["evaluation"]["sliding"] | {"perplexity": value}}
    return compare(results)


def test_the_headline_names_the_best_and_by_how_much_and_claims_no_more_than_was_measured(four_models):
    best = "has the lowest sliding-window perplexity: "
    assert rank(four_models, 80.0, 78.0, 76.0).startswith(
        f"multi_memory {best}76.00, 2.6% below infini (78.00) and 5.0% below pythia (80.00)."
    )
    assert rank(four_models, 80.0, 84.0).startswith(f"pythia {best}80.00, 4.8% below infini (84.00).")
    assert "have the same sliding-window perplexity" in rank(four_models, 80.0, 80.01)
    assert "There is only one model, and nothing to compare it with." in rank(four_models, 80.0)
    assert rank(four_models, None, float("nan")) == "No model has a finite figure for sliding-window perplexity."
    assert rank(four_models).startswith("No model has been evaluated")
    assert "Not evaluated: pythia." in rank(four_models, float("inf"), 76.0)
    assert "spread between seeds is unknown" in rank(four_models, 80.0, 76.0)


def share_documents(results: dict[str, Any], *losses: list[float]) -> None:
    for entry, found in zip(results["models"], losses, strict=True):
        entry["evaluation"]["sliding"]["documents"] = {
            "num_tokens": [1000] * len(found),
            "total_nll": [1000 * loss for loss in found],
        }


def test_models_are_compared_in_pairs_by_document(results):
    hard = [3.0, 4.0, 5.0, 4.5, 3.5, 5.5]
    # Documents differ by far more than models do, but infini gains about a tenth of a nat on each.
    share_documents(results, hard, [loss - 0.1 - 0.002 * place for place, loss in enumerate(hard)])
    said = compare(results)
    assert re.search(r"from pythia is -10.0% \[-10.\d%, -9.\d%\] \(95% interval over 6 documents, paired by doc", said)
    assert "more than chance explains" in said
    share_documents(results, hard, [loss + 0.5 * (-1) ** place for place, loss in enumerate(hard)])
    assert "chance could explain it, so read it as a tie" in compare(results)


def test_several_seeds_are_paired_by_seed_and_document(results):
    """A gain on one document in six is no gain on others, however alike the seeds are."""
    hard = [3.0, 4.0, 5.0, 4.5, 3.5, 5.5]
    for gains, words in (
        ([0.1] * 6, "only an indication: a claim needs 5 seeds"),
        ([0.6] + [0.0] * 5, "read it as a tie (a diff"),
    ):
        seeds = [make_seed(results, seed, {"pythia": 1.0, "infini": 0.9 + 0.001 * seed}) for seed in range(3)]
        for seed, one in enumerate(seeds):
            losses = [loss + 0.2 * seed for loss in hard]  # a seed's own mean is no difference between models
            share_documents(one, losses, [loss - gain for loss, gain in zip(losses, gains, strict=True)])
        said = compare(*seeds)
        assert "(95% interval over 3 seeds and 6 documents, paired by seed and document)" in said
        assert words in said
    for one in seeds:
        share_documents(one, [3.0], [2.9])
    said = compare(*seeds)
    assert "3 seeds and 1 document: too few for an interval." in said
    assert "[" not in said


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("data", "source_fingerprint"), "other", "different texts"),
        (("data", "tokenizer", "fingerprint"), "other", "different tokenizers"),
        (("data", "split_fingerprint"), "other", "different validation documents"),
        (("models", 0, "evaluation", "sliding", "context"), 512, "their context differs"),
    ],
)
def test_models_of_different_measurements_are_not_ranked(results, path, value, words):
    one, two = pick(results, "pythia"), pick(results, "infini")
    set_at(two, path, value)
    said = compare(one, two)
    assert said.startswith("These models can't be ranked by sliding-window perplexity: ")
    assert words in said


def measure_long(results: dict[str, Any], *worths: float, cache: float = 0.0) -> None:
    """Six long documents: what the memory of each model is worth, in nats, and what a cache is."""
    hard = [4.0, 4.2, 3.8, 4.1, 4.4, 3.9]
    for entry, worth in zip(results["models"], worths, strict=True):
        losses = [loss + worth for loss in hard]
        carried = {"value": math.exp(sum(losses) / 6), "low": None, "high": None}
        ways = {"carried": 0.0, "reset": worth, "foreign": worth / 2}
        entry["evaluation"]["long"] = {
            "num_documents": 6,
            "confidence": 0.95,
            "overall": {"perplexity": {"carried": carried}, "differences": {}},
            "ranges": [],
            "range_starts": [0],
            "documents": [
                {
                    "num_tokens": {way: [10] for way in ways},
                    "total_nll": {way: [10 * (one - ways[way])] for way in ways},
                }
                for one in losses
            ],
        }
        if cache:
            totals = [{"bare": [10 * one], "+ 2,000 states": [10 * (one + cache)]} for one in losses]
            entry["evaluation"]["caches"] = {
                "caches": [{"name": "bare"}, {"name": "+ 2,000 states"}],
                "range_starts": [0],
                "documents": [{"num_tokens": [10], "total_nll": total} for total in totals],
            }


def test_the_headline_says_what_the_memory_is_worth_and_against_what(results, four_models):
    measure_long(results, 0.0, -0.1)
    said = compare(results)
    assert said.startswith(
        "On 6 long held-out documents, infini's memory lowers perplexity by 9.5 % [9.5, 9.5] against an empty one and "
        "by 4.9 % [4.9, 4.9] against another document's. Its perplexity is 9.5 % [9.5, 9.5] below that of pythia, "
    )
    assert "has the lowest sliding-window perplexity" in said
    measure_long(results, 0.0, 0.02, cache=-0.3)
    said = compare(results)
    assert "infini's memory raises perplexity by 2.0 %" in said
    assert "Against pythia with a cache of 2,000 states, which needs no training, it is 37.7 % [37.7, 37.7] ab" in said
    results = pick(four_models, "pythia")
    measure_long(results, 0.0)
    assert "memory" not in compare(results)
    results = pick(four_models, "infini")
    measure_long(results, -0.1)
    del results["models"][0]["evaluation"]["long"]["documents"][4:]
    assert "9.5 % (no interval: too few documents or seeds) against an empty one" in compare(results)


def show(results: dict[str, Any], width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(SummaryTable(results))
    return file.getvalue()


def find_summary(*runs: dict[str, Any], **options: Any) -> Summary:
    return summarize(group_series([make_run(results) for results in runs]), **options)


def find_column(summary: Summary, group: str, title: str) -> list[Any]:
    place = summary.headings.index((group, title))
    return [cells[place] for _, _, cells in summary.rows]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.format_number(83.9271), "83.93"),
        (formats.format_number(2.5e12), "2.500e+12"),
        (" ".join(map(formats.format_number, (None, float("nan"), float("inf")))), "— NaN ∞"),
        (formats.format_with_error(83.9271, 0.5036), "83.93 ± 0.50"),
        (formats.format_with_error(83.9271, float("inf")), "83.93"),
        (formats.format_short(70426624), "70.4M"),
        (formats.format_bytes(1050624), "1.05 MB"),
        (formats.format_seconds(59.6), "1 min 00 s"),
        (formats.format_seconds(7800), "2 h 10 min"),
        ("; ".join(formats.format_plural(count, "batch") for count in (1, 2000)), "1 batch; 2,000 batches"),
        ("; ".join(formats.format_plural(count, "new token") for count in (0, 1)), "0 new tokens; 1 new token"),
    ],
)
def test_numbers_and_names_read_well(written, expected):
    assert written == expected


@pytest.mark.parametrize("width", [60, 120])
def test_every_model_is_a_row_and_no_word_is_cut(four_models, width):
    text = show(four_models, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    entry = four_models["models"][1]
    sliding = entry["evaluation"]["sliding"]
    for word in (
        *("parameters", "sliding", "streaming", "backward", "tokens/s", sliding["verdict"]["level"]),
        formats.format_with_error(sliding["perplexity"], sliding["standard_error"]),
        *(formats.format_short(entry["cost"][key]) for key in ("state_numbers", "flops_per_token")),
        formats.format_bytes(entry["memory_info"]["total_bytes"]),
        formats.format_seconds(entry["training"]["cpu_seconds"]),
    ):
        assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", text), word
    rows = [line.split()[0] for line in lines if line.strip() and line.split()[0] in MODELS]
    assert tuple(rows[:4]) == MODELS
    assert rows.count("multi_memory") > {60: 4, 120: 2}[width]
    assert " has the lowest sliding-window perplexity: " in text


def test_only_the_best_of_a_figure_is_marked_and_seeds_are_a_mean_that_says_each(results):
    summary = find_summary(*(make_seed(results, seed, {"infini": 1.0 + seed}) for seed in (0, 1)))
    (cell,) = find_column(summary, "Validation perplexity", "sliding")
    assert cell.text == "114.0"
    assert cell.hint == "2 seeds: 76.00, 152.0; standard deviation 53.7"
    for entry, share in zip(results["models"], (0.1, 0.2), strict=True):
        entry["evaluation"]["reversal"]["backward_accuracy"] = share
    summary = find_summary(results)
    assert [c.is_best for c in find_column(summary, "Validation perplexity", "sliding")] == [False, True]
    assert [c.is_best for c in find_column(summary, "Reversal curse", "backward first")] == [False, True]
    assert not any(cell.is_best for cell in find_column(summary, "Model", "parameters"))
    assert not any(cell.is_best for _, _, cells in find_summary(results, mark_best=False).rows for cell in cells)
    results["models"] = results["models"][:1]
    assert not any(cell.is_best for _, _, cells in find_summary(results).rows for cell in cells)


def test_names_are_no_markup_and_drive_no_terminal(results):
    results["name"] = "[/red] run\x1b]0;title\x07"
    results["models"][0]["model_type"] = "[bold]pythia\x1b[2J\r"
    results["models"][0]["evaluation"]["sliding"]["verdict"] = {"level": "a\x1b[31m", "text": "b\x9b"}
    text = show(results, 300)
    assert "[bold]pythia" in text
    assert not set(text) & {"\x1b", "\x07", "\r", "\x9b"}


def names(*runs: dict[str, Any]) -> list[str]:
    return [one.name for one in group_series([make_run(results) for results in runs])]


def test_models_that_differ_are_named_by_their_runs_and_by_what_they_take(results, four_models):
    other = copy.deepcopy(results)
    other["models"][1]["options"]["gate_init"] = 1.5
    # Pythia has no gate: it is the same model trained again.
    assert names(results, other) == ["pythia, whole", "infini, whole", "pythia, whole (2)", "infini, whole (2)"]
    other["name"] = "other"
    assert names(results, other)[2:] == ["pythia, other", "infini, other"]
    three = pick(four_models, "pythia", "infini", "multi_memory")
    rows = dict(list_differences(group_series([make_run(three)])))
    assert rows["model.num_memories"] == ["—", "—", "4"]
    assert rows["model.num_memory_heads"] == ["—", "1", "—"]
    assert "train.learning_rate" not in rows
    assert "model.hidden_size" not in rows


def test_runs_are_read_with_their_evaluations(with_long, tmp_path):
    own = make_record(with_long, "infini") | {
        "created": "2026-03",
        "text": {"source": "validation documents of a/b.txt"},
    }
    own["subject"] |= {"cache": {"num_states": 2000, "ngram_order": 3, "longest_match": True}}
    folder = write_run(tmp_path / "a", with_long, make_record(with_long, "infini"), own)
    (folder / "evaluations" / "broken.json").write_text("{")
    (folder / "evaluations" / "future.json").write_text('{"record_version": 9, "kind": "long", "result": {}}')
    (run,) = read_runs([folder])
    cached = "validation documents of b.txt, with a cache of 2,000 states, trigrams, longest match"
    assert [(one.model, one.text) for one in run.evaluations] == [("infini", "war.txt"), ("infini", cached)]
    assert ["broken.json" in note or "future.json" in note for note in run.notes] == [True, True]
    assert "could not be read and is left out" in read_page([run]).read()
    with pytest.raises(UserError, match="given twice"):
        read_runs([folder, folder / "results.json"])


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        ([("a/x.txt", "1"), ("b/x.txt", "2")], ["x.txt (a/x.txt)", "x.txt (b/x.txt)"]),
        ([("a/x.txt", "1"), ("b/x.txt", "1")], ["x.txt", "x.txt"]),  # copies
        ([("a/x.txt", "1"), ("a/x.txt", "2")], ["x.txt", "x.txt"]),  # edited: the newest measurement counts
    ],
)
def test_different_texts_with_one_file_name_have_their_own_columns(texts, names, with_long, tmp_path):
    records = [
        make_record(with_long, "infini") | {"text": {"source": source, "source_fingerprint": fingerprint}}
        for source, fingerprint in texts
    ]
    (run,) = read_runs([write_run(tmp_path / "a", with_long, *records)])
    assert [one.text for one in run.evaluations] == names


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
    with refused(re.escape(f"{file}: ") + ".*" + re.escape(message)):
        load_results(file)


def read_values(chart: Chart) -> list[dict[str, Any]]:
    return chart.spec["data"]["values"]


def make_lines(rows: list[dict[str, Any]], **options: Any) -> Chart:
    return line_chart("loss", "Loss", "Lower is better.", rows, x="step", y="loss", series="model", **options)


@pytest.mark.parametrize("value", [None, "text", math.nan, math.inf, True, 10**400, [1]])
def test_rows_that_can_t_be_drawn_are_left_out_and_stay_in_the_table(value):
    rows = [{"step": 1, "loss": 2.0, "model": "a"}, {"step": 2, "loss": value, "model": "a"}]
    for chart in (
        make_lines(rows),
        bar_chart("b", "B", "", rows, x="model", y="loss"),
        point_chart("p", "P", "", rows, x="step", y="loss", series="model", x_log=True),
        heat_chart("h", "H", "", rows, x="step", y="model", value="loss"),
    ):
        assert len(read_values(chart)) == 1
        assert chart.rows == rows


def test_a_logarithmic_axis_holds_positive_numbers_alone_and_seeds_become_their_mean_and_a_band():
    rows = [{"step": step, "loss": loss, "model": "a"} for step, loss in enumerate((-1.0, 0, 3.0))]
    assert [point["y"] for point in read_values(make_lines(rows, y_log=True))] == [3.0]
    assert len(read_values(make_lines(rows))) == 3
    assert make_lines(rows).other is None
    linear, logarithmic = make_lines(rows[2:]), make_lines(rows[2:], y_log=True)
    assert (linear.other, logarithmic.other) == (logarithmic.spec, linear.spec)
    rows = [{"step": step, "loss": loss, "model": "a"} for loss in (2.0, 4.0) for step in (1, 2)]
    rows.append({"step": 3, "loss": 5.0, "model": "a"})  # only one seed reached it
    drawn = [(point["x"], point["y"], point.get("low"), point.get("high")) for point in read_values(make_lines(rows))]
    assert drawn == [(1, 3, 2, 4), (2, 3, 2, 4), (3, 5, None, None)]


def test_csv_holds_every_column_of_any_row():
    chart = make_lines(
        [{"step": 1, "loss": 2.5, "model": 'a, "b"'}, {"step": 2, "loss": None, "model": "c", "seed": 3}]
    )
    assert list(csv.DictReader(io.StringIO(chart.to_csv()))) == [
        {"step": "1", "loss": "2.5", "model": 'a, "b"', "seed": ""},
        {"step": "2", "loss": "", "model": "c", "seed": "3"},
    ]


def test_a_variety_stands_beside_its_owner():
    rows = [{"m": "a", "x": 1, "y": 5}, {"m": "a + 9", "of": "a", "x": 10, "y": 4}, {"m": "b", "x": 0, "y": 3}]
    rows.append({"m": "b + 9", "of": "b", "x": 9, "y": 2})
    chart = point_chart("p", "P", "", rows, x="x", y="y", series="m", owner="of", x_log=True)
    drawn = [(point["series"], point.get("from_x"), point.get("from_y")) for point in read_values(chart)]
    assert drawn == [("1 a", None, None), ("1 a", 1, 5), ("2 b", None, None)]  # b has no place on the axis
    assert place_series(chart, {}) == {"1 a": 0, "2 b": 1}
    assert [point["number"] for point in read_values(chart)] == ["1", "9", "9"]

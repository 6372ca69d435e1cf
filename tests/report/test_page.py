import base64
import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest
from report_runs import Page, read_page, set_at

from new_llm.charts import line_chart
from new_llm.config import UserError
from new_llm.config.terminal import hide_home
from new_llm.formats import format_number, format_with_error
from new_llm.report.figures import write_chart
from new_llm.report.results import make_run, refuse_other_forms

CHARTS = {
    "perplexity-sliding",
    "perplexity-streaming",
    "positions",
    "reversal",
    "memory-usage-infini",
    "validation",
    "training-loss",
    "gates",
    "gates-training",
}


def show(results) -> Page:
    return read_page([make_run(results)])


def test_a_complete_run_shows_everything(four_models, tmp_path):
    page = read_page([make_run(four_models)], tmp_path)
    assert set(page.ids()) >= CHARTS
    said = page.read()
    measured = {entry["model_type"]: entry["evaluation"]["sliding"] for entry in four_models["models"]}
    best = min(measured, key=lambda name: measured[name]["perplexity"])
    one = measured[best]
    for words in (
        f"{best} has the lowest sliding-window perplexity: {format_number(one['perplexity'])}, ",
        format_with_error(one["perplexity"], one["standard_error"]),
        one["verdict"]["text"],
        four_models["command"],
        four_models["data"]["source_fingerprint"],
        *("asked for 5,000 samples", "segments_per_sample: 2", "context, tokens"),
    ):
        assert words in said
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files >= {f"{name}{ending}" for name in CHARTS for ending in (".svg", ".png", ".csv")}
    assert {address for _, a in page.elements if (address := a.get("href") or "").startswith("figures/")} == {
        f"figures/{file}" for file in files if not file.endswith(".csv")
    }
    assert (tmp_path / "figures" / "gates.svg").read_text().startswith("<svg")
    assert (tmp_path / "figures" / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_loads_nothing_runs_its_own_script_alone_and_its_references_lead_somewhere(four_models):
    page = show(four_models)
    assert [name for name, count in Counter(page.ids()).items() if count > 1] == []
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', page.source)) <= set(page.ids())
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "img", "base"}
        for name in ("src", "href", "srcset", "xlink:href", "data", "poster", "action"):
            address = attributes.get(name)
            assert address is None or address.startswith(("#", "data:,", "data:text/csv;", "figures/"))
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.findall(r"[a-z]+://[^\"\s]*", page.source)
    assert "@import" not in page.source
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] or "" for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}';" in policy
    assert not re.search(r"url\((?!#)", page.source)


def test_charts_have_the_page_s_colours_and_tooltips(results):
    page = show(results)
    pictures = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("role") == "img"]
    assert len(pictures) > len(CHARTS)
    assert all(picture["aria-label"] for picture in pictures)
    assert not re.search(r'(fill|stroke)="#', page.source)
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page.source)) - {"share"}  # which each shaded token has
    light, dark = page.source.split("prefers-color-scheme: dark", 1)
    assert used <= set(re.findall(r"--([a-z0-9-]+):", light.split("<style>")[1]))
    assert {"ink", "grid", "muted", "series-0", "series-1"} <= set(re.findall(r"--([a-z0-9-]+):", dark))
    assert page.source.count("<title>") > 50
    # The models keep their colours and marks where a chart leaves one out.
    gates = page.source.split('<figure id="gates-training">')[1].split("</figure>")[0]
    assert "var(--series-1)" in gates
    assert "var(--series-0)" not in gates


def test_hostile_text_is_shown_and_not_obeyed(results, tmp_path):
    hostile = '<script>alert(1)</script> & "q" $x^{$ \x1b[31m\u202e\0\uffff {{ 7 * 7 }} --> 漢字'
    results["name"] = results["command"] = results["status"] = hostile
    results["models"][1]["model_type"] = hostile
    results["models"][1]["gates"] = {hostile: [0.5]}
    results["models"][1]["options"] = {hostile: hostile}
    results["models"][0]["evaluation"]["sliding"]["verdict"] = dict.fromkeys(("level", "range", "text"), hostile)
    results["data"][hostile] = {"source": hostile, "notes": [hostile]}
    results["config"][hostile] = hostile
    results["environment"]["processor"] = hostile
    page = read_page([make_run(results)], tmp_path)
    assert page.source.count("<script") == page.source.count("</script") == 1
    assert "<script>alert" not in page.source
    assert not set(page.source) & {"\x1b", "\u202e", "\0", "\uffff"}
    assert "{{ 7 * 7 }}" in page.read()
    assert " 49 " not in page.read()
    for file in (tmp_path / "figures").iterdir():
        assert re.fullmatch(r"[a-z0-9-]+\.(svg|png|csv)", file.name)
        assert file.suffix != ".svg" or "<script" not in file.read_text()


def test_an_interrupted_run_shows_what_it_has(results):
    results["status"] = "interrupted"
    del results["models"][1]["evaluation"], results["models"][1]["gates"]
    results["models"][1]["training"]["epochs_log"] = []
    page = show(results)
    said = page.read()
    assert "status is interrupted" in said
    assert "pythia reaches a sliding-window perplexity of 80.00." in said
    assert "Not evaluated: infini." in said
    assert "gates" not in page.ids()
    assert "gates-training" in page.ids()


PYTHIA, INFINI = ("models", 0), ("models", 1)
MEASURED = (*PYTHIA, "evaluation")


@pytest.mark.parametrize(
    "paths",
    [
        [(*PYTHIA, "training"), (*INFINI, "gates")],
        [("data",), ("environment",), ("code",), ("config",), ("command",)],
        [MEASURED, (*PYTHIA, "num_parameters")],
        [(*PYTHIA, "memory_info"), (*MEASURED, "sliding", "perplexity")],
        [(*INFINI, "evaluation", "memory_usage", "layers", 0, "norms"), (*MEASURED, "sliding", "documents")],
        [(*PYTHIA, "training", "steps_log"), (*MEASURED, "positions"), (*MEASURED, "reversal", "intervals")],
    ],
)
@pytest.mark.filterwarnings("error")
def test_missing_parts_leave_the_rest(results, paths):
    for path in paths:
        set_at(results, path, None)
    said = show(results).read()
    assert "infini" in said
    assert "76.00" in said


@pytest.mark.parametrize("path", [("models",), (*PYTHIA, "training"), MEASURED, ("data",)])
def test_a_part_of_another_form_is_one_line(results, path):
    set_at(results, path, "text")
    with pytest.raises(UserError, match="a: unexpected content in its files: "), refuse_other_forms([Path("a")]):
        show(results)


@pytest.mark.parametrize("value", [float("nan"), 1e308, -1.0], ids=["nan", "huge", "minus"])
@pytest.mark.filterwarnings("error")
def test_numbers_that_no_axis_can_hold(results, value):
    def spoil(entry):
        if isinstance(entry, dict):
            return {key: spoil(item) for key, item in entry.items()}
        if isinstance(entry, list):
            return [spoil(item) for item in entry]
        return value if isinstance(entry, float) else entry

    spoiled = spoil(results["models"][0])
    assert "76.00" in show(results | {"models": [spoiled, results["models"][1]]}).read()
    show(results | {"models": [spoiled]})


def test_passages_are_shaded_and_their_text_is_text(results):
    token = {"carried": 1.0, "emptied": 2.5, "with_memory": [["<b>", 0.9]], "without": [["x", 0.1]], "gate": 0.25}
    token["selection"] = [[0.25, 0.75]]
    passage = {"document": 3, "segment": 4, "before": "<i>", "value_nats": 1.5}
    passage["tokens"] = [token | {"text": "<script>"}]
    continuation = {"document": 2, "segment": 9, "prompt": "<u>", "true": "t", "carried": "<s>", "emptied": "e"}
    figures = {"value_nats": 0.1, "num_tokens": 100, "half_share": 0.05}
    found = figures | {"passages": [passage], "continuations": [continuation]}
    results["models"][1]["evaluation"]["passages"] = found
    page = show(results)
    for words in (
        *("helped by 1.5 nats: document 3, segment 5", "+1.50 nats", "5.0% of them account for half of its help"),
        'style="--share:0.75">&lt;script&gt;<span class="tip"',
        *("…&lt;i&gt;", "…&lt;u&gt;</p>", "<b>memories read</b> 2: 75%, 1: 25%"),
        *("continued: document 2, from segment 10", "<dt>with the memory</dt><dd>&lt;s&gt;</dd>"),
    ):
        assert words in page.source


def test_no_home_folder_is_shared(four_models, tmp_path):
    homes = ("/root", "/home/ada", "/Users/ada")
    four_models["command"] = " ".join(f"--config {home}/a.yaml --data.source={home}/texts" for home in homes)
    four_models["config"]["data"]["source"] = f"{homes[0]}/texts/a.txt"
    page = show(four_models).source
    assert page.count("~/a.yaml") == 3
    for home in homes:
        assert home not in page
        assert hide_home(f"{home}, '{home}/x' /data{home} /rooted") == f"~, '~/x' /data{home} /rooted"
    chart = line_chart("a", "/root/a", "", [{"x": 1, "y": 1, "s": "/root/a"}], x="x", y="y", series="s")
    for name in ("a.csv", "a.svg"):
        write_chart(chart, tmp_path / name)
        assert "/root" not in (tmp_path / name).read_text()


def test_a_process_with_few_addresses_writes_the_page_without_charts(four_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("new_llm.report.figures.read_address_limit", lambda: 6 << 30)
    page = read_page([make_run(four_models)], tmp_path)
    assert " has the lowest sliding" in page.read()
    assert not set(page.ids()) & CHARTS
    assert capsys.readouterr().err.count("charts can't be drawn") == 1
    with pytest.raises(UserError, match="ulimit -v"):
        write_chart(line_chart("a", "A", "", [], x="x", y="y", series="s"), tmp_path / "a.svg")

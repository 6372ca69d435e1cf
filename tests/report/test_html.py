import base64
import copy
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from new_llm.report import render_report, write_report

VOID = {"meta", "link", "br", "hr", "img", "input", "source", "wbr"}
CHARTS = (
    "overview",
    "positions",
    "validation",
    "training-loss",
    "costs",
    "reversal-perplexity",
    "reversal-accuracy",
    "gates-final",
    "gates-training",
    "memory-usage-1",
)


class Page(HTMLParser):
    """The page's elements; refuses tags that are closed out of order or not at all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def ids(self) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get("id"))]

    def read(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_a_complete_run_shows_everything(four_models: dict[str, Any]):
    text = render_report(four_models)
    page = Page(text)
    assert set(CHARTS) <= set(page.ids())
    said = page.read()
    for name in ("pythia", "infini", "multi_memory", "hierarchical"):
        assert said.count(name) >= 8
    assert "multi_memory has the lowest validation perplexity: 75.94, 1.5% below hierarchical (77.09)" in said
    assert "83.93 ± 0.50" in said
    assert "unigram, the floor 530.1" in said
    assert "normal for small data (30–100)" in said
    assert four_models["command"] in said
    assert "sha256:5d41402abc4b2a76b9719d911017c592ae2b" in said
    assert "asked for 5,000 samples" in said
    assert "segments_per_sample: 4" in said
    assert "invented keeper" in said


def test_the_page_loads_nothing_and_runs_its_own_script_alone(four_models: dict[str, Any]):
    text = render_report(four_models)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "object", "embed", "img", "base"}
        for name in ("src", "href", "srcset", "xlink:href", "data", "poster", "action"):
            address = attributes.get(name)
            assert address is None or address.startswith("#") or address == "data:,"
        assert not [name for name in attributes if name.startswith("on")]
    assert set(re.findall(r"[a-z]+://[^\"\s]*", text)) == {"http://www.w3.org/2000/svg"}  # the script's name of SVG
    assert "@import" not in text
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL)
    assert [kind for kind, _ in scripts] == [' type="application/json" id="plots"', ""]
    json.loads(scripts[0][1])
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    policy = next(a["content"] or "" for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}';" in policy
    assert not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_references_lead_somewhere(four_models: dict[str, Any]):
    text = render_report(four_models)
    ids = Page(text).ids()
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)


def test_every_picture_says_what_it_shows_and_follows_the_page_s_colours(results: dict[str, Any]):
    text = render_report(results)
    elements = Page(text).elements
    pictures = [a for tag, a in elements if tag == "svg" and a.get("role") == "img"]
    # Curves of training have a view for each of four x-axes, costs one for each of five measures.
    assert len(pictures) == len(CHARTS) + 3 * 3 + 4
    assert len([a for _, a in elements if a.get("class") == "view" and "hidden" not in a]) == len(CHARTS)
    assert all(len(picture["aria-label"] or "") > 30 for picture in pictures)
    assert "pythia 83.93, infini 78.26; unigram 530.1" in (pictures[0]["aria-label"] or "")
    assert not [a for _, a in elements if re.search(r"#|rgb", (a.get("fill") or "") + (a.get("style") or ""))]
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", text))
    light, dark = text.split("prefers-color-scheme: dark", 1)
    assert used <= set(re.findall(r"--([a-z0-9-]+):", light.split("<style>")[1]))
    assert {"ink", "grid", "muted", "series-0", "series-1"} <= set(re.findall(r"--([a-z0-9-]+):", dark))


def test_hostile_text_is_shown_and_not_obeyed(results: dict[str, Any]):
    hostile = '<script>alert(1)</script> & "q" $x^{$ \u202e {{ 7 * 7 }} --> 漢字'
    results["name"] = results["command"] = results["status"] = hostile
    results["models"][1]["model_type"] = hostile
    results["models"][1]["gates"] = {hostile: [0.5]}
    results["models"][0]["evaluation"]["sliding"]["verdict"] = dict.fromkeys(("level", "range", "text"), hostile)
    results["models"][0]["evaluation"]["reversal"]["per_relation"][0]["relation"] = hostile
    results["models"][0]["memory_info"]["per_layer"][0]["kind"] = hostile
    results["data"][hostile] = {"source": hostile, "notes": [hostile]}
    results["config"][hostile] = hostile
    results["environment"]["processor"] = hostile
    text = render_report(results)
    assert text.count("<script") == text.count("</script") == 2
    assert "<script>alert" not in text
    page = Page(text)
    assert "{{ 7 * 7 }}" in page.read()
    assert " 49 " not in page.read()


def test_lone_surrogates_of_json_can_be_written(results: dict[str, Any], tmp_path: Path):
    results["name"] = "bad \ud800 name"
    write_report(results, tmp_path / "report.html")
    assert "bad ? name" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_that_has_only_begun(results: dict[str, Any]):
    results |= {"models": [], "status": "running"}
    said = Page(render_report(results)).read()
    assert "No model has been evaluated in this run." in said
    assert "status is running" in said


def test_the_least_that_results_can_hold():
    assert "No model has been evaluated" in Page(render_report({"schema_version": 1})).read()


def test_an_interrupted_run_shows_what_it_has(results: dict[str, Any]):
    results["status"] = "interrupted"
    del results["models"][1]["evaluation"], results["models"][1]["gates"]
    results["models"][1]["training"]["epochs_log"] = []
    page = Page(render_report(results))
    said = page.read()
    assert "status is interrupted" in said
    assert "pythia reaches a validation perplexity of 83.93, 15.8% of the unigram's 530.1." in said
    assert "Not evaluated: infini." in said
    assert "gates-final" not in page.ids()
    assert "gates-training" in page.ids()


def test_one_model_without_memory_and_without_reversal(results: dict[str, Any]):
    del results["models"][1]
    results["models"][0]["evaluation"]["reversal"] = None
    page = Page(render_report(results))
    assert not {"gates-final", "gates-training", "reversal", "reversal-perplexity", "memory-usage-0"} & set(page.ids())
    assert "nothing to compare with" in page.read()


MISSING = {
    "no floor, no training": [("unigram_perplexity",), ("models", 0, "training"), ("models", 1, "gates")],
    "no facts about the run": [("data",), ("environment",), ("code",), ("config",), ("command",)],
    "no measures": [("models", 0, "evaluation"), ("models", 0, "num_parameters")],
    "no sizes": [("models", 0, "memory_info"), ("models", 0, "evaluation", "sliding", "perplexity")],
    "no memory use": [("models", 1, "evaluation", "memory_usage", "layers", 0, "norms")],
    "parts of measures": [
        ("models", 0, "evaluation", "memory_usage"),
        ("models", 0, "training", "steps_log"),
        ("models", 0, "evaluation", "positions", "ranges"),
        ("models", 0, "evaluation", "reversal", "by_kind"),
    ],
}


@pytest.mark.parametrize("value", [None, "text"], ids=["null", "text"])
@pytest.mark.parametrize("paths", MISSING.values(), ids=MISSING.keys())
@pytest.mark.filterwarnings("error")
def test_missing_or_broken_parts_leave_the_rest(results: dict[str, Any], paths: list[Any], value: Any):
    for path in paths:
        entry: Any = results
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = value
    said = Page(render_report(results)).read()
    assert "infini" in said
    assert "78.26" in said


@pytest.mark.parametrize(
    "value", [float("nan"), 1e308, -1.0, 1e-9, 10**400], ids=["nan", "huge", "minus", "tiny", "whole"]
)
@pytest.mark.filterwarnings("error")
def test_numbers_that_no_axis_can_hold(results: dict[str, Any], value: float):
    def spoil(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: spoil(item) for key, item in entry.items()}
        if isinstance(entry, list):
            return [spoil(item) for item in entry]
        return value if isinstance(entry, float) else entry

    spoiled = spoil(results["models"][0])
    assert "78.26" in Page(render_report(results | {"models": [spoiled, results["models"][1]]})).read()
    Page(render_report(results | {"models": [spoiled], "unigram_perplexity": value}))


def test_a_long_run_s_curves_are_thinned(results: dict[str, Any]):
    line = results["models"][0]["training"]["steps_log"][0]
    for model in results["models"]:
        model["training"]["steps_log"] = [
            line | {"step": i, "tokens": 4096 * i, "gates": {"layers.0": [0.5]}} for i in range(1, 6_001)
        ]
    assert len(render_report(results)) < 250_000


def test_the_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results: dict[str, Any] = {"schema_version": 1, "name": "first"}
    path = tmp_path / "new" / "report.html"
    write_report(results, path)
    first = path.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>")
    assert first.rstrip().endswith("</html>")

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_report(results | {"name": "other"}, path)
    assert path.read_text(encoding="utf-8") == first
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_the_same_results_give_the_same_page(results: dict[str, Any]):
    assert render_report(results) == render_report(copy.deepcopy(results))

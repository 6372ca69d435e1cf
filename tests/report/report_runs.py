"""Runs as the report reads them, made of a finished one's results, and a page as tests read it."""

import copy
import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from new_llm.report.page import draw_charts, render_page, write_page
from new_llm.report.results import Run, group_series

MODELS = ("pythia", "infini", "multi_memory", "hierarchical")


def pick(results: dict[str, Any], *models: str) -> dict[str, Any]:
    results = copy.deepcopy(results)
    by_name = {entry["model_type"]: entry for entry in results["models"]}
    return results | {"models": [by_name[name] for name in models]}


def make_seed(results: dict[str, Any], seed: int, factors: dict[str, float]) -> dict[str, Any]:
    """One run of a comparison over seeds: each model's perplexities times a factor."""
    results = pick(results, *factors)
    results["config"]["seed"], results["name"] = seed, f"seed-{seed}"
    for entry, factor in zip(results["models"], factors.values(), strict=True):
        for protocol in ("sliding", "streaming"):
            found = entry["evaluation"][protocol]
            found["perplexity"] *= factor
            totals = zip(found["documents"]["total_nll"], found["documents"]["num_tokens"], strict=True)
            found["documents"]["total_nll"] = [total + count * math.log(factor) for total, count in totals]
    return results


def make_record(results: dict[str, Any], model: str) -> dict[str, Any]:
    (entry,) = pick(results, model)["models"]
    return {
        "record_version": 1,
        "kind": "long",
        "status": "complete",
        "created": "2026-02-01T09:00:00+00:00",
        "command": f"new-llm eval long --run runs/four --model {model}",
        "subject": {"model": model},
        "text": {"source": "books/war.txt"},
        "result": entry["evaluation"]["long"],
    }


def set_at(entry: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value


def write_run(folder: Path, results: dict[str, Any], *records: dict[str, Any]) -> Path:
    (folder / "evaluations").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for index, record in enumerate(records):
        (folder / "evaluations" / f"{record['kind']}-{index}.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


VOID = {"meta", "link", "br", "hr", "img", "input", "source", "wbr"}


class Page(HTMLParser):
    """The page's elements; refuses tags that are closed out of order or not at all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.source = text
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or (self.open and self.open.pop() == tag), f"</{tag}> closes another tag or nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def ids(self) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get("id"))]

    def read(self) -> str:
        return " ".join(" ".join(self.text).split())


def read_page(runs: Sequence[Run], folder: Path | None = None) -> Page:
    """The page of some runs; with a folder it is written there with its figures."""
    if folder is not None:
        write_page(runs, folder / "report.html")
        return Page((folder / "report.html").read_text(encoding="utf-8"))
    series = group_series(runs)
    return Page(render_page(runs, series, draw_charts(series)))

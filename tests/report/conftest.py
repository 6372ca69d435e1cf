"""Results of a finished experiment, to be changed at will, and what `new-llm eval` adds to them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import MODELS, make_seed


@pytest.fixture(autouse=True)
def draw_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEW_LLM_TESTS_DRAW_ALL", "1")


@pytest.fixture
def with_long(trained_run: dict[str, Any]) -> dict[str, Any]:
    """Four models, complete: a Pythia and an Infini, and two that are named otherwise and a little worse."""
    results = json.loads((Path(trained_run["folder"]) / "results.json").read_text())
    results["data"]["notes"] = ["asked for 5,000 samples; the training documents hold 48"]
    results |= {"command": "new-llm experiment --config four.yaml", "created": "2026-01-31T14:05:02Z"}
    infini, pythia = results["models"]
    results["models"] = [pythia, infini]
    for factor, name in enumerate(MODELS[2:], start=2):
        (other,) = make_seed(results, 0, {"infini": factor})["models"]
        results["models"].append(other | {"model_type": name, "options": {"num_memories": 4}})
    return results


@pytest.fixture
def four_models(with_long: dict[str, Any]) -> dict[str, Any]:
    results = copy.deepcopy(with_long)
    for entry in results["models"]:
        del entry["evaluation"]["long"]
    return results


@pytest.fixture
def results(four_models: dict[str, Any]) -> dict[str, Any]:
    """Pythia against Infini, with perplexities of 80 and 76."""
    results = four_models | {"models": four_models["models"][:2]}
    for entry, perplexity in zip(results["models"], (80.0, 76.0), strict=True):
        entry["evaluation"]["sliding"]["perplexity"] = perplexity
    return results

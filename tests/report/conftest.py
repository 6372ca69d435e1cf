"""Results of a finished experiment, to be changed at will, and what `new-llm eval` adds to them."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from report_runs import MODELS, make_seed

DRAW = vl_convert.vegalite_to_svg
DRAWN: dict[str, str] = {}


@pytest.fixture(autouse=True, scope="module")
def draw_all() -> Iterator[None]:
    """Here every chart is drawn, and those that many tests share once."""

    def draw_or_find(spec: dict[str, Any], **options: Any) -> str:
        key = json.dumps(spec)
        if key not in DRAWN:
            DRAWN[key] = DRAW(spec, **options)
        return DRAWN[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "vegalite_to_svg", draw_or_find)
        yield


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
    """Every model, complete, without long documents."""
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
